"""What does a classifier look at, and what depends on it? Forward passes alone tell.

Ours; see `exchange` for what it builds on.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from masktune_utils.choice.chosen import Choice, as_region, hide
from masktune_utils.choice.exchange import (
    FEW,
    ClassSwaps,
    Swaps,
    exchange_map,
    name_ninth,
    reliance_map,
    swap,
    swap_classes,
)
from masktune_utils.data import Split, check_split
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.metrics import Network, predict

# Where a map is above half of its maximum.
REGION = Rule("threshold", 0.5, "map", dilation=3)
LARGEST = 0.5  # share of the image: a larger region is no place


@dataclass(frozen=True, eq=False)
class Audit:
    """A place in the image, and what depends on it.

    Attributes:
        images: that the classifier has not seen.
        predicted: N, their predicted classes.
        maps: `mistakes`, `reliance` → h×w, see `exchange.exchange_map` and
            `exchange.reliance_map`; none if a person pointed at a place.
        found_by: the map that the region is from; `you` if a person pointed at it;
            empty if no map points at a place, so that there is no region.
        region: H×W, bool.
        swaps: of mistakes, see `exchange.swap`; by `mistakes`, only of the half of them
            that the map has not seen.
        class_swaps: of all images, see `exchange.swap_classes`.
        elsewhere: both for a region of the same shape at four other places.
    """

    images: Split
    predicted: Tensor
    maps: dict[str, Tensor]
    found_by: str
    region: Tensor
    swaps: Swaps
    class_swaps: ClassSwaps
    elsewhere: list[tuple[Swaps, ClassSwaps]]

    @property
    def accuracy(self) -> float:
        """Of the images as they are."""
        is_right = self.predicted == self.images.labels.cpu()
        return is_right.double().mean().item()

    @property
    def reason(self) -> str:
        """What depends on the place, in words. A person says what it means."""
        is_mistake = self.predicted != self.images.labels.cpu()
        count = int(is_mistake.sum())
        first = (
            f"Accuracy: {self.accuracy:.1%}; mistakes: {count} of {len(is_mistake)}."
        )
        most_frequent = self.images.labels.bincount().max().item() / len(is_mistake)
        if self.accuracy <= most_frequent:
            first += (
                "\nOne class for all images would be right as often. Does the classifier "
                "take pixels in [0, 1], and are its classes in this order: "
                f"{', '.join(self.images.class_names)}?"
            )
        if not self.found_by:
            return (
                f"{first}\nNo map points at a place of at most {LARGEST:.0%} of the "
                "image. More images or a longer training may show one; or point at a "
                "place yourself: audit(…, place=(left, top, right, bottom))."
            )
        swapped = self.class_swaps
        others = [classes for _, classes in self.elsewhere]
        worst = [100 * classes.worst for classes in others]
        changed = [100 * classes.changed for classes in others]
        moving = [len(swaps.moving) for swaps, _ in self.elsewhere]
        name = self.images.class_names[swapped.worst_class]
        words = (
            f"{first}\n"
            f"If the {name_ninth(self.region)} ({self.region.float().mean():.0%} of the "
            f"image) comes from another class, the worst class ({name}) has "
            f"{swapped.worst:.0%} ± {swapped.error:.0%},\n"
            f"and {swapped.changed:.0%} of the right predictions change. With this shape "
            f"at four other places: {_range(worst)}%,\n"
            f"and {_range(changed)}% change.\n"
        )
        if len(self.swaps.mistakes):
            words += (
                f"{len(self.swaps.moving)} of {len(self.swaps.mistakes)} mistakes move "
                f"with it; with the other places {_range(moving)}.\n"
            )
        return f"{words}Is your class about this part? If not, hide it."

    def hide(self, train: Split, **options: object) -> Choice:
        """Hide the place in training images, see `chosen.hide`.

        Args:
            train: the training images.
            **options: see `chosen.hide`.

        Raises:
            ValueError: there is no place.
        """
        return hide(train, self.region, **options)


def audit(
    network: Network,
    images: Split,
    seed: int = 0,
    place: Tensor | Sequence[float] | None = None,
) -> Audit:
    """What depends on a place in the image? Without a place, find one.

    A place is found by the mistakes of the network, if there are enough, and by its
    predictions: the smaller of both. Whether the classes are about it, a person says:
    evidence misleads, too.

    Args:
        network: any network, or a function (of a network in evaluation mode): images
            in [0, 1], B×C×H×W → logits or probabilities, B×classes.
        images: with labels; images that it was not trained on.
        seed: of random choices.
        place: see `chosen.as_region`.

    Raises:
        TypeError: `images` are no `Split`; or see `metrics.predict`.
        ValueError: there are no images of two classes; the place is no part of the
            image; or the network predicts a number of classes other than theirs.
    """
    check_split(images)
    seed = int(seed)  # of NumPy, too
    labels = images.labels.cpu()
    present = labels.unique().tolist()
    if len(present) < 2:
        raise ValueError(
            f"the classes of the images are {present}; allowed: 2 or more."
        )
    size = images.images.shape[-2:]
    region = torch.zeros(size, dtype=torch.bool)
    maps = {}
    found_by = ""
    if place is not None:
        region = as_region(place, size)
        found_by = "you"
    outputs = predict(network, images)
    count = len(images.class_names)
    if outputs.shape[1] != count:
        raise ValueError(
            f"the classifier predicts {outputs.shape[1]} classes; allowed: the {count} "
            "of the images' class_names, which may name classes without an image."
        )
    predicted = outputs.argmax(1)
    counted = predicted
    if place is None:
        # A map fits the mistakes that it is made of: half of them make it, the other
        # half is counted.
        making, counting = _halves(labels, predicted)
        maps = {
            "mistakes": exchange_map(network, images, making, seed),
            "reliance": reliance_map(network, images, predicted, seed),
        }
        regions = {name: region_of(values, size) for name, values in maps.items()}
        if (making != labels).sum() < FEW:
            del regions["mistakes"]
        places = {
            name: candidate
            for name, candidate in regions.items()
            if 0 < candidate.float().mean() <= LARGEST
        }
        if places:  # the smaller one: what classes are about is spread
            found_by = min(places, key=lambda name: places[name].sum())
            region = places[found_by]
        if found_by == "mistakes":
            counted = counting

    def measure(where: Tensor) -> tuple[Swaps, ClassSwaps]:
        masks = where.to(images.images.device).expand(len(images), -1, -1)
        masked = MaskedDataset(images, masks, seed=seed)
        return (
            swap(network, masked, counted),
            swap_classes(network, images, where, predicted, seed),
        )

    # Moved by quarters of a side, so that no thin bar falls onto itself, be it upright,
    # level or diagonal. What leaves the image comes in at the other edge.
    height, width = size
    elsewhere = []
    for down, right in ((1, 2), (2, 1), (2, 3), (3, 2)):
        moved = region.roll((down * height // 4, right * width // 4), (0, 1))
        elsewhere.append(measure(moved))
    return Audit(images, predicted, maps, found_by, region, *measure(region), elsewhere)


def _range(values: list[float]) -> str:
    """In words: from the smallest to the largest, rounded."""
    smallest, largest = f"{min(values):.0f}", f"{max(values):.0f}"
    return smallest if smallest == largest else f"{smallest} to {largest}"


def region_of(values: Tensor, size: tuple[int, int]) -> Tensor:
    """Where a map is above half of its maximum, and around, H×W, bool.

    Args:
        values: h×w.
        size: H, W.
    """
    positive = values.clamp(min=0)
    maps = positive[None] / positive.max().clamp(min=1e-8)
    return REGION.image_masks(maps, size)[0]


def _halves(labels: Tensor, predicted: Tensor) -> tuple[Tensor, Tensor]:
    """The predictions, with one half of the mistakes, and with the other, N each.

    Of each kind of mistake (class, prediction), every second one is in a half.
    """
    mistakes = (predicted != labels).nonzero()[:, 0]
    kinds = labels[mistakes] * (predicted.max() + 1) + predicted[mistakes]
    by_kind = mistakes[kinds.argsort(stable=True)]
    halves = []
    for start in (0, 1):
        half = by_kind[start::2]
        some = labels.clone()
        some[half] = predicted[half]
        halves.append(some)
    return halves[0], halves[1]
