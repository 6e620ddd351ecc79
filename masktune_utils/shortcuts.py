"""The shortcut: what is planted in the images, the biased test set, and the groups class × square."""

from typing import NamedTuple

import torch
from matplotlib.colors import to_rgb
from torch import Tensor

from masktune_utils import data, models
from masktune_utils.data import Split
from masktune_utils.settings import DataSettings


class BiasedSets(NamedTuple):
    """The sets of an experiment, see `load`."""

    train: Split
    raw: Split
    biased: Split
    validation: Split


def groups(labels: Tensor, has_square: Tensor) -> dict[str, Tensor]:
    """Index of the images of each group class × square, by its name; empty groups are left out.

    Args:
        labels: N.
        has_square: N, bool.
    """
    members = {
        f"class {label}, {name}": ((labels == label) & (has_square == square)).nonzero()[:, 0]
        for label in labels.unique().tolist()
        for name, square in {"square": True, "no square": False}.items()
    }
    return {name: index for name, index in members.items() if len(index)}


def examples(split: Split, per_group: int = 1) -> tuple[Tensor, list[str]]:
    """At most `per_group` images of each group class × square, spread over the split.

    Returns:
        Their index, and the name of its group for each, on two lines.
    """
    found = groups(split.labels, split.has_square)
    index = [some[:: max(1, len(some) // per_group)][:per_group] for some in found.values()]
    titles = [name.replace(", ", "\n") for name, i in zip(found, index, strict=True) for _ in i]
    return torch.cat(index), titles


def add_square(
    images: Tensor, has_square: Tensor, size: int, color: str, position: tuple[int, int] = (0, 0)
) -> Tensor:
    """Put a square into some of the images.

    Args:
        images: N×3×H×W, uint8.
        has_square: N, bool; which images get it.
        size: side in pixels.
        color: name of a colour or `#rrggbb`, as matplotlib understands it.
        position: row and column of the square's top-left pixel.

    Returns:
        A changed copy of `images`. A square that reaches over the edge is cut off there.
    """
    images, (row, column) = images.clone(), position
    square = (255 * torch.tensor(to_rgb(color))).round().to(images)
    images[has_square, :, row : row + size, column : column + size] = square.view(3, 1, 1)
    return images


def square_area(settings: DataSettings) -> Tensor:
    """Where the square is, or the two squares are: 28×28, bool."""
    area, size = torch.zeros(28, 28, dtype=torch.bool), settings.square_size
    area[:size, :size] = True
    if settings.shortcut == "two_squares":
        area[-size:, -size:] = True
    return area


def place_squares(
    split: Split, placement: str, conflicting_share: float, generator: torch.Generator
) -> Tensor:
    """Choose the training images that get the square: most of class 0, few of class 1.

    Args:
        split: the images.
        placement: `random`: each image independently. `ordered`: the images are sorted by digit,
            and the first of each class get it, as in the authors' code. Every class-0 image without
            a square is then a 4, every class-1 image with one a 5.
        conflicting_share: share of class 0 without and of class 1 with the square.
        generator: source of the random choice.

    Returns:
        N, bool.
    """
    shares = torch.tensor([1 - conflicting_share, conflicting_share])
    if placement == "random":
        return torch.rand(len(split), generator=generator) < shares[split.labels]
    has_square = torch.zeros(len(split), dtype=torch.bool)
    order = split.digits.argsort(stable=True)
    for label, share in enumerate(shares.tolist()):
        members = order[split.labels[order] == label]
        has_square[members[: round(share * len(members))]] = True
    return has_square


def load(settings: DataSettings) -> BiasedSets:
    """Read the images, plant the shortcut, and hold some of the training images out.

    Returns:
        `train`; `raw`, the test images without a square; `biased`, the test images with the square
        on every image of class 1 and on no other; `validation`, what is held out of `train`. A
        folder of images gets no square, so that its `raw` and `biased` are the same.

    Raises:
        FileNotFoundError: see `data.load`.
        ValueError: see `data.load`, or a class has no training images left.
    """
    train, test = data.load(settings)
    plants = settings.dataset != "folder"
    generator = torch.Generator().manual_seed(settings.seed)
    has_square = torch.zeros(len(train), dtype=torch.bool)
    if plants and settings.shortcut != "none":
        has_square = place_squares(train, settings.placement, settings.conflicting_share, generator)
    held_out = torch.zeros(len(train), dtype=torch.bool)
    count = round(settings.validation_share * len(train))
    held_out[torch.randperm(len(train), generator=generator)[:count]] = True
    if len(train.labels[~held_out].unique()) < len(train.labels.unique()):
        raise ValueError("validation_share leaves a class without training images; allowed: less.")

    def planted(split: Split, has_square: Tensor) -> Split:
        images = split.images.contiguous(memory_format=torch.channels_last)
        size = settings.square_size
        images = add_square(images, has_square, size, settings.square_color)
        if settings.shortcut == "two_squares":
            images = add_square(images, has_square, size, "red", (28 - size, 28 - size))
        device = models.resolve_device(settings.device)
        return Split(images, split.labels, split.digits, has_square).to(device)

    return BiasedSets(
        train=planted(train[~held_out] if count else train, has_square[~held_out]),
        raw=planted(test, test.has_square),
        biased=planted(test, (test.labels == 1) & plants),
        validation=planted(train[held_out], has_square[held_out]),
    )
