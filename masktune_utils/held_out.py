"""What models predict for training images that they have not seen.

Two ERM models are trained, each on one half of the training images, a fold. Both are
fine-tuned with the masks of each candidate, and with nothing masked. All these models
predict the images of the other fold, as they are and resampled by masks.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import joblib
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import data, metrics, progress
from masktune_utils.data import Split
from masktune_utils.masking import (
    NOTHING,
    Explain,
    Finetune,
    Fit,
    MaskedDataset,
    Rule,
    masktune,
)
from masktune_utils.saliency import saliency_maps

ERM = "ERM"
NULL = f"{NOTHING}"  # ERM fine-tuned like the candidates, on the images as they are
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
        mistake_map: h×w, where ERM's mistakes come from, see `metrics.exchange_map`;
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
    def worst_class(self) -> float:
        """Accuracy of ERM in its worst class, on the images as they are."""
        return self.is_right[ERM].groupby(self.labels).mean().min()

    @property
    def kinds(self) -> pd.DataFrame:
        """Accuracy of each model on each kind of mistake: (class, ERM's prediction).

        The last column, `images`, has their number.
        """
        mistakes = self.is_right[self.is_mistake]
        by_kind = mistakes.groupby([self.labels, self.predictions[ERM]])
        return by_kind.mean().assign(images=by_kind.size())

    def to_arrays(self) -> dict[str, np.ndarray]:
        """As arrays without objects, to be saved by `np.savez`."""
        arrays = {
            "models": np.array(self.predictions.columns, str),
            "candidates": np.array(self.hidden.index, str),
        }
        for name, part in vars(self).items():
            arrays[name] = np.asarray(part)
        arrays["predictions"] = arrays["predictions"].astype(np.int16)
        arrays["place"] = arrays["place"].astype(str)
        return arrays

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
    fit: Fit,
    finetune: Finetune,
    candidates: Sequence[Rule],
    jobs: int = 1,
    explain: Explain = saliency_maps,
    seed: int = 0,
    folder: Path | None = None,
) -> tuple[HeldOut, dict[str, MaskedDataset]]:
    """Train the models of both folds, and let them predict what they have not seen.

    Args:
        train: the training images; only these and their classes are used.
        fit: training images → a new network trained on them. It is called once for each
            fold, and must not start from a network that has seen these images.
        finetune: (a copy of a network, masked images) → the network, fine-tuned.
        candidates: how masks are made; each round of a rule is a candidate.
        jobs: 1, or 2 for a process for each fold.
        explain: (network, images, labels) → maps N×h×w; not called if all candidates
            are by exchange, in one round.
        seed: of the folds, and of the partners of resampled images.
        folder: where networks are saved, so that a second call goes on where the first
            was stopped. Other images or another seed start anew; if `fit` or `finetune`
            changes, delete it. Loading a network runs code: use a folder of your own.

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
    folds = data.folds(train.labels, seed)
    parts = [train[index] for index in folds]
    run = Parallel(min(jobs, 2))
    trained = run(
        delayed(_train)(fold, other, fit, finetune, candidates, explain, seed, folder)
        for fold, other in (parts, parts[::-1])
    )
    (first, first_masks, first_map), (second, second_masks, second_map) = trained
    if _trained_weights(first[ERM]) & _trained_weights(second[ERM]):
        raise ValueError(
            "fit returned the same network twice; allowed: a new one for each fold."
        )
    order = torch.cat(folds).argsort()
    masked = {}
    for rule in (NOTHING, *candidates):
        earlier = None
        for of_round in rule.each_round:
            name = f"{of_round}"
            own_masks = torch.cat([first_masks[name], second_masks[name]])[order]
            if earlier is not None and torch.equal(own_masks, earlier):
                break  # the rounds of both folds have ended
            masked[name] = MaskedDataset(
                train, own_masks, rule.fill, seed, rule=of_round
            )
            earlier = own_masks
    _, *names = masked
    predicted = run(
        delayed(_predict)(
            fold,
            [networks[name] for name in (ERM, *masked)],
            [masks[name] for name in names],
            seed,
        )
        for fold, networks, masks in (
            (parts[0], second, first_masks),
            (parts[1], first, second_masks),
        )
    )
    mistake_map = (first_map + second_map) / 2
    return _hold_out(predicted, order, masked, mistake_map), masked


def _trained_weights(network: nn.Module) -> set[nn.Parameter]:
    """The weights that training may change."""
    return {weight for weight in network.parameters() if weight.requires_grad}


def _train(
    fold: Split,
    other: Split,
    fit: Fit,
    finetune: Finetune,
    candidates: Sequence[Rule],
    explain: Explain,
    seed: int,
    folder: Path | None,
) -> tuple[dict[str, nn.Module], dict[str, Tensor], Tensor]:
    """All networks of a fold, and their masks of its images, but for `ERM`.

    Also where ERM's mistakes on the other fold come from. Where rounds end early, the
    last one is repeated.
    """
    if folder is not None:
        images = [part.cpu().numpy() for part in (fold.images, fold.labels)]
        folder = Path(folder) / joblib.hash([images, seed])

    def tune(network: nn.Module, masked: MaskedDataset) -> nn.Module:
        return _load_or_train(folder, f"{masked.rule}", finetune, network, masked)

    network = _load_or_train(folder, ERM, fit, fold)
    logits = metrics.predict(network, fold[:2])
    classes = len(fold.labels.bincount())
    if logits.shape[1] < classes or not logits.isfinite().all():
        raise ValueError(
            f"the trained network predicts {logits.tolist()} for two images; allowed: "
            f"a finite number for each of {classes} classes."
        )
    of_other = metrics.predict(network, other).argmax(1)
    mistake_map = metrics.exchange_map(network, other, of_other, seed)
    exchanged = mistake_map.clamp(min=0).expand(len(fold), -1, -1)
    maps = exchanged
    if not all(rule.exchange for rule in candidates):
        maps = explain(network, fold.images, fold.labels)
    networks = {ERM: network}
    masks = {}
    bar = progress.bar((NOTHING, *candidates))
    for rule in bar:
        start = exchanged if rule.exchange else maps
        rounds = masktune(network, fold, rule, tune, start, explain, seed)
        latest = None
        for of_round in rule.each_round:
            name = f"{of_round}"
            bar.set_description(name)
            latest = next(rounds, latest)
            tuned, masked = latest
            networks[name] = tuned
            masks[name] = masked.own_masks
    return networks, masks, mistake_map


def _load_or_train(
    folder: Path | None, name: str, train: Callable, *arguments: Any
) -> nn.Module:
    """The network that is saved under a name; it is trained first if there is none."""
    path = folder and folder / f"{name}.pt"
    if path and path.exists():
        return torch.load(path, weights_only=False)
    network = train(*arguments)
    if not isinstance(network, nn.Module):
        kind = "fit" if name == ERM else "finetune"
        raise TypeError(f"{kind} returned {network!r}; allowed: the trained network.")
    if path:
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        torch.save(network, unfinished)
        unfinished.replace(path)
    return network


def _predict(
    fold: Split, networks: list[nn.Module], masks: list[Tensor], seed: int
) -> tuple[Tensor, ...]:
    """Let the models of the other fold predict a fold, as it is and resampled.

    Args:
        fold: the images.
        networks: of the other fold; ERM is the first.
        masks: of this fold, by each candidate; these resample it.
        seed: of the images that are resampled, and of their partners.

    Returns:
        The predicted classes, N×models; which images are explained, N×candidates; for
        the images that are resampled, their labels, and whether they are right,
        candidates×images×models.
    """
    erm = networks[0]
    predicted = _classes(networks, fold)
    of_erm = predicted[:, 0]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(fold), generator=generator)
    labels = fold.labels.cpu()[order]
    is_drawn = torch.arange(len(fold)) < SAMPLE
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        is_drawn[members[:LEAST]] = True
    sample = order[is_drawn]
    labels = labels[is_drawn]
    explained = []
    right = []
    for own_masks in progress.bar(masks, desc="predicting"):
        explained.append(metrics.explained(erm, fold, own_masks, of_erm, seed))
        resampled = MaskedDataset(fold[sample], own_masks[sample], "resample", seed)
        right.append(_classes(networks, resampled) == labels[:, None])
    return predicted, torch.stack(explained, 1), labels, torch.stack(right)


