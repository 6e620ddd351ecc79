"""What models predict for training images that they have not seen, mask after mask.

Two ERM models are trained, each on one half of the training images, a fold. Each
predicts the other fold; so do its copies that are fine-tuned with nothing masked and
with each mask.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import data, progress, store
from masktune_utils.choice.exchange import exchange_map, explained
from masktune_utils.data import Split
from masktune_utils.masking import (
    NOTHING,
    Explain,
    Finetune,
    Fit,
    MaskedDataset,
    Rule,
)
from masktune_utils.metrics import predict
from masktune_utils.models import NoMapsError
from masktune_utils.saliency import saliency_maps

ERM = "ERM"
NULL = f"{NOTHING}"  # ERM, fine-tuned like with a mask, on the images as they are
FEW = 5  # fewer mistakes do not tell which evidence misleads
SAMPLE = 1000  # images of each fold that are resampled


@dataclass(eq=False)
class HeldOut:
    """What models predict for training images that they have not seen.

    These are tensors, numbers, texts and dicts of them: `vars` of it can be saved.

    Attributes:
        labels: N.
        mistake_map: h×w, where ERM's mistakes come from, see `exchange.exchange_map`;
            the mean of both folds.
        predictions: model → N classes; of `ERM`, then of `NULL` and each mask that was
            tried.
        explained: mask → N in [0, 1], how far the mask explains a mistake of ERM, see
            `exchange.explained`; 0 for other images.
        resampled: mask → model → accuracy on images whose hidden part comes from
            another image at random; of ERM alone, unless it makes fewer than `FEW`
            mistakes.
        mean_masks: mask → H×W in [0, 1], in how many images each pixel is hidden.
        has_maps: False if the network gives no maps, so that masks by saliency are left
            out.
    """

    labels: Tensor
    mistake_map: Tensor
    predictions: dict[str, Tensor]
    explained: dict[str, Tensor] = field(default_factory=dict)
    resampled: dict[str, dict[str, float]] = field(default_factory=dict)
    mean_masks: dict[str, Tensor] = field(default_factory=dict)
    has_maps: bool = True

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


@dataclass(eq=False)
class Folds:
    """Both halves of the training images, and their models.

    A pair has something of each fold: its images; a network that is trained on them; a
    judge, which is a network that has not seen them.

    Attributes:
        train: see `score.choose`, as for the others.
        images: `NULL` and mask → all images with it.
        held_out: what is known.

    Raises:
        TypeError: see `score.choose`.
        ValueError: see `score.choose`.
    """

    train: Split
    fit: Fit
    finetune: Finetune
    explain: Explain = saliency_maps
    jobs: int = 1
    seed: int = 0
    folder: Path | None = None

    def __post_init__(self) -> None:
        index = data.folds(self.train.labels, self.seed)
        self.order = torch.cat(index).argsort()
        self.parts = [self.train[members] for members in index]
        self.networks = self.kept(ERM, [self.order], _fit, self.parts, fit=self.fit)
        first, second = [set(network.parameters()) for network in self.networks]
        if first & second:
            raise ValueError(
                "fit returned two networks that share weights; allowed: a new one for "
                "each fold. Delete the folder, if there is one."
            )
        self.judges = self.networks[::-1]
        self.predicted = self.both(_classes, self.judges, self.parts)
        self.falls = self.both(
            exchange_map, self.judges, self.parts, self.predicted, seed=self.seed
        )
        self.masked = {}
        self.tuned = {ERM: self.networks}
        self.images = {}
        self.held_out = HeldOut(
            labels=self.train.labels.cpu(),
            mistake_map=torch.stack(self.falls).mean(0),
            predictions={ERM: self.join(self.predicted)},
        )

    def try_masks(self, candidates: Sequence[Rule]) -> Iterator[HeldOut]:
        """Fine-tune with mask after mask, and predict.

        Args:
            candidates: see `score.choose`.

        Yields:
            `held_out`, which grows: with what the masks of all first rounds explain,
            before anything is fine-tuned; then after each mask, first rounds first.
            Stop when it is enough.

        Raises:
            NoMapsError: the network gives no maps, and no candidate is by exchange,
            or one by exchange has several rounds.
        """
        by_exchange = [rule for rule in candidates if rule.exchange]
        maps = None
        if len(by_exchange) < len(candidates):
            try:
                maps = self.both(_maps, self.networks, self.parts, explain=self.explain)
            except NoMapsError:
                if not by_exchange:
                    raise
                self.held_out.has_maps = False
                candidates = by_exchange
        rounds = [of_round for rule in candidates for of_round in rule.each_round]
        rounds.sort(key=lambda rule: rule.rounds)
        exchange_maps = [
            fall.clamp(min=0).expand(len(part), -1, -1)
            for fall, part in zip(self.falls, self.parts, strict=True)
        ]
        self.hide(NOTHING, exchange_maps)
        for rule in rounds:
            if rule.rounds == 1:
                self.hide(rule, exchange_maps if rule.exchange else maps)
        yield self.held_out
        self.tune(NOTHING)
        bar = progress.bar(rounds)
        for rule in bar:
            bar.set_description(f"{rule}")
            if rule.rounds > 1:
                self.hide_more(rule)
            if f"{rule}" in self.masked:
                self.tune(rule)
                yield self.held_out
        if self.held_out.is_mistake.sum() < FEW:
            for mask in self.held_out.resampled:
                for model in self.tuned:
                    self.resample(mask, model)
            yield self.held_out

    def both(self, step: Callable, *pairs: Sequence, **options: Any) -> list:
        """A step for each fold, side by side if there are two jobs."""
        calls = zip(*pairs, strict=True)
        run = Parallel(self.jobs)
        return run(delayed(step)(*of_fold, **options) for of_fold in calls)

    def join(self, pair: list[Tensor]) -> Tensor:
        """What both folds have, in the order of all images."""
        return torch.cat(pair)[self.order]

    def kept(
        self,
        name: str,
        made_of: list[Tensor],
        step: Callable,
        *pairs: Sequence,
        **options: Any,
    ) -> list[nn.Module]:
        """A pair of networks, made by a step; saved in the folder, if there is one.

        They depend on the training images, the seed, and what they are made of.
        """

        def make() -> dict[str, list[nn.Module]]:
            return {"networks": self.both(step, *pairs, **options)}

        if self.folder is None:
            return make()["networks"]
        labels = self.train.labels
        tensors = dict(enumerate([self.train.images, labels, *made_of]))
        key = f"{name}, seed {self.seed}, {store.sha256(tensors)}"
        path = Path(self.folder).expanduser() / f"{key}.pt"
        saved = store.kept(path, {}, make, runs_code=True)
        return [network.to(labels.device) for network in saved["networks"]]

    def hide(self, rule: Rule, maps: Sequence[Tensor], before: str = "") -> None:
        """Add masks, and what they explain, unless they hide no more than before."""
        earlier = self.masked.get(before, (None, None))
        masked = self.both(rule.mask, self.parts, maps, earlier, seed=self.seed)
        own_masks = self.join([images.own_masks for images in masked])
        if before and torch.equal(own_masks, self.images[before].own_masks):
            return
        mask = f"{rule}"
        self.masked[mask] = masked
        self.images[mask] = replace(masked[0], split=self.train, own_masks=own_masks)
        if rule == NOTHING:
            return
        shares = self.both(explained, self.judges, masked, self.predicted)
        self.held_out.explained[mask] = self.join(shares)
        self.held_out.resampled[mask] = {}
        self.resample(mask, ERM)
        mean_mask = own_masks.mean(0, dtype=torch.float32)
        self.held_out.mean_masks[mask] = mean_mask.cpu()

    def hide_more(self, rule: Rule) -> None:
        """Add the masks of a later round, by the networks of the round before."""
        before = f"{replace(rule, rounds=rule.rounds - 1)}"
        if before in self.tuned:
            maps = self.both(
                _maps, self.tuned[before], self.masked[before], explain=self.explain
            )
            self.hide(rule, maps, before)

    def tune(self, rule: Rule) -> None:
        """Fine-tune on masked images, and predict."""
        mask = f"{rule}"
        weights = [*self.networks[0].parameters(), *self.networks[1].parameters()]
        networks = self.kept(
            mask,
            [self.images[mask].own_masks, *weights],
            _tune,
            self.networks,
            self.masked[mask],
            finetune=self.finetune,
        )
        self.tuned[mask] = networks
        predicted = self.both(_classes, networks[::-1], self.parts)
        self.held_out.predictions[mask] = self.join(predicted)

    def resample(self, mask: str, model: str) -> None:
        """Let a model predict images whose hidden part comes from another at random."""
        judges = self.tuned[model][::-1]
        shares = self.both(_resampled_accuracy, judges, self.masked[mask])
        self.held_out.resampled[mask][model] = sum(shares) / 2


def _fit(fold: Split, fit: Fit) -> nn.Module:
    """A trained network, unless we cannot work with it."""
    classes = len(fold.labels.bincount())
    network = _checked(fit(fold), "fit")
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    types = {weight.dtype for weight in network.parameters()}
    if types != {torch.float32}:
        raise TypeError(f"weights are {types}; allowed: torch.float32.")
    logits = predict(network, fold[:2])
    is_of_classes = logits.ndim == 2 and logits.shape[1] >= classes
    if not is_of_classes or not logits.isfinite().all():
        raise ValueError(
            f"the trained network predicts {logits.tolist()} for two images; allowed: "
            f"a finite number for each of {classes} classes."
        )
    return network


def _tune(network: nn.Module, masked: MaskedDataset, finetune: Finetune) -> nn.Module:
    return _checked(finetune(copy.deepcopy(network), masked), "finetune")


def _checked(network: nn.Module, made_by: str) -> nn.Module:
    if not isinstance(network, nn.Module):
        raise TypeError(f"{made_by} returned {network!r}; allowed: the network.")
    return network


def _maps(network: nn.Module, fold: Split | MaskedDataset, explain: Explain) -> Tensor:
    return explain(network, fold.images, fold.labels)


def _classes(network: nn.Module, fold: Split) -> Tensor:
    return predict(network, fold).argmax(1)


def _resampled_accuracy(judge: nn.Module, masked: MaskedDataset) -> float:
    """On at most `SAMPLE` images."""
    generator = torch.Generator().manual_seed(masked.seed)
    sample = torch.randperm(len(masked), generator=generator)[:SAMPLE]
    resampled = MaskedDataset(
        masked.split[sample], masked.own_masks[sample], "resample", masked.seed
    )
    is_right = _classes(judge, resampled) == resampled.labels.cpu()
    return is_right.double().mean().item()
