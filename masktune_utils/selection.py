"""Choosing a mask without group labels: a good model is never far behind the best.

Two base models are trained, each on a fold with half of the training images, and each
candidate fine-tunes both. All models then predict the images of the fold that they have
not seen, in several environments: the images that ERM gets wrong, the rest, and, for
the masks of each candidate, the images with the hidden part taken from another image.
Models that fall far behind the best one in any of these are struck out, one at a time.
ERM is kept unless the mistakes that it is sure of, or the resampled images, show that
it relies on what the mask hides. Only training images and their classes are used.

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024); such groups to
choose by: uLA (Tsirigotis et al., 2023); regret over environments: Agarwal and Zhang,
2022 (arXiv 2202.05436). Using them to choose masks is ours.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import data, metrics, progress, training
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset, Rule, masktune
from masktune_utils.saliency import saliency_maps

# What even the best model loses on resampled images counts this many times: where the
# masks hide the evidence too, distances decide nothing.
COST = 3
# Mistakes of which ERM is sure, by its probability, can prove or refute a candidate ...
SURE = 0.95
# ... if there are at least this many.
FEW = 10
# A good model is nowhere this far behind the best; ERM is, if it relies on a shortcut.
BEHIND = 0.1
ERM = "ERM"
NULL = "nothing masked"  # ERM fine-tuned like the candidates, on the images as they are
NOTHING = Rule("threshold", 1.0, "nearest")  # no value of a map is above 1
# At most this many images of each fold are resampled.
SAMPLE = 1000
FINE_MAP = 8  # cells a side; a map with fewer is coarse
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6


_RULE = Rule("mean_std", fill="resample")
# From few pixels, widely dilated, to many. Each round is a candidate.
CANDIDATES = (
    replace(_RULE, param=4.0, dilation=3, rounds=2),
    replace(_RULE, param=3.0, dilation=4, rounds=2),
    replace(_RULE, param=2.0, dilation=2),
    replace(_RULE, param=1.0, dilation=1, shared=True, rounds=2),
    replace(_RULE, param=2.0, dilation=2, shared=True, rounds=5),
)
COARSE_CANDIDATES = (
    replace(_RULE, param=1.5, rounds=2),
    replace(_RULE, param=1.0, rounds=2),
    replace(_RULE, param=0.5),
)


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
        return {
            model: (predictions[members] == labels).double().mean().item()
            for model, predictions in self.predictions.items()
        }


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


def judge(held_out: HeldOut) -> Verdict:
    """Propose a candidate, and take it if ERM is seen to rely on what it hides.

    One of the candidates that are left is proposed, see `propose`. If ERM is sure of
    enough mistakes, it is taken if most of them are right with it, and more than with
    nothing masked, and refused if most are wrong, both by the 95% interval (Wilson).
    Else it is taken if ERM, and the model with nothing masked, are `BEHIND` on some of
    the resampled images.

    Args:
        held_out: predictions.
    """
    accuracy, counts = environments(held_out)
    before = metrics.worst_class(held_out.probabilities, held_out.labels)
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
        f"{proposal} hides least."
    )
    is_sure = held_out.is_mistake & (held_out.probabilities.amax(1) > SURE)
    count = int(is_sure.sum())
    if count >= FEW:
        shares = held_out.accuracy(is_sure)
        right = round(count * shares[proposal])
        low, high = metrics.interval(right, count)
        reason += (
            f" ERM is sure of {count} of its mistakes. {right} of these are right now "
            f"(95% interval {100 * low:.0f}–{100 * high:.0f}%), "
            f"and {round(count * shares[NULL])} with nothing masked"
        )
        if high < 0.5:
            return verdict(ERM, f"{reason}: most stay wrong, and ERM is kept.")
        if low > max(0.5, shares[NULL]):
            return verdict(proposal, f"{reason}, so it is taken.")
        reason += "."
    resampled = behind.loc[held_out.resampled.index].clip(lower=0)
    of_erm = resampled[ERM].max()
    of_null = resampled[NULL].max()
    reason += (
        f" Where masks resample images, ERM is up to {100 * of_erm:.1f} points behind, "
        f"and with nothing masked {100 * of_null:.1f}"
    )
    if min(of_erm, of_null) < BEHIND:
        reason += (
            ": that does not show that ERM relies on what is hidden, so it is kept."
        )
        return verdict(ERM, reason)
    reason += ": ERM relies on what is hidden, so it is taken."
    return verdict(proposal, reason)


def _mistakes_in_words(held_out: HeldOut) -> str:
    """How many mistakes ERM makes; and whether it should be trained longer first."""
    mistakes = int(held_out.is_mistake.sum())
    words = (
        f"{mistakes} of {len(held_out.labels):,} training images are predicted wrongly "
        "by ERM models that have not seen them."
    )
    right = held_out.accuracy(held_out.is_mistake)[NULL]
    if mistakes and right > 0.5:
        words += (
            f" With nothing masked, the same fine-tuning gets {right:.0%} of these "
            "right: train longer first."
        )
    return words


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        verdict: what held-out images say.
        masked: the training images with the masks that were judged; nothing is hidden
            if ERM is kept.
        is_mistake: N, bool: training images that the ERM model of the other fold gets
            wrong.
        schedule: how candidates were fine-tuned.
    """

    verdict: Verdict
    masked: MaskedDataset
    is_mistake: Tensor
    schedule: Callable[[nn.Module, MaskedDataset], nn.Module]

    @property
    def reason(self) -> str:
        """In a few sentences."""
        return self.verdict.reason

    @property
    def is_kept(self) -> bool:
        """Whether ERM is kept."""
        return self.verdict.chosen == ERM

    @property
    def masks(self) -> Tensor:
        """N×H×W, bool."""
        return self.masked.own_masks

    @property
    def table(self) -> pd.DataFrame:
        """The models: accuracy in %, and how many points they fall behind.

        `resampled` is the worst class where masks resample images.
        """
        accuracy = 100 * self.verdict.accuracy.T
        table = accuracy.filter(["mistakes", "rest"])
        return table.assign(
            resampled=accuracy.drop(columns=table.columns).min(axis=1),
            behind=100 * self.verdict.distances.max(),
            chosen=table.index == self.verdict.chosen,
        )

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept."""
        tuned = copy.deepcopy(network)
        return tuned if self.is_kept else self.schedule(tuned, self.masked)


def fine_tune(
    network: nn.Module, masked: MaskedDataset, epochs: int = 1, batch_size: int = 32
) -> nn.Module:
    """Our schedule: small batches, and a rate that falls from 0.02 to 0."""
    training.train(
        network,
        masked,
        epochs=epochs,
        batch_size=batch_size,
        lr=0.02,
        schedule="linear",
        seed=masked.seed,
    )
    return network


def default_schedule(count: int, is_coarse: bool) -> dict[str, int]:
    """Batch size and epochs of `fine_tune`, for a number of training images."""
    batch_size = 16 if is_coarse else 32
    epochs = min(MOST_EPOCHS, math.ceil(STEPS * batch_size / count))
    return {"batch_size": batch_size, "epochs": epochs}


def choose(
    train: Split,
    fit: Callable[[Split], nn.Module],
    finetune: Callable[[nn.Module, MaskedDataset], nn.Module] | None = None,
    candidates: Sequence[Rule] | None = None,
    jobs: int = 1,
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor] = saliency_maps,
    seed: int = 0,
) -> Choice:
    """Choose a mask for training images on held-out ones, or keep ERM.

    Args:
        train: the training images; only these and their classes are used.
        fit: training images → a new network trained on them. It is called once for each
            fold, and must not start from a network that has seen these images.
        finetune: (a copy of a network, masked images) → the network, fine-tuned; by
            default our `fine_tune`.
        candidates: how masks are made; each round of a rule is a candidate. By default
            `CANDIDATES`, or for coarse maps `COARSE_CANDIDATES`.
        jobs: how many processes.
        explain: (network, images, labels) → maps N×h×w.
        seed: of the folds, and of the partners of resampled images.

    Raises:
        TypeError: `fit` or `finetune` returns no network.
        ValueError: there is one class, or one with a single image; or `fit` returns the
            same network twice.
    """
    counts = train.labels.unique(return_counts=True)[1]
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"classes have {counts.tolist()} images; allowed: 2 classes or more, of 2 "
            "images or more each."
        )
    parts = data.folds(train.labels, seed)
    folds = [replace(train[index], fold=number) for number, index in enumerate(parts)]
    calls = [(fit, explain, fold) for fold in folds]
    bases = _run(jobs, _fit, calls, "ERM of both folds")
    first, second = [next(base.network.parameters()) for base in bases]
    if first is second:  # also in a wrapper of its own
        raise ValueError(
            "fit returned the same network twice; allowed: a new one for each fold."
        )
    is_coarse = min(bases[0].maps.shape[1:]) < FINE_MAP
    if candidates is None:
        candidates = COARSE_CANDIDATES if is_coarse else CANDIDATES
    schedule = finetune or partial(fine_tune, **default_schedule(len(train), is_coarse))

    rules = (NOTHING, *candidates)
    calls = []
    for rule in rules:
        for base, fold in zip(bases, folds, strict=True):
            calls.append((base, fold, rule, schedule, explain, seed))
    outcomes = _run(jobs, _fine_tune, calls, "fine-tuning")
    models = {ERM: bases}
    rule_of = {}
    for rule, first, second in zip(rules, outcomes[::2], outcomes[1::2], strict=True):
        for number in range(max(len(first), len(second))):
            this_round = replace(rule, rounds=number + 1)
            name = NULL if rule is NOTHING else str(this_round)
            rule_of[name] = this_round
            # The other fold may have ended before: this round would repeat its last.
            models[name] = [first[: number + 1][-1], second[: number + 1][-1]]
    held_out = _predict_held_out(models, folds, jobs, seed)
    verdict = judge(held_out)

    order = torch.cat(parts).argsort()
    rule = rule_of.get(verdict.chosen, NOTHING)
    chosen = models[NULL if verdict.chosen == ERM else verdict.chosen]
    own_masks = torch.cat([model.maps for model in chosen])[order]
    masked = MaskedDataset(train, own_masks, rule.fill, seed, rule=rule)
    return Choice(verdict, masked, held_out.is_mistake[order], schedule)


class _Fitted(NamedTuple):
    """A network of a fold; and its maps, or the masks on which it was fine-tuned."""

    network: nn.Module
    maps: Tensor


def _run(jobs: int, function: Callable, calls: list[tuple], description: str) -> list:
    """Call a function several times, in as many processes as there are jobs."""
    tasks = [delayed(function)(*arguments) for arguments in calls]
    outcomes = Parallel(jobs, return_as="generator")(tasks)
    return list(progress.bar(outcomes, total=len(tasks), desc=description))


def _fit(fit: Callable, explain: Callable, fold: Split) -> _Fitted:
    """The base model of a fold, and its maps."""
    network = fit(fold)
    if not isinstance(network, nn.Module):
        raise TypeError(f"fit returned {network!r}; allowed: the trained network.")
    return _Fitted(network, explain(network, fold.images, fold.labels))


def _fine_tune(
    base: _Fitted,
    fold: Split,
    rule: Rule,
    schedule: Callable,
    explain: Callable,
    seed: int,
) -> list[_Fitted]:
    """The fine-tuned networks of all rounds of a rule on a fold, and their masks."""
    rounds = masktune(base.network, fold, rule, schedule, base.maps, explain, seed)
    outcomes = []
    for network, masked in rounds:
        if not isinstance(network, nn.Module):
            raise TypeError(f"finetune returned {network!r}; allowed: the network.")
        outcomes.append(_Fitted(network, masked.own_masks))
    return outcomes


def _predict_held_out(
    models: dict[str, list[_Fitted]], folds: list[Split], jobs: int, seed: int
) -> HeldOut:
    """Let the models of each fold predict the other fold, as it is and resampled.

    Args:
        models: name → those of both folds; `ERM`, `NULL` and the candidates.
        folds: the images.
        jobs: see `choose`.
        seed: of the images that are resampled, and of their partners.
    """
    candidates = [name for name in models if name not in (ERM, NULL)]
    calls = []
    labels = []
    for number, fold in enumerate(folds):
        generator = torch.Generator().manual_seed(seed)
        sample = torch.randperm(len(fold), generator=generator)[:SAMPLE]
        image_sets = [fold]  # as it is, and as each candidate resamples it
        for name in candidates:
            masks = models[name][number].maps[sample]
            image_sets.append(MaskedDataset(fold[sample], masks, "resample", seed))
        for of_folds in models.values():
            calls.append((of_folds[1 - number].network, image_sets))
        labels.append([images.labels.cpu() for images in image_sets])
    logits = _run(jobs, _predict, calls, "predicting")
    labels = [torch.cat(pair) for pair in zip(*labels, strict=True)]

    predictions = {}
    resampled = {}
    pairs = zip(logits[: len(models)], logits[len(models) :], strict=True)
    for name, pair in zip(models, pairs, strict=True):
        original, *of_masks = [torch.cat(parts) for parts in zip(*pair, strict=True)]
        predictions[name] = original.argmax(1)
        if name == ERM:
            probabilities = original.softmax(1)
        worst = map(metrics.worst_class, of_masks, labels[1:])
        resampled[name] = dict(zip(candidates, worst, strict=True))
    hidden = {}
    for name in candidates:
        masks = torch.cat([model.maps for model in models[name]])
        hidden[name] = masks.float().mean().item()
    return HeldOut(
        labels=labels[0],
        probabilities=probabilities,
        predictions=predictions,
        resampled=pd.DataFrame(resampled),
        resampled_images=len(labels[-1]),
        hidden=hidden,
    )


def _predict(network: nn.Module, image_sets: Sequence) -> list[Tensor]:
    """Logits for each of several sets."""
    return [metrics.predict(network, images) for images in image_sets]
