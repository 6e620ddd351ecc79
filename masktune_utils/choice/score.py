"""Choosing a mask without group labels: does it correct the mistakes that it explains?

For each kind of ERM's mistakes on held-out images (class, prediction): how much more
often is the model with the mask right than the one with nothing masked? The score is
the mean over kinds, each weighted by the share of its mistakes that the mask explains.
Only training images and their classes are used.

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
import torch
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

_RULE = Rule(method="mean_std", fill="resample")
# In the order in which they are tried; later rounds come last.
CANDIDATES = (
    replace(_RULE, param=2, dilation=3, shared=True, exchange=True),
    replace(_RULE, param=2, dilation=4, shared=True, rounds=4),
    replace(_RULE, param=1, dilation=1, shared=True),
    replace(_RULE, param=3, dilation=4, rounds=2),
)


@dataclass(frozen=True)
class Verdict:
    """What held-out images say.

    Attributes:
        chosen: a mask; or `ERM`, which is then kept.
        best: the chosen mask; if ERM is kept, the one that gains most.
        reason: in words.
        is_final: whether no further mask need be tried.
    """

    chosen: str
    best: str
    reason: str
    is_final: bool = False


def scores(held_out: HeldOut) -> pd.DataFrame:
    """How many more of the mistakes that it explains a mask corrects than none does.

    Returns:
        A row for each mask that was tried: `score`, in [-1, 1], and its standard
        `error`; `gain`, the score less half of what the mask loses on the images that
        are no mistakes of ERM (the mean over classes); how many mistakes it `explains`,
        and how many of these are right with the mask, `corrects`, and with `nothing`
        masked.
    """
    is_mistake = held_out.is_mistake
    kinds = torch.stack([held_out.labels, held_out.predictions[ERM]], 1)[is_mistake]
    _, kind, sizes = kinds.unique(dim=0, return_inverse=True, return_counts=True)
    null_right = held_out.is_right(NULL)
    null_rest = _mean_over_classes(
        null_right[~is_mistake], held_out.labels[~is_mistake]
    )
    rows = {}
    for mask in held_out.tried:
        is_right = held_out.is_right(mask)
        is_explained = held_out.explained[mask]
        row = {"score": 0.0, "error": math.inf}
        if is_explained.any():
            shares = torch.zeros(len(sizes), dtype=torch.float64).index_add(
                0, kind, is_explained[is_mistake].double()
            )
            weights = (shares / sizes**2)[kind]
            gains = is_right[is_mistake].double() - null_right[is_mistake].double()
            row = _weighted_mean(gains, weights)
        rest = _mean_over_classes(is_right[~is_mistake], held_out.labels[~is_mistake])
        row["gain"] = row["score"] - max(0, null_rest - rest) / 2
        row["explains"] = is_explained.sum().item()
        row["corrects"] = is_right[is_explained].sum().item()
        row["nothing"] = null_right[is_explained].sum().item()
        rows[mask] = row
    return pd.DataFrame.from_dict(rows, orient="index")


def _weighted_mean(gains: Tensor, weights: Tensor) -> dict[str, float]:
    """The mean, and its error as if there were one more, a full step away."""
    weights = weights / weights.sum()
    count = 1 / weights.square().sum()  # of equal weights that would be as exact
    mean = weights @ gains
    variance = weights @ (gains - mean).square()
    error = ((count * variance + 1) / (count + 1) / count).sqrt()
    return {"score": mean.item(), "error": error.item()}


def _mean_over_classes(is_right: Tensor, labels: Tensor) -> float:
    """Accuracy, each class that has images counts the same."""
    shares = [is_right[labels == label].double().mean() for label in labels.unique()]
    return torch.stack(shares).mean().item() if shares else 0.0


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
    clear = table.index[is_sure & (gain >= CLEAR)]
    good = table.index[is_sure & (gain >= ENOUGH)]
    best = gain[good if len(good) else table.index].idxmax()
    if len(clear):
        chosen = clear[0]
    elif len(good):
        limit = gain[best] - BETTER * table.loc[best, "error"]
        chosen = next(mask for mask in good if gain[mask] >= limit)
    else:
        counts = table.loc[best]
        reason = (
            "ERM is kept: no mask clearly corrects what it explains; the best, "
            f'"{best}": {counts["corrects"]:.0f} of {counts["explains"]:.0f}, nothing '
            f"masked {counts['nothing']:.0f}."
        )
        return Verdict(ERM, best, reason)
    counts = table.loc[chosen]
    reason = (
        f'Chosen: "{chosen}": of {counts["explains"]:.0f} mistakes that it explains, '
        f"the mask corrects {counts['corrects']:.0f}, nothing masked "
        f"{counts['nothing']:.0f}."
    )
    return Verdict(chosen, chosen, reason, is_final=len(clear) > 0)


def _outlook(held_out: HeldOut) -> Verdict:
    """Before any fine-tuning: is there a mask that may be chosen?"""
    accuracy = held_out.is_right(ERM).double().mean().item()
    explains = {
        mask: held_out.explained[mask].sum().item() for mask in held_out.explained
    }
    is_hopeless = not any(
        explains[mask] >= HOPE and accuracy - held_out.resampled[mask][ERM] >= ENOUGH
        for mask in explains
    )
    best = max(explains, key=explains.get)
    reason = (
        f"ERM is kept: no mask explains {HOPE} of its {held_out.is_mistake.sum()} "
        "mistakes and hides what it relies on."
    )
    return Verdict(ERM, best, reason, is_hopeless)


def _prior(held_out: HeldOut) -> Verdict:
    """Without mistakes: the model that is the most accurate where any mask hides."""
    accuracies = pd.DataFrame(held_out.resampled).mean(axis=1).drop(ERM)
    if NULL not in accuracies:
        return Verdict(ERM, next(iter(held_out.mean_masks)), "")
    gains = accuracies.drop(NULL) - accuracies[NULL]
    best = gains.idxmax()
    few = (
        f"ERM makes {held_out.is_mistake.sum()} mistakes on held-out images: they do "
        "not tell which evidence misleads. By a prior, "
    )
    where = "points more accurate than with nothing masked where masks hide a part."
    if gains[best] < ENOUGH:
        reason = f"{few}ERM is kept: no mask is {100 * ENOUGH:.0f} {where}"
        return Verdict(ERM, best, reason, is_final=True)
    reason = f'{few}chosen: "{best}", {100 * gains[best]:.0f} {where}'
    return Verdict(best, best, reason, is_final=True)


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
    def table(self) -> pd.DataFrame:
        """See `scores`; and the share of the image that is hidden."""
        hidden = {
            mask: share.mean() for mask, share in self.held_out.mean_masks.items()
        }
        return scores(self.held_out).assign(hidden=pd.Series(hidden, dtype=float))

    @property
    def reason(self) -> str:
        """What was chosen and why, what is hidden, and what it costs."""
        held_out = self.held_out
        best = self.verdict.best
        accuracy = {
            model: 100 * held_out.is_right(model).double().mean().item()
            for model in held_out.predictions
        }
        lines = [self.verdict.reason]
        lines.append(
            f'"{best}" hides {held_out.mean_masks[best].mean():.0%} of the image, mostly '
            f"{_place(held_out.mean_masks[best])}."
        )
        if best in accuracy:
            lines.append(
                f"Accuracy on images not seen in training: {accuracy[ERM]:.1f}% (ERM), "
                f"{accuracy[NULL]:.1f}% (nothing masked), {accuracy[best]:.1f}% (mask)."
            )
            if accuracy[NULL] - accuracy[ERM] > UNDERTRAINED:
                lines.append("ERM gains by more training alone: train it longer.")
        if self.is_kept:
            lines.append(f'To take this mask: choice.take("{best}").')
        else:
            lines.append(
                f'If your classes are about this part, keep ERM: choice.take("{ERM}").'
            )
        if not held_out.has_maps:
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
        reason = f'By hand: "{name}". {self.verdict.reason}'
        best = self.verdict.best if name == ERM else name
        verdict = replace(self.verdict, chosen=name, best=best, reason=reason)
        return replace(self, verdict=verdict)

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept."""
        tuned = copy.deepcopy(network)
        return tuned if self.is_kept else self.schedule(tuned, self.masked)


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
            fold, and must not start from a network that has seen these images.
        finetune: (a copy of a network, masked images) → the network, fine-tuned; by
            default our `fine_tune`.
        candidates: how masks are made; each round of a rule is tried.
        jobs: 1, or 2 for a process for each fold.
        explain: (network, images, labels) → maps N×h×w.
        seed: of every random choice.
        folder: where each pair of networks is saved, so that a second call goes on
            where the first was stopped. If `fit` or `finetune` changes, delete it.
            Loading a network runs code: use a folder of your own, and none from others.

    Raises:
        TypeError: `train` is no `Split`, or `fit` or `finetune` returns no network.
        ValueError: there is one class, one with less than two images, or no candidate;
            or `fit` returns the same network twice, or one that does not predict a
            finite number for each class.
    """
    if not isinstance(train, Split):
        raise TypeError(
            f"train is a {type(train).__name__}; allowed: a Split, as "
            "Split.from_dataset(train) is one."
        )
    if not candidates:
        raise ValueError("there are 0 candidates; allowed: 1 or more.")
    schedule = finetune or partial(fine_tune, epochs=default_epochs(len(train)))
    folds = Folds(train, fit, schedule, explain, jobs, seed, folder)
    for held_out in folds.try_masks(candidates):
        verdict = judge(held_out)
        if verdict.is_final:
            break
    return Choice(held_out, folds.images, schedule, verdict)
