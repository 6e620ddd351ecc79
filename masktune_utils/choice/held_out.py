"""What models predict for training images that they have not seen, mask after mask.

Two ERM models are trained, each on one half of the training images, a fold. Each
predicts the other fold; so do its copies that are fine-tuned with nothing masked and
with each mask.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from joblib import Parallel, delayed
from joblib.parallel import get_active_backend
from torch import Tensor, nn

from masktune_utils import data, progress
from masktune_utils.choice.exchange import FEW, exchange_map, explained
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule
from masktune_utils.metrics import predict
from masktune_utils.models import NoMapsError
from masktune_utils.saliency import saliency_maps

# (training images, share of the training) → a new network that is trained on them
Fit = Callable[[Split, float], nn.Module]
# (a copy of a network, masked images) → the network, fine-tuned on these
Finetune = Callable[[nn.Module, MaskedDataset], nn.Module]

ERM = "ERM"
NULL = f"{NOTHING}"  # ERM, fine-tuned like with a mask, on the images as they are
SAMPLE = 1000  # images of each fold that are resampled


@dataclass(eq=False)
class HeldOut:
    """What models predict for training images that they have not seen.

    Attributes:
        labels: N.
        mistake_map: h×w, where ERM's mistakes come from, see `exchange.exchange_map`;
            the mean of both folds.
        predictions: model → N classes; of `ERM`, then of `NULL` and each mask that was
            tried.
        explained: mask → N in [0, 1], how far the mask explains a mistake of ERM, see
            `exchange.explained`; 0 for other images.
        resampled: mask → model → accuracy on images whose hidden part comes from
            another image at random; if ERM makes fewer than `FEW` mistakes.
        mean_masks: mask → H×W in [0, 1], in how many images it covers each pixel.
        has_maps: False if the network gives no maps, so that masks by saliency are left
            out.
        share: of the training, after which these networks were taken.
        masked: `NULL` and mask → all images with it.
    """

    labels: Tensor
    mistake_map: Tensor
    predictions: dict[str, Tensor]
    explained: dict[str, Tensor] = field(default_factory=dict)
    resampled: dict[str, dict[str, float]] = field(default_factory=dict)
    mean_masks: dict[str, Tensor] = field(default_factory=dict)
    has_maps: bool = True
    share: float = 1.0
    masked: dict[str, MaskedDataset] = field(default_factory=dict)

    def is_right(self, model: str) -> Tensor:
        """N, bool."""
        return self.predictions[model] == self.labels

    @property
    def is_mistake(self) -> Tensor:
        """N, whether ERM is wrong."""
        return ~self.is_right(ERM)

    @property
    def tried(self) -> list[str]:
        """The masks that were tried, in order."""
        return [*self.predictions][2:]


class Halves:
    """The two folds, and for each model the two networks that were trained on them.

    Args:
        train: all images.
        seed: of the folds, and of every random choice.
    """

    def __init__(self, train: Split, seed: int) -> None:
        self.train = train
        self.seed = seed
        self.folds = data.folds(train.labels, seed)
        self.parts = [train[members] for members in self.folds]
        self.masked = {}  # model → all images, masked
        self.trained = {}  # model → for each fold, the network trained on it
        self._maps = {}  # model, whether by exchange → maps

    def add(self, model: str, networks: list[nn.Module], made_by: str) -> None:
        """The networks of a model; of a compiled one, that which was compiled."""
        networks = [getattr(network, "_orig_mod", network) for network in networks]
        _check(networks, made_by, self.train)
        self.trained[model] = networks

    def unseen_by(self, model: str) -> list[nn.Module]:
        """For each fold, the network that was trained on the other one."""
        return self.trained[model][::-1]

    def images(self, model: str) -> Sequence[Split | MaskedDataset]:
        """The images of each fold, as the networks were trained on them."""
        if model == ERM:
            return self.parts
        masked = self.masked[model]
        return [
            replace(masked, split=part, own_masks=masked.own_masks[members])
            for part, members in zip(self.parts, self.folds, strict=True)
        ]

    def join(self, of_folds: list[Tensor]) -> Tensor:
        """What both folds have, in the order of all images."""
        return torch.cat(of_folds)[torch.cat(self.folds).argsort()]

    def predict(self, model: str) -> list[Tensor]:
        """The classes of the images of each fold, as they are."""
        return _both(_classes, self.unseen_by(model), self.parts)

    def maps(self, model: str, exchange: bool) -> Tensor:
        """What masks are made of, N×h×w.

        By exchange: the mean of both folds' maps, for all images. Else the saliency of
        each image, by the network that has seen it.
        """
        if (model, exchange) in self._maps:
            return self._maps[model, exchange]
        images = self.images(model)
        if exchange:
            networks = self.unseen_by(model)
            predicted = _both(_classes, networks, images)
            of_folds = _both(exchange_map, networks, images, predicted, seed=self.seed)
            maps = torch.stack(of_folds).mean(0).expand(len(self.train), -1, -1)
        else:
            maps = self.join(_both(_maps, self.trained[model], images))
        self._maps[model, exchange] = maps
        return maps

    def mask(self, rule: Rule) -> MaskedDataset | None:
        """The masks of a rule; None if they hide no more than the round before."""
        before = ERM
        if rule.rounds > 1:
            before = f"{replace(rule, rounds=rule.rounds - 1)}"
        if before not in self.trained:  # that round hid no more than the one before it
            return None
        maps = self.maps(before, rule.exchange)
        if rule.exchange:
            maps = maps.clamp(min=0)  # where the loss falls
        earlier = self.masked.get(before)
        masked = rule.mask(self.train, maps, earlier, self.seed)
        hidden = earlier.own_masks if earlier else torch.zeros_like(masked.own_masks)
        return None if torch.equal(masked.own_masks, hidden) else masked


def try_masks(
    train: Split,
    fit: Fit,
    finetune: Finetune,
    candidates: Sequence[Rule],
    seed: int = 0,
    share: float = 1.0,
) -> Iterator[HeldOut]:
    """Train on both halves; fine-tune with mask after mask, and predict.

    Args:
        train: see `chosen.choose`, as for the others.
        fit: (training images, share of the training) → a network.
        finetune: (network, masked images) → the network.
        candidates: how masks are made, in the order in which they are tried.
        seed: of every random choice.
        share: of the training.

    Yields:
        One record, which grows: after each mask; if ERM makes fewer than `FEW`
        mistakes, or no mask hides anything, once all is known. Stop when it is enough.

    Raises:
        NoMapsError: see `chosen.choose`, as for the others.
        TypeError: a network that we cannot work with.
        ValueError: networks that share weights, or see `metrics.predict`.
    """
    halves = Halves(train, seed)
    halves.add(ERM, _both(fit, halves.parts, [share, share]), "fit")
    predicted = halves.predict(ERM)
    held_out = HeldOut(
        labels=train.labels.cpu(),
        mistake_map=halves.maps(ERM, exchange=True)[0].clone(),
        predictions={ERM: halves.join(predicted)},
        share=share,
        masked=halves.masked,
    )

    def tune(masked: MaskedDataset) -> None:
        """Fine-tune both networks, and predict the images as they are."""
        name = f"{masked.rule}"
        halves.masked[name] = masked
        networks = copy.deepcopy(halves.trained[ERM])
        halves.add(name, _both(finetune, networks, halves.images(name)), "finetune")
        held_out.predictions[name] = halves.join(halves.predict(name))
        held_out.mean_masks[name] = masked.own_masks.mean(0, dtype=torch.float32).cpu()

    tune(NOTHING.mask(train, torch.zeros(len(train), 1, 1), seed=seed))
    has_few = held_out.is_mistake.sum() < FEW
    bar = progress.bar(dict.fromkeys(candidates))
    for rule in bar:
        bar.set_description(f"{rule}")
        try:
            masked = halves.mask(rule)
        except NoMapsError:
            if not any(candidate.exchange for candidate in candidates):
                raise
            held_out.has_maps = False
            continue
        if masked is None:
            continue
        tune(masked)
        images = halves.images(f"{rule}")
        shares = _both(explained, halves.unseen_by(ERM), images, predicted)
        held_out.explained[f"{rule}"] = halves.join(shares)
        if not has_few:
            yield held_out
    if has_few:
        for name in held_out.tried:
            accuracies = {}
            for model in halves.trained:
                networks = halves.unseen_by(model)
                of_folds = _both(_resampled_accuracy, networks, halves.images(name))
                accuracies[model] = sum(of_folds) / 2
            held_out.resampled[name] = accuracies
    if has_few or not held_out.tried:
        yield held_out


def _both(step: Callable, *pairs: Sequence, **options: Any) -> list:
    """A step for each fold, in processes of their own if joblib is configured so."""
    backend, _ = get_active_backend()
    # Threads would draw from one random generator: the seed would decide nothing.
    jobs = 1 if getattr(backend, "uses_threads", False) else None
    calls = zip(*pairs, strict=True)
    return Parallel(n_jobs=jobs)(
        delayed(step)(*of_fold, **options) for of_fold in calls
    )


def _check(networks: list[nn.Module], made_by: str, train: Split) -> None:
    """Refuse networks that we cannot work with.

    A network that shares memory with that of the other fold has seen its images.
    """
    for network in networks:
        if not isinstance(network, nn.Module):
            raise TypeError(f"{made_by} returned {network!r}; allowed: the network.")
        types = {weight.dtype for weight in network.parameters()}
        if types != {torch.float32}:
            raise TypeError(f"weights are {types}; allowed: torch.float32.")
        logits = predict(network, train[:2])
        classes = len(train.labels.bincount())
        if logits.shape[1] < classes:
            raise ValueError(
                f"the trained network predicts {logits.tolist()} for two images; "
                f"allowed: a number for each of {classes} classes."
            )
    first, second = [
        {
            weight.untyped_storage().data_ptr()
            for weight in network.parameters()
            if weight.numel()  # without elements, all have the same address
        }
        for network in networks
    ]
    if first & second:
        raise ValueError(
            f"{made_by} returned two networks that share weights; allowed: a new one "
            "for each fold."
        )


def _maps(network: nn.Module, fold: Split | MaskedDataset) -> Tensor:
    return saliency_maps(network, fold.images, fold.labels)


def _classes(network: nn.Module, images: Split | MaskedDataset) -> Tensor:
    return predict(network, images).argmax(1)


def _resampled_accuracy(network: nn.Module, masked: MaskedDataset) -> float:
    """On at most `SAMPLE` images."""
    generator = torch.Generator().manual_seed(masked.seed)
    sample = torch.randperm(len(masked), generator=generator)[:SAMPLE]
    resampled = MaskedDataset(
        masked.split[sample], masked.own_masks[sample], "resample", masked.seed
    )
    is_right = _classes(network, resampled) == resampled.labels.cpu()
    return is_right.double().mean().item()
