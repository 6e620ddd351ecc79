"""What models predict for training images that they have not seen.

Two ERM models are trained, each on one half of the training images, a fold. Both are
fine-tuned with the masks of each candidate, and with nothing masked. All these models
predict the images of the other fold, as they are and resampled by masks.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import data, metrics, progress
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset, Rule, masktune
from masktune_utils.saliency import exchange_map, saliency_maps

ERM = "ERM"
NULL = "nothing masked"  # ERM fine-tuned like the candidates, on the images as they are
NOTHING = Rule("threshold", math.inf, "nearest")
# Of each fold this many images are resampled, and of each class at least LEAST, if
# there are as many.
SAMPLE = 1000
LEAST = 50
PLACES = (  # ninths of the image, row by row
    "top left",
    "top",
    "top right",
    "left",
    "centre",
    "right",
    "bottom left",
    "bottom",
    "bottom right",
)


@dataclass(frozen=True, eq=False)
class HeldOut:
    """What models predict for training images that they have not seen.

    Attributes:
        labels: N.
        predictions: N rows, a column for each model: `ERM`, `NULL`, the candidates.
        explained: N rows, a column for each candidate: whether the image is a mistake
            of ERM that becomes right whenever the part that the masks hide comes from
            another image of its class.
        resampled: accuracy of the worst class, in [0, 1], on resampled images; a row
            for the masks of each candidate, a column for each model.
        smallest_class: number of images of the smallest class among these.
        hidden: candidate → mean share of the image that its masks hide.
        place: candidate → one of `PLACES`, where they hide most.
        mistake_map: h×w, where ERM's mistakes come from, see `saliency.exchange_map`;
            the mean of both folds.
    """

    labels: pd.Series
    predictions: pd.DataFrame
    explained: pd.DataFrame
    resampled: pd.DataFrame
    smallest_class: int
    hidden: pd.Series
    place: pd.Series
    mistake_map: np.ndarray

    @property
    def is_right(self) -> pd.DataFrame:
        """N rows, a column for each model."""
        return self.predictions.eq(self.labels, axis=0)

    @property
    def is_mistake(self) -> pd.Series:
        """N, whether ERM is wrong."""
        return ~self.is_right[ERM]

    @property
    def kinds(self) -> pd.DataFrame:
        """Accuracy of each model on each kind of mistake: (class, ERM's prediction).

        The last column, `images`, has their number.
        """
        kind = [self.labels, self.predictions[ERM]]
        kind = [part[self.is_mistake].rename("") for part in kind]
        by_kind = self.is_right[self.is_mistake].groupby(kind)
        return by_kind.mean().assign(images=by_kind.size())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As arrays without objects, to be saved by `np.savez`."""
        return {
            "models": np.array(self.predictions.columns, str),
            "candidates": np.array(self.hidden.index, str),
            "labels": self.labels.to_numpy(),
            "predictions": self.predictions.to_numpy(np.int16),
            "explained": self.explained.to_numpy(),
            "resampled": self.resampled.to_numpy(),
            "smallest_class": np.array(self.smallest_class),
            "hidden": self.hidden.to_numpy(),
            "place": np.array(self.place, str),
            "mistake_map": self.mistake_map,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Self:
        """What `to_arrays` gave."""
        models = arrays["models"]
        candidates = arrays["candidates"]
        return cls(
            labels=pd.Series(arrays["labels"]),
            predictions=pd.DataFrame(arrays["predictions"], columns=models),
            explained=pd.DataFrame(arrays["explained"], columns=candidates),
            resampled=pd.DataFrame(arrays["resampled"], candidates, models),
            smallest_class=arrays["smallest_class"].item(),
            hidden=pd.Series(arrays["hidden"], candidates),
            place=pd.Series(arrays["place"], candidates),
            mistake_map=arrays["mistake_map"],
        )


def collect(
    train: Split,
    fit: Callable[[Split], nn.Module],
    finetune: Callable[[nn.Module, MaskedDataset], nn.Module],
    candidates: Sequence[Rule],
    jobs: int = 1,
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor] = saliency_maps,
    seed: int = 0,
) -> tuple[HeldOut, dict[str, MaskedDataset]]:
    """Train the models of both folds, and let them predict what they have not seen.

    Args:
        train: the training images; only these and their classes are used.
        fit: training images → a new network trained on them. It is called once for each
            fold, and must not start from a network that has seen these images.
        finetune: (a copy of a network, masked images) → the network, fine-tuned.
        candidates: how masks are made; each round of a rule is a candidate.
        jobs: 1, or 2 for a process for each fold.
        explain: (network, images, labels) → maps N×h×w.
        seed: of the folds, and of the partners of resampled images.

    Returns:
        The predictions; and `NULL` and each candidate → the training images with the
        masks.

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
    counts = train.labels.bincount()
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"the classes 0, 1, … have {counts.tolist()} images; allowed: 2 classes or "
            "more, of 2 images or more each."
        )
    if not candidates:
        raise ValueError("there are 0 candidates; allowed: 1 or more.")
    parts = data.folds(train.labels, seed)
    folds = [train[index] for index in parts]
    run = Parallel(min(jobs, 2))
    first, second = run(
        delayed(_train)(fold, fit, finetune, candidates, explain, seed)
        for fold in folds
    )
    if _trained_weights(first[ERM]) & _trained_weights(second[ERM]):
        raise ValueError(
            "fit returned the same network twice; allowed: a new one for each fold."
        )
    order = torch.cat(parts).argsort()
    masked = {}
    for rule in (NOTHING, *candidates):
        earlier = None
        for name in _names(rule):
            own_masks = torch.cat([first[name].masks, second[name].masks])[order]
            if earlier is not None and torch.equal(own_masks, earlier):
                break  # the rounds of both folds have ended
            masked[name] = MaskedDataset(train, own_masks, rule.fill, seed)
            earlier = own_masks
    names = [ERM, *masked]
    predicted = run(
        delayed(_predict)(fold, names, own, others, seed)
        for fold, own, others in ((folds[0], first, second), (folds[1], second, first))
    )
    return _hold_out(predicted, order, masked), masked


class _Model(NamedTuple):
    """A network that is trained on a fold, and the masks of the images of this fold."""

    network: nn.Module
    masks: Tensor


def _trained_weights(model: _Model) -> set[int]:
    """Identity of the weights of its network that training may change."""
    return {id(weight) for weight in model.network.parameters() if weight.requires_grad}


def _names(rule: Rule) -> list[str]:
    """Of the models of the rounds of a rule."""
    return [NULL] if rule is NOTHING else [f"{part}" for part in rule.each_round]


def _train(
    fold: Split,
    fit: Callable,
    finetune: Callable,
    candidates: Sequence[Rule],
    explain: Callable,
    seed: int,
) -> dict[str, _Model]:
    """All models of a fold. Where rounds end early, the last one is repeated."""
    network = fit(fold)
    if not isinstance(network, nn.Module):
        raise TypeError(f"fit returned {network!r}; allowed: the trained network.")
    logits = metrics.predict(network, fold[:2])
    classes = len(fold.labels.bincount())
    if logits.shape[1] < classes or not logits.isfinite().all():
        raise ValueError(
            f"the trained network predicts {logits.tolist()} for two images; allowed: "
            f"a finite number for each of {classes} classes."
        )
    maps = explain(network, fold.images, fold.labels)
    models = {ERM: _Model(network, torch.zeros(0))}
    for rule in progress.bar((NOTHING, *candidates), desc="fine-tuning"):
        rounds = masktune(network, fold, rule, finetune, maps, explain, seed)
        latest = None
        for name in _names(rule):
            tuned, masked = latest = next(rounds, latest)
            if not isinstance(tuned, nn.Module):
                raise TypeError(f"finetune returned {tuned!r}; allowed: the network.")
            models[name] = _Model(tuned, masked.own_masks)
    return models


def _predict(
    fold: Split,
    names: list[str],
    own: dict[str, _Model],
    others: dict[str, _Model],
    seed: int,
) -> tuple[pd.DataFrame, Tensor]:
    """Let the models of the other fold predict a fold, as it is and resampled.

    Args:
        fold: the images.
        names: of the models: `ERM`, `NULL`, the candidates.
        own: the models of this fold, whose masks resample it.
        others: those of the other fold.
        seed: of the images that are resampled, and of their partners.

    Returns:
        A row for each image; `label`; (`predicted`, model); (`explained`, candidate);
        and (candidate, model): whether it is right where the masks resample the image,
        NaN for images that are not resampled. Then, where ERM's mistakes come from.
    """
    networks = {name: others[name].network for name in names}
    predicted = {}
    for name, network in networks.items():
        predicted[name] = metrics.predict(network, fold).argmax(1)
    columns = {("label", ""): fold.labels.cpu().numpy()}
    for name, classes in predicted.items():
        columns["predicted", name] = classes.numpy()
    erm = networks[ERM]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(fold), generator=generator)
    labels = pd.Series(fold.labels.cpu()[order])
    is_drawn = (labels.index < SAMPLE) | (labels.groupby(labels).cumcount() < LEAST)
    sample = order[torch.tensor(is_drawn.to_numpy())]
    for candidate in progress.bar(names[2:], desc="predicting"):
        masks = own[candidate].masks
        is_explained = metrics.explained(erm, fold, masks, predicted[ERM], seed)
        columns["explained", candidate] = is_explained.numpy()
        resampled = MaskedDataset(fold[sample], masks[sample], "resample", seed)
        for name, network in networks.items():
            logits = metrics.predict(network, resampled)
            is_right = torch.full((len(fold),), torch.nan, dtype=torch.float64)
            is_right[sample] = metrics.is_right(logits, resampled.labels).double()
            columns[candidate, name] = is_right.numpy()
    mistake_map = exchange_map(erm, fold.images, fold.labels, predicted[ERM], seed)
    return pd.DataFrame(columns), mistake_map


def _hold_out(
    predicted: list[tuple], order: Tensor, masked: dict[str, MaskedDataset]
) -> HeldOut:
    """What is predicted for both folds, as one.

    Args:
        predicted: of each fold, see `_predict`.
        order: of the training images in the folds, one after the other.
        masked: see `Choice.candidates`.
    """
    tables, mistake_maps = zip(*predicted, strict=True)
    table = pd.concat(tables).iloc[order.numpy()].reset_index(drop=True)
    resampled = {}
    hidden = {}
    place = {}
    for name, dataset in masked.items():
        if name == NULL:
            continue
        is_right = table[name].dropna()
        by_class = is_right.groupby(table["label"])
        resampled[name] = by_class.mean().min()
        mean_mask = dataset.own_masks.mean(0, dtype=torch.float32)
        hidden[name] = mean_mask.mean().item()
        ninths = F.adaptive_avg_pool2d(mean_mask[None], 3)
        place[name] = PLACES[ninths.argmax()]
    return HeldOut(
        labels=table["label"],
        predictions=table["predicted"],
        explained=table["explained"],
        resampled=pd.DataFrame(resampled).T,
        smallest_class=int(by_class.size().min()),
        hidden=pd.Series(hidden),
        place=pd.Series(place),
        mistake_map=torch.stack(mistake_maps).mean(0).numpy(),
    )
