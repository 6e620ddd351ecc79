"""Choosing a mask without group labels: a good model is nowhere far behind the best.

ERM, ERM fine-tuned with the masks of each candidate, and with nothing masked, predict
training images that they have not seen (`held_out`), in several environments:

- the images with the hidden part taken from another image, for the masks of each
  candidate;
- ERM's mistakes, where each kind (class, ERM's prediction) counts the same;
- the rest.

ERM's mistakes decide first: a model clearly behind the best one there is struck out.
Then the model that is furthest behind in any environment is struck out, and another,
until none is far behind. If *nothing masked* is left, ERM is kept. Of the candidates
that are left, the one that hides least is chosen among those that are least behind, if
ERM relies on what it hides, and if it helps. Only training images and their classes are
used.

`choose` is `held_out.collect` (predict), `judge` (numbers only) and `reason` (words).

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024); cells of class and
prediction to choose by: uLA (Tsirigotis et al., 2023); regret over environments:
Agarwal and Zhang, 2022 (arXiv 2202.05436). Using them to choose masks is ours.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
from torch import nn

from masktune_utils import training
from masktune_utils.data import Split
from masktune_utils.held_out import ERM, NULL, HeldOut, collect
from masktune_utils.masking import Explain, Finetune, Fit, MaskedDataset, Rule
from masktune_utils.saliency import saliency_maps

# What even the best model loses on resampled images counts this many times: where the
# masks hide the evidence too, distances decide nothing.
COST = 3
# A good model is nowhere this far behind the best one.
BEHIND = 0.1
# Fewer mistakes of ERM are no environment.
FEW = 5
# Where fine-tuning with nothing masked gains more than this on held-out images, ERM was
# not trained to the end, and its mistakes say little about shortcuts.
UNDERTRAINED = 0.05
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
BATCH_SIZE = 32

_RULE = Rule("mean_std", fill="resample")
# Each round is a candidate. (Those of the registered test, and of all choices on
# digits.)
CANDIDATES = (
    replace(_RULE, param=3.0, dilation=4, rounds=2),
    replace(_RULE, param=1.0, dilation=1, shared=True),
    replace(_RULE, param=2.0, dilation=4, shared=True, rounds=4),
)
# Found later, on photographs.
BY_EXCHANGE = replace(_RULE, param=2.0, dilation=3, shared=True, exchange=True)


@dataclass(frozen=True)
class Verdict:
    """What held-out images say.

    Attributes:
        chosen: a candidate; or `ERM`, which is then kept.
        proposed: the candidate that is chosen if ERM is not kept; if it is kept, the
            one that nothing masked is furthest behind, in any environment.
        accuracy: see `environments`.
        distances: see `distances`; the best is that of the models that are left.
        left: see `strike_out`.
    """

    chosen: str
    proposed: str
    accuracy: pd.DataFrame
    distances: pd.DataFrame
    left: list[str]


def environments(held_out: HeldOut) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Accuracy of each model in each environment, and its standard error.

    The environments are the images that the masks of each candidate resample, of which
    the worst class counts; `rest`; and `mistakes`, of ERM, if there are at least `FEW`:
    the mean over their kinds.

    Returns:
        Environments in rows, models in columns; both in [0, 1].
    """
    is_right = held_out.is_right
    is_mistake = held_out.is_mistake
    accuracy = held_out.resampled.copy()
    counts = pd.Series(float(held_out.smallest_class), accuracy.index)
    if not is_mistake.all():
        accuracy.loc["rest"] = is_right[~is_mistake].mean()
        counts["rest"] = (~is_mistake).sum()
    if is_mistake.sum() >= FEW:
        kinds = held_out.kinds
        images = kinds.pop("images")
        accuracy.loc["mistakes"] = kinds.mean()
        # As exact as the mean over so many images, each of which counts the same.
        counts["mistakes"] = len(kinds) ** 2 / (1 / images).sum()
    variances = accuracy * (1 - accuracy)
    return accuracy, variances.div(counts, axis=0) ** 0.5


