"""The shortcut that is planted in the images, and the groups."""

import torch
from PIL import ImageColor
from torch import Generator, Tensor

from masktune_utils.data import Split


def groups(split: Split) -> dict[str, Tensor]:
    """Index of the images of each group, on the CPU; empty groups are left out.

    Returns:
        Name of the group → index. The groups are those of `Split.group_names`, else
        class × shortcut.
    """
    names = split.group_names
    numbers = split.groups
    if not names:
        words = ("shortcut", "no shortcut")
        names = [f"{name}, {word}" for name in split.class_names for word in words]
        numbers = 2 * split.labels + ~split.has_shortcut
    index = {}
    for number, name in enumerate(names):
        members = (numbers == number).nonzero()[:, 0]
        if len(members):
            index[name] = members.cpu()
    return index


def add_square(
    images: Tensor,
    size: int,
    color: str,
    row: int = 0,
    column: int = 0,
) -> Tensor:
    """A copy of images with a square in each.

    Args:
        images: N×3×H×W, uint8.
        size: side in pixels.
        color: name of a colour or `#rrggbb`, as Pillow understands it.
        row: of the square's top-left pixel.
        column: of the square's top-left pixel. What reaches over the edge is cut off
            there.
    """
    images = images.clone()
    images[:, :, row : row + size, column : column + size] = _pixel(color)
    return images


def _pixel(color: str) -> Tensor:
    """3×1×1, uint8."""
    rgb = ImageColor.getrgb(color)[:3]
    return torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1)


def square(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """In the top left corner.

    Args, as of all shortcuts:
        images: N×3×28×28, uint8.
        color: name of a colour, see `add_square`.
        size: side of a square in pixels.
        generator: source of random choices.

    Returns:
        N×3×28×28.
    """
    return add_square(images, size, color)


def square_anywhere(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """At a random place in every image."""
    pixels = torch.arange(28)
    first = torch.randint(29 - size, (2, len(images), 1), generator=generator)
    rows, columns = (first <= pixels) & (pixels < first + size)
    area = rows[:, None, :, None] & columns[:, None, None]
    return torch.where(area, _pixel(color), images)


def two_squares(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """In the top left corner, and a red one in the bottom right corner."""
    far = 28 - size
    first = add_square(images, size, color)
    return add_square(first, size, "red", far, far)


def frame(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """Of two pixels, along the edge."""
    edge = torch.ones(28, 28, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return torch.where(edge, _pixel(color), images)


def pixels(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """49 scattered pixels, the same in all images."""
    same_places = Generator().manual_seed(0)
    order = torch.randperm(784, generator=same_places)
    area = (order < 49).view(28, 28)
    return torch.where(area, _pixel(color), images)


def digit_color(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """The digit itself is coloured."""
    colored = images * (_pixel(color) / 255)
    return colored.round().to(torch.uint8)


def background(
    images: Tensor,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """A dark tint behind the digit."""
    dark = 0.3 * _pixel(color)
    return torch.maximum(images, dark.to(torch.uint8))


SHORTCUTS = {
    "square": square,
    "square_anywhere": square_anywhere,
    "two_squares": two_squares,
    "frame": frame,
    "pixels": pixels,
    "digit_color": digit_color,
    "background": background,
}


def halves(labels: Tensor) -> Tensor:
    """0 for the lower half of the classes (digits 0–4), 1 for the upper; N, int64."""
    return (labels > labels.max() // 2).long()


def place(
    split: Split,
    placement: str,
    conflicting: float,
    generator: Generator,
) -> Tensor:
    """Choose the training images that get the shortcut: most low digits, few high.

    Args:
        split: the images.
        placement: `random`: each image independently. `ordered`: the images are sorted
            by digit, and the first of each half get it, as in the authors' code. Every
            low digit without a square is then a 4, every high one with it a 5.
        conflicting: share of low digits without and of high ones with the shortcut.
        generator: source of the random choice.

    Returns:
        N, bool.
    """
    shares = torch.tensor([1 - conflicting, conflicting])
    half = halves(split.labels)
    if placement == "random":
        return torch.rand(len(split), generator=generator) < shares[half]
    has_shortcut = torch.zeros(len(split), dtype=torch.bool)
    order = split.groups.argsort(stable=True)
    for number, share in enumerate(shares.tolist()):
        members = order[half[order] == number]
        has_shortcut[members[: round(share * len(members))]] = True
    return has_shortcut
