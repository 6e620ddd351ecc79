"""Choosing a mask without group labels: does it correct what it explains?

For each kind of ERM's mistakes on held-out images (class, prediction): how much more
often is the model with the mask right than the one with nothing masked? The score is
the mean over kinds, each weighted by the share of its mistakes that the mask explains
(`exchange.explained`). Only training images and their classes are used.

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024); cells of class and
prediction to choose by: uLA (Tsirigotis et al., 2023). Using them to choose masks is
ours.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch.nn.functional as F
from torch import Tensor, nn

from masktune_utils import training
from masktune_utils.choice.held_out import ERM, FEW, NULL, Folds, HeldOut
from masktune_utils.data import Split
from masktune_utils.masking import Explain, Finetune, Fit, MaskedDataset, Rule
from masktune_utils.saliency import saliency_maps

SURE = 1.64  # standard errors that a score must exceed: one-sided, 95 %
ENOUGH = 0.1  # what a mask must gain
CLEAR = 0.4  # a mask that gains this much is taken, and no other one is tried
HOPE = 4  # mistakes that a mask must explain to be worth fine-tuning
UNDERTRAINED = 5  # points that nothing masked gains on ERM
BETTER = 0.5  # standard errors by which a later mask must gain more than an earlier one
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
BATCH_SIZE = 32

COLUMNS = ["score", "error", "gain", "explains", "corrects", "nothing"]
_rule = partial(Rule, "mean_std", fill="resample")
# In the order in which they are tried; later rounds come last.
CANDIDATES = (
    _rule(2, dilation=3, shared=True, exchange=True),
    _rule(2, dilation=4, shared=True, rounds=4),
    _rule(1, dilation=1, shared=True),
    _rule(3, dilation=4, rounds=2),
)


@dataclass(frozen=True)
class Verdict:
    """What held-out images say.

    Attributes:
        chosen: a mask; or `ERM`, which is then kept.
        best: the chosen mask; if ERM is kept, the one that gains most, or, if none was
            tried, explains most.
        reason: in words.
        is_final: whether no further mask need be tried.
    """

    chosen: str
    best: str
    reason: str
    is_final: bool = False


def scores(held_out: HeldOut) -> pd.DataFrame:
    """How many more mistakes of the kinds that it explains a mask corrects than none.

    Returns:
        A row for each mask that was tried: `score`, in [-1, 1], and its standard
        `error`, as if there were one mistake more, a full step away; `gain`, the score
        less half of what the mask loses on the images that are no mistakes of ERM (the
        mean over classes); how many mistakes it `explains` by half or more, and how
        many of these are right with the mask, `corrects`, and with `nothing` masked.
        Without explained mistakes the score is 0, and has no error.
    """
    if not held_out.tried:
        return pd.DataFrame(columns=COLUMNS)
    labels = pd.Series(held_out.labels)
    predictions = pd.DataFrame(held_out.predictions)
    right = predictions.eq(labels, axis=0)
    is_mistake = ~right[ERM]
    with_mask = right[held_out.tried]
    shares = pd.DataFrame(held_out.explained)[held_out.tried]

    by_kind = shares[is_mistake].groupby([labels, predictions[ERM]])
    weights = by_kind.transform("mean").div(by_kind.transform("size"), axis=0)
    weights = weights / weights.sum()
    better = with_mask.astype(float).sub(right[NULL], axis=0)
    gains = better[is_mistake]
    score = (weights * gains).sum()
    variance = (weights * (gains - score) ** 2).sum()
    count = 1 / (weights**2).sum()  # of equal weights that would be as exact
    error = ((count * variance + 1) / (count + 1) / count) ** 0.5

    of_rest = better[~is_mistake].groupby(labels).mean().mean()
    is_explained = shares >= 0.5
    columns = {
        "score": score,
        "error": error,
        "gain": score + of_rest.clip(upper=0) / 2,
        "explains": is_explained.sum(),
        "corrects": (is_explained & with_mask).sum(),
        "nothing": is_explained[right[NULL]].sum(),
    }
    return pd.DataFrame(columns)


def judge(held_out: HeldOut) -> Verdict:
    """Choose a mask of those that were tried, or keep ERM.

    A mask is good if its score is positive beyond doubt, and it gains `ENOUGH`. The
    first one that gains `CLEAR` is taken; else the first good one within `BETTER`
    standard errors of the best.
    """
    if held_out.is_mistake.sum() < FEW:
        return _prior(held_out)
    if not held_out.tried:
        return _outlook(held_out)
    table = scores(held_out)
    gain = table["gain"]
    is_sure = table["score"] >= SURE * table["error"]
    good = gain[is_sure & (gain >= ENOUGH)]
    clear = good[good >= CLEAR]
    if len(clear):
        best = clear.index[0]
    elif len(good):
        best = good.idxmax()
        nearly = good[best] - BETTER * table.loc[best, "error"]
        best = good[good >= nearly].index[0]
    else:
        best = gain.idxmax()
    row = table.loc[best]
    counts = (
        f'"{best}".\nOf {row["explains"]:.0f} mistakes that it explains, the mask '
        f"corrects {row['corrects']:.0f}, nothing masked {row['nothing']:.0f}."
    )
    if good.empty:
        kept = "ERM is kept: no mask clearly corrects what it explains. The best:"
        return Verdict(ERM, best, f"{kept} {counts}")
    return Verdict(best, best, f"Chosen: {counts}", is_final=len(clear) > 0)


def _outlook(held_out: HeldOut) -> Verdict:
    """Before any fine-tuning: is there a mask that may be chosen?"""
    explains = {}
    for mask, shares in held_out.explained.items():
        # Of float32, 20 fifths may be less than 4.
        explains[mask] = shares.double().sum()
    accuracy = held_out.is_right(ERM).double().mean()
    is_hopeless = all(
        explains[mask] < HOPE or accuracy - held_out.resampled[mask][ERM] < ENOUGH
        for mask in explains
    )
    reason = (
        f"ERM is kept: no mask that hides what it relies on explains {HOPE} of its "
        f"{held_out.is_mistake.sum()} mistakes."
    )
    return Verdict(ERM, max(explains, key=explains.get), reason, is_hopeless)


def _prior(held_out: HeldOut) -> Verdict:
    """Without mistakes: the model that is the most accurate where any mask hides."""
    accuracy = pd.DataFrame(held_out.resampled).mean(axis=1)
    if NULL not in accuracy:  # not all is known yet
        return Verdict(ERM, next(iter(held_out.explained)), "")
    gain = accuracy.drop([ERM, NULL]) - accuracy[NULL]
    best = gain.idxmax()
    is_enough = gain[best] >= ENOUGH
    decision = f'Chosen: "{best}"' if is_enough else "ERM is kept"
    reason = (
        f"{decision}, by a prior: too few held-out mistakes "
        f"({held_out.is_mistake.sum()}) to tell which evidence misleads. Gain of "
        f'"{best}" over nothing masked, where masks hide a part: '
        f"{100 * gain[best]:+.0f} points."
    )
    return Verdict(best if is_enough else ERM, best, reason, is_final=True)


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen, and why.

    Attributes:
        held_out: what it is based on.
        candidates: `NULL` and each mask → the training images with it.
        schedule: how networks are fine-tuned.
        verdict: see `judge`.
    """

    held_out: HeldOut
    candidates: dict[str, MaskedDataset]
    schedule: Finetune
    verdict: Verdict

    @property
    def is_kept(self) -> bool:
        """Whether ERM is kept."""
        return self.verdict.chosen == ERM

    @property
    def masked(self) -> MaskedDataset:
        """The images with the chosen masks; nothing is hidden if ERM is kept."""
        return self.candidates[NULL if self.is_kept else self.verdict.chosen]

    @property
    def reason(self) -> str:
        """What was chosen and why, what is hidden, and what it costs."""
        best = self.verdict.best
        mean_mask = self.held_out.mean_masks[best]
        lines = [self.verdict.reason]
        hides = f'"{best}" hides {mean_mask.mean():.0%} of the image'
        is_even = mean_mask.min() == mean_mask.max()
        lines.append(
            f"{hides}." if is_even else f"{hides}, mostly {_place(mean_mask)}."
        )
        if best in self.held_out.tried:
            erm, nothing, mask = [
                100 * self.held_out.is_right(model).double().mean()
                for model in (ERM, NULL, best)
            ]
            lines.append(
                f"Accuracy on images not seen in training: {erm:.1f}% (ERM), "
                f"{nothing:.1f}% (nothing masked), {mask:.1f}% (mask)."
            )
            if nothing - erm > UNDERTRAINED:
                lines.append("ERM gains by more training alone: train it longer.")
        if self.is_kept:
            lines.append(f'To take this mask: choice.take("{best}").')
        else:
            lines.append(
                f'If your classes are about this part, keep ERM: choice.take("{ERM}").'
            )
        if not self.held_out.has_maps:
            lines.append("The network gives no maps: masks are by exchange alone.")
        return "\n".join(lines)

    def take(self, name: str) -> "Choice":
        """The same with another mask, or `ERM`: you decide.

        Raises:
            ValueError: there is no such mask.
        """
        names = [ERM, *self.held_out.mean_masks]
        if name not in names:
            raise ValueError(f"name is {name!r}; allowed: {'; '.join(names)}.")
        reason = f'By hand: "{name}".'
        best = self.verdict.best if name == ERM else name
        return replace(self, verdict=Verdict(name, best, reason))

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept.

        It is in evaluation mode.
        """
        tuned = copy.deepcopy(network)
        if not self.is_kept:
            tuned = self.schedule(tuned, self.masked)
        return tuned.eval()


def _place(mean_mask: Tensor) -> str:
    """The ninth of the image where most is hidden, in words."""
    ninth = F.adaptive_avg_pool2d(mean_mask[None], 3).argmax().item()
    row = ("top", "middle", "bottom")[ninth // 3]
    column = ("left", "centre", "right")[ninth % 3]
    return f"{row} {column}"


def fine_tune(network: nn.Module, masked: MaskedDataset, epochs: int) -> nn.Module:
    """Our schedule: small batches, and a rate that falls from 0.02 to 0."""
    training.train(
        network,
        masked,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        lr=0.02,
        schedule="linear",
        seed=masked.seed,
    )
    return network


def default_epochs(count: int) -> int:
    """Epochs of `fine_tune`, for a number of training images."""
    return min(MOST_EPOCHS, math.ceil(STEPS * BATCH_SIZE / count))


def choose(
    train: Split,
    fit: Fit,
    finetune: Finetune | None = None,
    candidates: Sequence[Rule] = CANDIDATES,
    jobs: int = 1,
    explain: Explain = saliency_maps,
    seed: int = 0,
    folder: Path | None = None,
) -> Choice:
    """Choose a mask for training images on held-out ones, or keep ERM.

    It calls `fit` twice, with half of the images each. Then it fine-tunes both networks
    with nothing masked and with mask after mask, until one is clear.

    Args:
        train: the training images; only these and their classes are used.
        fit: training images → a new network trained on them. It is called once for each
            fold, and must not start from a network that has seen these images. The
            default `finetune` trains weights that require gradients.
        finetune: (a copy of a network, masked images) → the network, fine-tuned; by
            default our `fine_tune`.
        candidates: how masks are made; each round of a rule is tried.
        jobs: 1, or 2 for a process for each fold.
        explain: (network, images, labels) → maps N×h×w.
        seed: of every random choice.
        folder: where each pair of networks is saved, so that a second call goes on
            where the first was stopped, on the device of the images. If `fit` or
            `finetune` changes, or a file is damaged, delete it. Loading a network runs
            code: use a folder of your own, and none from others.

    Raises:
        NoMapsError: the network gives no maps, and no candidate is by exchange,
            or one by exchange has several rounds.
        TypeError: `train` is no `Split`; `fit` or `finetune` returns no network, or
            one whose output (in evaluation mode) is no tensor; or the weights that
            `fit` returns are not float32.
        ValueError: there is one class, a class with one image, or no candidate; or
            `fit` returns networks that share weights, or one that does not predict a
            finite number for each class.
    """
    if not isinstance(train, Split):
        raise TypeError(
            f"train is a {type(train).__name__}; allowed: a Split, as "
            "Split.from_dataset(train) is one."
        )
    if not candidates:
        raise ValueError("there are 0 candidates; allowed: 1 or more.")
    _, counts = train.labels.unique(return_counts=True)
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"the classes of train have {counts.tolist()} images; allowed: 2 classes "
            "or more, of 2 images or more each."
        )
    schedule = finetune or partial(fine_tune, epochs=default_epochs(len(train)))
    folds = Folds(train, fit, schedule, explain, jobs, int(seed), folder)
    for held_out in folds.try_masks(candidates):
        verdict = judge(held_out)
        if verdict.is_final:
            break
    return Choice(held_out, folds.images, schedule, verdict)