def distances(accuracy: pd.DataFrame, left: list[str], before: float) -> pd.DataFrame:
    """How far each model is behind the best one in each environment.

    On resampled images less: what even the best model loses there against `before`
    counts `COST` times; what a model is behind on the rest is not counted again.

    Args:
        accuracy: see `environments`.
        left: the models that set the bar.
        before: accuracy of ERM's worst class on the images as they are.
    """
    best = accuracy[left].max(axis=1)
    behind = accuracy.rsub(best, axis=0)
    resampled = accuracy.index.difference(["rest", "mistakes"], sort=False)
    lost = (before - best[resampled]).clip(lower=0)
    behind.loc[resampled] = behind.loc[resampled].sub(COST * lost, axis=0)
    if "rest" in behind.index:
        behind.loc[resampled] -= behind.loc["rest"].clip(lower=0)
    return behind


def strike_out(
    accuracy: pd.DataFrame, errors: pd.DataFrame, before: float
) -> list[str]:
    """The good models: none of them is `BEHIND` the best of them in any environment.

    One that relies on the shortcut is the best where masks hide the evidence, and one
    that relies on the evidence where masks hide the shortcut: resampled images cannot
    tell which is which, but ERM's mistakes can. So those that are `BEHIND` there, and
    by two standard errors, are struck out first, and no longer set the bar. Then the
    model that falls furthest behind anywhere is struck out, and another, until none is
    so far behind.

    Args:
        accuracy: see `environments`.
        errors: see `environments`.
        before: see `distances`.
    """
    left = list(accuracy)
    if "mistakes" in accuracy.index:
        mistakes = accuracy.loc["mistakes"]
        far = max(BEHIND, 2 * errors.loc["mistakes", mistakes.idxmax()])
        left = list(mistakes.index[mistakes.max() - mistakes < far])
    while True:
        shortfalls = distances(accuracy, left, before)[left].max()
        if shortfalls.max() < BEHIND:
            return left
        left.remove(shortfalls.idxmax())


def propose(behind: pd.DataFrame, errors: pd.DataFrame, hidden: pd.Series) -> str:
    """Of the candidates that fall least behind, the one that hides least.

    These are within one standard error of the smallest shortfall: that of the best
    candidate where it is furthest behind, the largest if there are several such
    environments.

    Args:
        behind: see `distances`; of some candidates.
        errors: the standard error of each accuracy.
        hidden: see `HeldOut`.
    """
    shortfalls = behind.max()
    best = shortfalls.idxmin()
    is_furthest = behind[best] == shortfalls[best]
    limit = shortfalls[best] + errors.loc[is_furthest, best].max()
    near = shortfalls.index[shortfalls <= limit]
    return hidden[near].idxmin()


def is_undertrained(held_out: HeldOut) -> bool:
    """Whether nothing masked gains more than `UNDERTRAINED` on ERM."""
    shares = held_out.is_right.mean()
    return shares[NULL] - shares[ERM] > UNDERTRAINED


def relies_on(held_out: HeldOut, name: str) -> bool:
    """Whether ERM relies on what the masks of a candidate hide.

    Its worst class is then `BEHIND` less accurate where this part comes from another
    image at random.
    """
    return held_out.worst_class - held_out.resampled.loc[name, ERM] >= BEHIND


def helps(held_out: HeldOut, name: str) -> bool:
    """Whether a candidate corrects mistakes that its masks explain.

    Two or more of these are then right beyond those that are right with nothing masked:
    a single image is no evidence. Fewer than `FEW` mistakes say nothing.
    """
    is_explained = held_out.explained[name]
    right = held_out.is_right[is_explained].sum()
    return is_explained.sum() < FEW or right[name] >= right[NULL] + 2