def _classes(networks: list[nn.Module], images: Split | MaskedDataset) -> Tensor:
    """What the networks predict, N×networks."""
    classes = [metrics.predict(network, images).argmax(1) for network in networks]
    return torch.stack(classes, 1)


def _hold_out(
    predicted: list[tuple],
    order: Tensor,
    masked: dict[str, MaskedDataset],
    mistake_map: Tensor,
) -> HeldOut:
    """What is predicted for both folds, as one.

    Args:
        predicted: of each fold, see `_predict`.
        order: of the training images in the folds, one after the other.
        masked: see `Choice.candidates`.
        mistake_map: see `HeldOut`.
    """
    predictions, explained, labels, right = zip(*predicted, strict=True)
    labels = torch.cat(labels)
    right = torch.cat(right, 1).double()
    by_class = [right[:, labels == label].mean(1) for label in labels.unique()]
    _, *names = masked
    hidden = []
    place = []
    for name in names:
        mean_mask = masked[name].own_masks.mean(0, dtype=torch.float32)
        hidden.append(mean_mask.mean().item())
        ninths = F.adaptive_avg_pool2d(mean_mask[None], 3)
        place.append(PLACES[ninths.argmax()])
    arrays = {
        "models": [ERM, *masked],
        "candidates": names,
        "labels": masked[NULL].labels.cpu(),
        "predictions": torch.cat(predictions)[order],
        "explained": torch.cat(explained)[order],
        "resampled": torch.stack(by_class).amin(0),
        "smallest_class": labels.bincount().min(),
        "hidden": hidden,
        "place": place,
        "mistake_map": mistake_map,
    }
    return HeldOut.from_arrays({name: np.asarray(arrays[name]) for name in arrays})
