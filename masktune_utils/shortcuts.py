"""The shortcut that is planted in images, and which images get it."""

import torch
from PIL import ImageColor
from torch import Generator, Tensor

from masktune_utils.data import Split


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
    images[:, :, row : row + size, column : column + size] = pixel(color)
    return images


def pixel(color: str) -> Tensor:
    """3×1×1, uint8."""
    rgb = ImageColor.getrgb(color)[:3]
    return torch.tensor(rgb, dtype=torch.uint8).view(3, 1, 1)


def _square(images: Tensor, color: str, size: int, _: Generator) -> Tensor:
    """In the top left corner."""
    return add_square(images, size, color)


def _square_anywhere(
    images: Tensor, color: str, size: int, generator: Generator
) -> Tensor:
    """At a random place in every image."""
    places = torch.arange(28)
    first = torch.randint(29 - size, (2, len(images), 1), generator=generator)
    rows, columns = (first <= places) & (places < first + size)
    area = rows[:, None, :, None] & columns[:, None, None]
    return torch.where(area, pixel(color), images)


def _two_squares(images: Tensor, color: str, size: int, _: Generator) -> Tensor:
    """In the top left corner, and a red one in the bottom right corner."""
    first = add_square(images, size, color)
    return add_square(first, size, "red", 28 - size, 28 - size)


def _frame(images: Tensor, color: str, _size: int, _: Generator) -> Tensor:
    """Of two pixels, along the edge."""
    area = torch.ones(28, 28, dtype=torch.bool)
    area[2:-2, 2:-2] = False
    return torch.where(area, pixel(color), images)


def _pixels(images: Tensor, color: str, _size: int, _: Generator) -> Tensor:
    """49 scattered ones, the same in all images."""
    order = torch.randperm(784, generator=Generator().manual_seed(0))
    area = (order < 49).view(28, 28)
    return torch.where(area, pixel(color), images)


def _digit_color(images: Tensor, color: str, _size: int, _: Generator) -> Tensor:
    """The digit itself is coloured."""
    colored = images * (pixel(color) / 255)
    return colored.round().byte()


def _background(images: Tensor, color: str, _size: int, _: Generator) -> Tensor:
    """A dark tint behind the digit."""
    dark = 0.3 * pixel(color)
    return torch.maximum(images, dark.byte())


SHORTCUTS = {  # name → (images, color, size, generator) → a copy with it
    "square": _square,
    "square_anywhere": _square_anywhere,
    "two_squares": _two_squares,
    "frame": _frame,
    "pixels": _pixels,
    "digit_color": _digit_color,
    "background": _background,
}


def halves(labels: Tensor) -> Tensor:
    """0 for the lower half of the classes (digits 0–4), 1 for the upper; N, int64."""
    return (labels > labels.max() // 2).long()


def choose_images(
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
    ranks = split.groups.argsort(stable=True).argsort()
    counts = half.bincount()
    ranks -= half * counts[0]  # among the images of the same half
    return ranks < (shares * counts).round()[half]