def judge(held_out: HeldOut) -> Verdict:
    """Choose a candidate; or keep ERM, unless nothing masked falls far behind.

    ERM is also kept if it is undertrained, if it hardly relies on what is hidden, or if
    hiding it does not help.

    Args:
        held_out: predictions.
    """
    accuracy, errors = environments(held_out)
    before = held_out.worst_class
    left = strike_out(accuracy.drop(columns=ERM), errors, before)
    behind = distances(accuracy, left, before)
    hidden = held_out.hidden
    if NULL in left or is_undertrained(held_out):
        gains = accuracy[hidden.index].sub(accuracy[NULL], axis=0)
        return Verdict(ERM, gains.max().idxmax(), accuracy, behind, left)
    candidates = [model for model in left if hidden[model] > 0]
    if not candidates:
        candidates = list(hidden.index)
    proposed = propose(behind[candidates], errors, hidden)
    is_good = relies_on(held_out, proposed) and helps(held_out, proposed)
    chosen = proposed if is_good else ERM
    return Verdict(chosen, proposed, accuracy, behind, left)


def reason(held_out: HeldOut, verdict: Verdict) -> str:
    """A verdict in words: what was chosen, what is hidden, what helps, what it costs.

    Args:
        held_out: predictions.
        verdict: see `judge`.
    """
    name = verdict.proposed if verdict.chosen == ERM else verdict.chosen
    is_right = held_out.is_right
    accuracy = 100 * is_right.mean()
    before = 100 * held_out.worst_class
    resampled = 100 * held_out.resampled.loc[name]
    is_relied_on = relies_on(held_out, name)
    lines = [_decision(held_out, verdict)]
    lines.append(
        f'The mask "{name}" hides {held_out.hidden[name]:.0%} of the image, most at '
        f"the {held_out.place[name]}."
    )
    lines.append(
        "With this part taken from another image at random, ERM gets "
        f"{resampled[ERM]:.0f}% of its worst class right, instead of {before:.0f}%; "
        f"fine-tuned with nothing masked {resampled[NULL]:.0f}%, with the mask "
        f"{resampled[name]:.0f}%."
    )
    if is_relied_on:
        lines.append("So it relies on this part: is it a shortcut, or real evidence?")
    else:
        lines.append("So it hardly relies on this part.")
    is_explained = held_out.explained[name]
    right = is_right[is_explained].sum()
    lines.append(
        f"Of {len(is_right):,} training images, {held_out.is_mistake.sum()} are "
        "mistakes of ERM models that have not seen them. "
        f"{is_explained.sum()} of these become right if this part comes from another "
        f"image of their class: with nothing masked {right[NULL]} of them are right, "
        f"with the mask {right[name]}."
    )
    kinds = held_out.kinds
    stay_wrong = kinds[name] < 0.5
    if stay_wrong.any():
        lines.append(
            f"For {stay_wrong.sum()} of {len(kinds)} kinds of mistakes (class, "
            "prediction), the mask leaves most images wrong."
        )
    lines.append(
        f"Of all images that models have not seen, ERM gets {accuracy[ERM]:.1f}% "
        f"right, with nothing masked {accuracy[NULL]:.1f}%, with the mask "
        f"{accuracy[name]:.1f}%."
    )
    if verdict.chosen != ERM:
        lines.append(
            "Look at what it hides (plotting.choice_masks): if your classes are about "
            f'that, keep ERM, choice.take("{ERM}").'
        )
    elif is_relied_on:
        lines.append(
            "Look at what it hides (plotting.choice_masks): if that should not matter, "
            f'you can take the mask, choice.take("{name}").'
        )
        if resampled.max() < before - 100 * BEHIND:
            lines.append(
                f"Without this part at most {resampled.max():.0f}% of the worst class "
                "are learnt: longer training, more images or public weights may help."
            )
    return "\n".join(lines)


