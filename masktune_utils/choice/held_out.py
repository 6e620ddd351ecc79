"""What models predict for training images that they have not seen, mask after mask.

Two ERM models are trained, each on one half of the training images, a fold. Each
predicts the other fold; so do its copies that are fine-tuned with nothing masked and
with each mask.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import joblib
import torch
import torch.nn.functional as F
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

ERM = "ERM"
NULL = f"{NOTHING}"  # ERM, fine-tuned like with a mask, on the images as they are
FEW = 5  # fewer mistakes do not tell which evidence misleads
SAMPLE = 1000  # images of each fold that are resampled
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


@dataclass(eq=False)
class HeldOut:
    """What models predict for training images that they have not seen.

    These are tensors, numbers, texts and dicts of them: `vars` of it can be saved.

    Attributes:
        labels: N.
        mistake_map: h×w, where ERM's mistakes come from, see `exchange.exchange_map`;
            the mean of both folds.
        has_maps: False if the network gives no maps, so that masks by saliency are left
            out.
        predictions: model → N classes; of `ERM`, `NULL` and each mask that was tried.
        explained: mask → N, whether the image is a mistake of ERM that the mask
            explains, see `exchange.explained`.
        resampled: mask → model → accuracy on images whose hidden part comes from
            another image at random; of ERM alone, unless it makes less than `FEW`
            mistakes.
        hidden: mask → mean share of the image that it hides.
        place: mask → one of `PLACES`, where it hides most.
    """

    labels: Tensor
    mistake_map: Tensor
    has_maps: bool
    predictions: dict[str, Tensor]
    explained: dict[str, Tensor]
    resampled: dict[str, dict[str, float]]
    hidden: dict[str, float]
    place: dict[str, str]

    def is_right(self, model: str) -> Tensor:
        """N, bool."""
        return self.predictions[model] == self.labels

    @property
    def tried(self) -> list[str]:
        """The masks that were tried, in order."""
        return [mask for mask in self.explained if mask in self.predictions]

    @property
    def is_mistake(self) -> Tensor:
        """N, whether ERM is wrong."""
        return ~self.is_right(ERM)


def collect(
    train: Split,
    fit: Fit,
    finetune: Finetune,
    candidates: Sequence[Rule],
    jobs: int,
    explain: Explain,
    seed: int,
    folder: Path | None,
) -> Iterator[tuple[HeldOut, dict[str, MaskedDataset]]]:
    """Train the models of both folds, and let them predict what they have not seen.

    Args:
        train: see `score.choose`, as for the others.

    Yields:
        The predictions; and `NULL` and each mask → the training images with the masks.
        First with the masks of all first rounds, before anything is fine-tuned; then
        after each mask, first rounds first. Both grow: stop when it is enough.

    Raises:
        TypeError: see `score.choose`.
        ValueError: see `score.choose`.
    """
    _check(train, candidates)
    folds = _Folds(train, fit, jobs, seed, folder)
    maps = folds.exchange_maps
    if not all(rule.exchange for rule in candidates):
        try:
            maps = folds.both(partial(_maps, explain), folds.networks, folds.parts)
        except NoMapsError:
            folds.held_out.has_maps = False
            candidates = [rule for rule in candidates if rule.exchange]
    rounds = [of_round for rule in candidates for of_round in rule.each_round]
    rounds.sort(key=lambda rule: rule.rounds)
    for rule in (NOTHING, *rounds):
        if rule.rounds == 1:
            folds.hide(rule, folds.exchange_maps if rule.exchange else maps)
    yield folds.held_out, folds.masked_images
    folds.tune(NOTHING, finetune)
    bar = progress.bar(rounds)
    for rule in bar:
        bar.set_description(f"{rule}")
        if rule.rounds > 1:
            folds.hide_more(rule, explain)
        if f"{rule}" in folds.masked:
            folds.tune(rule, finetune)
            yield folds.held_out, folds.masked_images
    if folds.held_out.is_mistake.sum() < FEW:
        folds.resample()
        yield folds.held_out, folds.masked_images


def _check(train: Split, candidates: Sequence[Rule]) -> None:
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


class _Folds:
    """Both folds: pairs, of what each fold has; and what is known of all images.

    Attributes:
        parts: the images of each fold.
        networks: ERM, trained on each fold.
        judges: ERM that has not seen the fold: the same networks, the other way round.
        predicted: what the judges predict for the fold.
        exchange_maps: where these mistakes come from, for each image.
        masked: mask → the images of each fold with it.
        tuned: mask → the networks, fine-tuned on these.
        masked_images: mask → all images with it.
        held_out: see `HeldOut`.
    """

    def __init__(
        self, train: Split, fit: Fit, jobs: int, seed: int, folder: Path | None
    ) -> None:
        self.train = train
        self.seed = seed
        self.folder = folder
        self.run = Parallel(min(jobs, 2))
        index = data.folds(train.labels, seed)
        self.order = torch.cat(index).argsort()
        self.parts = [train[members] for members in index]
        self.masked = {}
        self.tuned = {}
        self.masked_images = {}
        self.networks = self.kept(ERM, lambda: self.fit(fit))
        self.judges = self.networks[::-1]
        self.predicted = self.both(_classes, self.judges, self.parts)
        falls = self.both(
            partial(exchange_map, seed=seed), self.judges, self.parts, self.predicted
        )
        self.exchange_maps = [
            fall.clamp(min=0).expand(len(part), -1, -1)
            for fall, part in zip(falls, self.parts, strict=True)
        ]
        self.held_out = HeldOut(
            labels=train.labels.cpu(),
            mistake_map=torch.stack(falls).mean(0),
            has_maps=True,
            predictions={ERM: self.all_images(self.predicted)},
            explained={},
            resampled={},
            hidden={},
            place={},
        )

    def both(self, step: Callable, *pairs: Sequence) -> list:
        """A step for each fold, side by side if there are two jobs."""
        return self.run(delayed(step)(*of_fold) for of_fold in zip(*pairs, strict=True))

    def all_images(self, pair: Sequence[Tensor]) -> Tensor:
        """What each fold has, in the order of all images."""
        return torch.cat(list(pair))[self.order]

    def kept(self, name: str, make: Callable, *made_with: Tensor) -> list[nn.Module]:
        """A pair of networks; saved in the folder, if there is one.

        Args:
            name: of the file.
            make: returns the pair.
            *made_with: what it depends on, besides the images and the seed.
        """
        if self.folder is None:
            return make()
        tensors = (self.train.images, self.train.labels, *made_with)
        arrays = [tensor.cpu().numpy() for tensor in tensors]
        path = Path(self.folder) / f"{name}, {joblib.hash([arrays, self.seed])}.pt"
        saved = store.kept(
            path,
            {},
            lambda: {"networks": make()},
            device=self.train.labels.device,
            runs_code=True,
        )
        return saved["networks"]

    def fit(self, fit: Fit) -> list[nn.Module]:
        """Train ERM on each fold."""
        classes = len(self.train.labels.bincount())
        networks = self.both(partial(_fit, fit, classes), self.parts)
        first, second = [set(network.parameters()) for network in networks]
        if first & second:
            raise ValueError(
                "fit returned the same network twice; allowed: a new one for each fold."
            )
        return networks

    def hide(
        self,
        rule: Rule,
        maps: Sequence[Tensor],
        earlier: Sequence[MaskedDataset | None] = (None, None),
    ) -> None:
        """Add the masks of a rule, and what is known of them before fine-tuning.

        They are left out if they hide no more than earlier ones.
        """
        name = f"{rule}"
        masked = self.both(partial(_mask, rule, self.seed), self.parts, maps, earlier)
        pairs = zip(masked, earlier, strict=True)
        if all(old and torch.equal(new.own_masks, old.own_masks) for new, old in pairs):
            return
        own_masks = self.all_images([images.own_masks for images in masked])
        self.masked[name] = masked
        self.masked_images[name] = replace(
            masked[0], split=self.train, own_masks=own_masks
        )
        if rule == NOTHING:
            return
        is_explained = self.both(
            partial(_explained, self.seed), self.judges, masked, self.predicted
        )
        mean_mask = own_masks.mean(0, dtype=torch.float32)
        ninths = F.adaptive_avg_pool2d(mean_mask[None], 3)
        held_out = self.held_out
        held_out.explained[name] = self.all_images(is_explained)
        held_out.resampled[name] = {ERM: self.accuracy(self.judges, masked)}
        held_out.hidden[name] = mean_mask.mean().item()
        held_out.place[name] = PLACES[ninths.argmax()]

    def hide_more(self, rule: Rule, explain: Explain) -> None:
        """Add the masks of a later round, by maps of the fine-tuned networks."""
        before = f"{replace(rule, rounds=rule.rounds - 1)}"
        if before in self.tuned:
            earlier = self.masked[before]
            maps = self.both(partial(_maps, explain), self.tuned[before], earlier)
            self.hide(rule, maps, earlier)

    def tune(self, rule: Rule, finetune: Finetune) -> None:
        """Fine-tune with the masks of a rule, and predict."""
        name = f"{rule}"
        masked = self.masked[name]
        networks = self.kept(
            name,
            lambda: self.both(partial(_tune, finetune), self.networks, masked),
            *(images.own_masks for images in masked),
        )
        self.tuned[name] = networks
        classes = self.both(_classes, networks[::-1], self.parts)
        self.held_out.predictions[name] = self.all_images(classes)

    def resample(self) -> None:
        """Let all models predict the images that all masks resample."""
        for name, accuracies in self.held_out.resampled.items():
            for model, networks in self.tuned.items():
                accuracies[model] = self.accuracy(networks[::-1], self.masked[name])

    def accuracy(
        self, judges: Sequence[nn.Module], masked: Sequence[MaskedDataset]
    ) -> float:
        """Of judges, on images whose hidden part comes from another one at random."""
        shares = self.both(partial(_accuracy, self.seed), judges, masked)
        return sum(shares) / 2


def _fit(fit: Fit, classes: int, fold: Split) -> nn.Module:
    """A trained network, unless we cannot work with it."""
    network = fit(fold)
    if not isinstance(network, nn.Module):
        raise TypeError(f"fit returned {network!r}; allowed: the trained network.")
    network = getattr(network, "_orig_mod", network)  # of a compiled one
    types = {weight.dtype for weight in network.parameters()}
    if types != {torch.float32}:
        raise TypeError(
            f"the network of fit has weights of {types}; allowed: torch.float32."
        )
    logits = predict(network, fold[:2])
    if logits.shape[1] < classes or not logits.isfinite().all():
        raise ValueError(
            f"the trained network predicts {logits.tolist()} for two images; allowed: "
            f"a finite number for each of {classes} classes."
        )
    return network


def _maps(explain: Explain, network: nn.Module, fold: Split | MaskedDataset) -> Tensor:
    return explain(network, fold.images, fold.labels)


def _mask(
    rule: Rule, seed: int, fold: Split, maps: Tensor, earlier: MaskedDataset | None
) -> MaskedDataset:
    return rule.mask(fold, maps, seed, earlier)


def _explained(
    seed: int, judge: nn.Module, masked: MaskedDataset, predicted: Tensor
) -> Tensor:
    return explained(judge, masked.split, masked.own_masks, predicted, seed)


def _tune(finetune: Finetune, network: nn.Module, masked: MaskedDataset) -> nn.Module:
    tuned = finetune(copy.deepcopy(network), masked)
    if not isinstance(tuned, nn.Module):
        raise TypeError(f"finetune returned {tuned!r}; allowed: the trained network.")
    return tuned


def _classes(network: nn.Module, images: Split | MaskedDataset) -> Tensor:
    return predict(network, images).argmax(1)


def _accuracy(seed: int, judge: nn.Module, masked: MaskedDataset) -> float:
    """On at most `SAMPLE` images."""
    generator = torch.Generator().manual_seed(seed)
    sample = torch.randperm(len(masked), generator=generator)[:SAMPLE]
    resampled = MaskedDataset(
        masked.split[sample], masked.own_masks[sample], "resample", seed
    )
    right = predict(judge, resampled).argmax(1) == resampled.labels.cpu()
    return right.double().mean().item()
