"""Choosing a mask without group labels: a good model is never far behind the best.

Two base models are trained, each on half of the training images, and each candidate
fine-tunes both. All models then predict the images of the half that they have not seen,
in several environments: the images that ERM gets wrong, the rest, and, for the masks of
each candidate, the images with the hidden part taken from another image. Models that
fall far behind the best one in any of these are struck out, one at a time. ERM is kept
unless the mistakes that it is sure of, or the resampled images, show that it relies on
what the mask hides. Only training images and their classes are used.

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024); such groups to
choose by: uLA (Tsirigotis et al., 2023); regret over environments: Agarwal and Zhang,
2022 (arXiv 2202.05436). To choose masks by them is ours.
"""

from dataclasses import dataclass
from functools import partial

import pandas as pd
from torch import Tensor

from masktune_utils import evaluation

# What even the best model loses on resampled images counts this many times: where the
# masks hide the evidence too, distances decide nothing.
COST = 3
# Mistakes of which ERM is sure, by its probability, can prove or refute a candidate ...
SURE = 0.95
# ... if there are at least this many.
FEW = 10
# A good model is nowhere this far behind the best; ERM is, if it relies on a shortcut.
BEHIND = 0.1
ERM = "base"
NULL = "nothing masked"  # ERM fine-tuned like the candidates, on the images as they are


@dataclass(frozen=True)
class HeldOut:
    """Predictions for every training image, by models that have not seen it.

    Attributes:
        labels: N.
        probabilities: N×classes, by ERM.
        predictions: model → N, classes; `ERM`, `NULL` and the candidates.
        resampled: accuracy of the worst class, in [0, 1], on images that are resampled;
            a row for the masks of each candidate, a column for each model.
        resampled_images: how many images each of these rows is of.
        hidden: candidate → mean share of the image that its masks hide.
    """

    labels: Tensor
    probabilities: Tensor
    predictions: dict[str, Tensor]
    resampled: pd.DataFrame
    resampled_images: int
    hidden: dict[str, float]

    @property
    def is_mistake(self) -> Tensor:
        """N, whether ERM's prediction is wrong."""
        return self.predictions[ERM] != self.labels

    def accuracy(self, members: Tensor) -> dict[str, float]:
        """Accuracy of each model, in [0, 1], on some of the images: N, bool."""
        labels = self.labels[members]
        shares = {}
        for model, predictions in self.predictions.items():
            is_right = predictions[members] == labels
            shares[model] = is_right.double().mean().item()
        return shares


@dataclass(frozen=True)
class Verdict:
    """What held-out images say.

    Attributes:
        chosen: a candidate; or `ERM`, which is then kept.
        reason: in a few sentences.
        accuracy: see `environments`.
        distances: see `distances`; the best is that of the models that are left.
        left: see `strike_out`.
    """

    chosen: str
    reason: str
    accuracy: pd.DataFrame
    distances: pd.DataFrame
    left: list[str]


def environments(held_out: HeldOut) -> tuple[pd.DataFrame, pd.Series]:
    """Accuracy of each model in each environment, and of how many images it is.

    The environments are the images that the masks of each candidate resample, of which
    the worst class counts; `rest`; and `mistakes`, of ERM, if there are any.

    Returns:
        Environments in rows, models in columns, in [0, 1]; and environment → number.
    """
    accuracy = held_out.resampled.copy()
    num_classes = held_out.probabilities.shape[1]
    counts = pd.Series(held_out.resampled_images / num_classes, accuracy.index)
    is_mistake = held_out.is_mistake
    for name, members in {"rest": ~is_mistake, "mistakes": is_mistake}.items():
        if members.any():
            accuracy.loc[name] = held_out.accuracy(members)
            counts[name] = int(members.sum())
    return accuracy, counts


def distances(accuracy: pd.DataFrame, left: list[str], before: float) -> pd.DataFrame:
    """How far each model is behind the best one in each environment, less a discount.

    Args:
        accuracy: see `environments`.
        left: the models that set the bar.
        before: accuracy of ERM's worst class on the images as they are. What even the
            best model loses against it, on resampled images, counts `COST` times.
    """
    best = accuracy[left].max(axis=1)
    lost = (before - best).clip(lower=0)
    lost[lost.index.isin(["rest", "mistakes"])] = 0.0
    return (-accuracy).add(best - COST * lost, axis=0)