def _decision(held_out: HeldOut, verdict: Verdict) -> str:
    """What was chosen, and why."""
    of_rule = judge(held_out).chosen
    if verdict.chosen != of_rule:
        return f'By hand: "{verdict.chosen}", instead of "{of_rule}".'
    behind = 100 * verdict.distances[NULL]
    where = behind.idxmax()
    in_words = {"mistakes": "ERM's mistakes", "rest": "the other images"}
    images = in_words.get(where, f'images resampled by "{where}"')
    null_behind = (
        f"fine-tuned with nothing masked, ERM is {behind.max():.0f} points behind the "
        f"best model on {images}"
    )
    if of_rule != ERM:
        return (
            f'Chosen: "{of_rule}", since {null_behind}; of the best masks this one '
            "hides least."
        )
    if is_undertrained(held_out):
        shares = 100 * held_out.is_right.mean()
        return (
            "ERM is kept, since it is undertrained: fine-tuning with nothing masked "
            f"gains {shares[NULL] - shares[ERM]:.0f} points. Train it longer, and "
            "choose again."
        )
    if NULL in verdict.left:
        return (
            f"ERM is kept: {null_behind}, and no further elsewhere: too little to show "
            "that a mask helps."
        )
    if not relies_on(held_out, verdict.proposed):
        return "ERM is kept: it hardly relies on what the best mask hides."
    return (
        "ERM is kept: the best mask does not clearly correct more of the mistakes that "
        "it explains than nothing masked."
    )


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen, and why.

    Attributes:
        held_out: what it is based on.
        candidates: `NULL` and each candidate → the training images with their masks.
        schedule: how these are fine-tuned.
        verdict: see `judge`.
    """

    held_out: HeldOut
    candidates: dict[str, MaskedDataset]
    schedule: Finetune
    verdict: Verdict

    @property
    def reason(self) -> str:
        """See `reason`."""
        return reason(self.held_out, self.verdict)

    def take(self, name: str) -> "Choice":
        """The same with another candidate, or `ERM`: you decide.

        Raises:
            ValueError: there is no such candidate.
        """
        names = [ERM, *self.held_out.hidden.index]
        if name not in names:
            raise ValueError(f"name is {name!r}; allowed: {'; '.join(names)}.")
        return replace(self, verdict=replace(self.verdict, chosen=name))

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
        """The models: accuracy and what is hidden, in %, and points they are behind.

        `resampled` is the worst class where masks resample images.
        """
        accuracy = self.verdict.accuracy
        parts = {
            "mistakes": accuracy.reindex(["mistakes"]).max(),
            "rest": accuracy.reindex(["rest"]).max(),
            "resampled": self.held_out.resampled.min(),
            "behind": self.verdict.distances.max(),
            "hidden": self.held_out.hidden,
        }
        table = 100 * pd.DataFrame(parts, index=accuracy.columns)
        return table.assign(chosen=table.index == self.verdict.chosen)

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept."""
        tuned = copy.deepcopy(network)
        return tuned if self.is_kept else self.schedule(tuned, self.masked)


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
    candidates: Sequence[Rule] = (*CANDIDATES, BY_EXCHANGE),
    jobs: int = 1,
    explain: Explain = saliency_maps,
    seed: int = 0,
    folder: Path | None = None,
) -> Choice:
    """Choose a mask for training images on held-out ones, or keep ERM.

    It calls `fit` twice, with half of the images each. For nothing masked and each
    candidate it fine-tunes both networks: 18 times, which is 54 epochs of all images
    with the default schedule and less than 4,000 images.

    Args:
        train: see `held_out.collect`, as for the others.
        fit: training images → a new network trained on them.
        finetune: by default our `fine_tune`.
        candidates: how masks are made.
        jobs: how many processes.
        explain: (network, images, labels) → maps N×h×w.
        seed: of every random choice.
        folder: where to go on after a stop.

    Raises:
        TypeError: see `held_out.collect`.
        ValueError: see `held_out.collect`.
    """
    schedule = finetune or partial(fine_tune, epochs=default_epochs(len(train)))
    held_out, masked = collect(
        train, fit, schedule, candidates, jobs, explain, seed, folder
    )
    return Choice(held_out, masked, schedule, judge(held_out))
