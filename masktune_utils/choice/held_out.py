"""What models predict for training images that they have not seen, mask after mask.

Two ERM models are trained, each on one half of the training images, a fold. Each
predicts the other fold; so do its copies that are fine-tuned with nothing masked and
with each mask.
"""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import data, progress
from masktune_utils.choice.exchange import FEW, exchange_map, explained
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule
from masktune_utils.metrics import predict
from masktune_utils.models import NoMapsError
from masktune_utils.saliency import saliency_maps

# training images → a new network that is trained on them
Fit = Callable[[Split], nn.Module]
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
        masked: `NULL` and mask → all images with it.
    """

    labels: Tensor
    mistake_map: Tensor
    predictions: dict[str, Tensor]
    explained: dict[str, Tensor] = field(default_factory=dict)
    resampled: dict[str, dict[str, float]] = field(default_factory=dict)
    mean_masks: dict[str, Tensor] = field(default_factory=dict)
    has_maps: bool = True
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


def try_masks(
    train: Split,
    fit: Fit,
    finetune: Finetune,
    candidates: Sequence[Rule],
    seed: int = 0,
) -> Iterator[HeldOut]:
    """Train on both halves; fine-tune with mask after mask, and predict.

    Args:
        train: see `chosen.choose`, as for the others.
        fit: training images → a network.
        finetune: (network, masked images) → the network.
        candidates: how masks are made.
        seed: of every random choice.

    Yields:
        One record, which grows: after each mask, first rounds first; if ERM makes fewer
        than `FEW` mistakes, once all is known. Stop when it is enough.

    Raises:
        NoMapsError: see `chosen.choose`, as for the others.
        TypeError: a network that we cannot work with.
        ValueError: networks that share weights, or see `metrics.predict`.
    """
    folds = data.folds(train.labels, seed)
    order = torch.cat(folds).argsort()
    parts = [train[members] for members in folds]

    def join(of_folds: list[Tensor]) -> Tensor:
        """What both folds have, in the order of all images."""
        return torch.cat(of_folds)[order]

    def images_of(model: str) -> Sequence:
        """The images of each fold, as the networks were trained on them."""
        if model == ERM:
            return parts
        masked = held_out.masked[model]
        return [
            replace(masked, split=part, own_masks=masked.own_masks[members])
            for part, members in zip(parts, folds, strict=True)
        ]

    @functools.cache
    def locate_mistakes(model: str) -> Tensor:
        """The mean exchange map of both folds, as that of each image, N×h×w."""
        images = images_of(model)
        predicted = _both(_classes, judges[model], images)
        falls = _both(exchange_map, judges[model], images, predicted, seed=seed)
        return torch.stack(falls).mean(0).expand(len(train), -1, -1)

    @functools.cache
    def look(model: str) -> Tensor:
        """Saliency maps, N×h×w, each by the network that has seen the image."""
        return join(_both(_maps, judges[model][::-1], images_of(model)))

    fitted = _both(fit, parts)
    # Of a compiled network, the one that was compiled.
    trained = [getattr(network, "_orig_mod", network) for network in fitted]
    _check(trained, "fit", train)
    # Model → for each fold, the network that has not seen it.
    judges = {ERM: trained[::-1]}
    predicted = _both(_classes, judges[ERM], parts)
    held_out = HeldOut(
        labels=train.labels.cpu(),
        mistake_map=locate_mistakes(ERM)[0].clone(),
        predictions={ERM: join(predicted)},
    )

    def tune(rule: Rule) -> None:
        """Fine-tune both networks, and predict."""
        name = f"{rule}"
        networks = _both(finetune, copy.deepcopy(trained), images_of(name))
        _check(networks, "finetune", train)
        judges[name] = networks[::-1]
        held_out.predictions[name] = join(_both(_classes, judges[name], parts))

    nothing = torch.zeros(len(train), 1, 1)
    held_out.masked[NULL] = NOTHING.mask(train, nothing, seed=seed)
    tune(NOTHING)
    has_few = held_out.is_mistake.sum() < FEW
    rounds = [of_round for rule in candidates for of_round in rule.each_round]
    rounds.sort(key=lambda rule: rule.rounds)
    bar = progress.bar(dict.fromkeys(rounds))
    for rule in bar:
        name = f"{rule}"
        bar.set_description(name)
        before = ERM
        if rule.rounds > 1:
            before = f"{replace(rule, rounds=rule.rounds - 1)}"
        if before not in judges:
            continue
        try:
            maps = locate_mistakes(before) if rule.exchange else look(before)
        except NoMapsError:
            if not any(rule.exchange for rule in candidates):
                raise
            held_out.has_maps = False
            continue
        if rule.exchange:
            maps = maps.clamp(min=0)  # where the loss falls
        earlier = held_out.masked.get(before)
        masked = rule.mask(train, maps, earlier, seed)
        if earlier and torch.equal(masked.own_masks, earlier.own_masks):
            continue
        held_out.masked[name] = masked
        shares = _both(explained, judges[ERM], images_of(name), predicted)
        held_out.explained[name] = join(shares)
        held_out.mean_masks[name] = masked.own_masks.mean(0, dtype=torch.float32).cpu()
        tune(rule)
        if not has_few:
            yield held_out
    if has_few:
        for name in held_out.tried:
            accuracies = {}
            for model, networks in judges.items():
                shares = _both(_resampled_accuracy, networks, images_of(name))
                accuracies[model] = sum(shares) / 2
            held_out.resampled[name] = accuracies
        yield held_out


def _both(step: Callable, *pairs: Sequence, **options: Any) -> list:
    """A step for each fold, side by side if joblib is configured so."""
    calls = zip(*pairs, strict=True)
    return Parallel()(delayed(step)(*of_fold, **options) for of_fold in calls)


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
        {weight.untyped_storage().data_ptr() for weight in network.parameters()}
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


def _resampled_accuracy(judge: nn.Module, masked: MaskedDataset) -> float:
    """On at most `SAMPLE` images."""
    generator = torch.Generator().manual_seed(masked.seed)
    sample = torch.randperm(len(masked), generator=generator)[:SAMPLE]
    resampled = MaskedDataset(
        masked.split[sample], masked.own_masks[sample], "resample", masked.seed
    )
    is_right = _classes(judge, resampled) == resampled.labels.cpu()
    return is_right.double().mean().item()