def strike_out(accuracy: pd.DataFrame, before: float) -> list[str]:
    """The good models: none of them is `BEHIND` the best of them in any environment.

    The model that falls furthest behind is struck out, and another, until none is so
    far behind. One that relies on the shortcut can be the best where masks hide the
    evidence alone; once struck out, it no longer sets the bar.

    Args:
        accuracy: see `environments`.
        before: see `distances`.
    """
    left = list(accuracy)
    while True:
        shortfalls = distances(accuracy, left, before)[left].max()
        if shortfalls.max() < BEHIND:
            return left
        left.remove(shortfalls.idxmax())


def propose(behind: pd.DataFrame, errors: pd.DataFrame, hidden: dict) -> str:
    """Of the candidates that fall least behind, the one that hides least.

    These are within one standard error of the smallest shortfall: that of the best
    candidate where it is furthest behind, the largest if there are several such
    environments.

    Args:
        behind: see `distances`; of the candidates that are left.
        errors: the standard error of each accuracy.
        hidden: see `HeldOut`.
    """
    shortfalls = behind.max()
    best = shortfalls.idxmin()
    is_furthest = behind[best] == shortfalls[best]
    limit = shortfalls[best] + errors.loc[is_furthest, best].max()
    near = shortfalls.index[shortfalls <= limit]
    return min(near, key=hidden.get)


def judge(held_out: HeldOut, describe: dict[str, str]) -> Verdict:
    """Propose a candidate, and take it if ERM is seen to rely on what it hides.

    One of the candidates that are left is proposed, see `propose`. If ERM is sure of
    enough mistakes, it is taken if most of them are right with it, and more than with
    nothing masked, and refused if most are wrong, both by the 95 % interval (Wilson).
    Else it is taken if ERM, and the model with nothing masked, are `BEHIND` on some of
    the resampled images.

    Args:
        held_out: predictions.
        describe: candidate → its rule in words.
    """
    from scipy.stats import binomtest  # takes a second

    accuracy, counts = environments(held_out)
    before = evaluation.worst_class(held_out.probabilities, held_out.labels)
    left = strike_out(accuracy, before)
    behind = distances(accuracy, left, before)
    verdict = partial(Verdict, accuracy=accuracy, distances=behind, left=left)
    good = [name for name in held_out.resampled.index if name in left]
    reason = _mistakes_in_words(held_out)
    if not good:
        return verdict(ERM, f"{reason} All candidates fall far behind: ERM is kept.")

    errors = (accuracy * (1 - accuracy)).div(counts, axis=0) ** 0.5
    proposal = propose(behind[good], errors, held_out.hidden)
    models = accuracy.shape[1]
    reason += (
        f" {models - len(left)} of {models} models fall {100 * BEHIND:.0f} points or "
        "more behind and "
        "are struck out. Of the candidates that then fall least behind, "
        f"{describe[proposal]} hides least."
    )
    is_sure = held_out.is_mistake & (held_out.probabilities.amax(1) > SURE)
    count = int(is_sure.sum())
    if count >= FEW:
        shares = held_out.accuracy(is_sure)
        right = round(count * shares[proposal])
        interval = binomtest(right, count).proportion_ci(method="wilson")
        reason += (
            f" ERM is sure of {count} of its mistakes. {right} of these are right now "
            f"(95 % interval {100 * interval.low:.0f}–{100 * interval.high:.0f} %), "
            f"and {round(count * shares[NULL])} with nothing masked"
        )
        if interval.high < 0.5:
            return verdict(ERM, f"{reason}: most stay wrong, and ERM is kept.")
        if interval.low > max(0.5, shares[NULL]):
            return verdict(proposal, f"{reason}, so it is taken.")
        reason += "."
    resampled = behind.loc[held_out.resampled.index]
    of_erm = resampled[ERM].max()
    of_null = resampled[NULL].max()
    reason += (
        f" Where masks resample images, ERM is up to {100 * of_erm:.1f} points behind, "
        f"and with nothing masked {100 * of_null:.1f}"
    )
    if min(of_erm, of_null) < BEHIND:
        little = "that does not show that ERM relies on what is hidden, so it is kept"
        return verdict(ERM, f"{reason}: {little}.")
    relies = "ERM relies on what is hidden, so it is taken"
    return verdict(proposal, f"{reason}: {relies}.")


def _mistakes_in_words(held_out: HeldOut) -> str:
    """How many mistakes ERM makes; and whether it should be trained longer first."""
    mistakes = int(held_out.is_mistake.sum())
    images = f"{len(held_out.labels):,} training images"
    words = (
        f"{mistakes} of {images} are predicted wrongly by ERM models that have not "
        "seen them."
    )
    if mistakes:
        share = held_out.accuracy(held_out.is_mistake)[NULL]
        if share > 0.5:
            words += (
                f" With nothing masked, the same fine-tuning gets {share:.0%} of these "
                "right: train longer first."
            )
    return words
