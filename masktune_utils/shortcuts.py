"""The shortcut that is planted in images, and which images get it."""

import torch
from PIL import ImageColor
from torch import Generator, Tensor

from masktune_utils.data import Split

SHORTCUTS = (
    "square",
    "square_anywhere",
    "two_squares",
    "frame",
    "pixels",
    "digit_color",
    "background",
)


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


def add_shortcut(
    images: Tensor,
    shortcut: str,
    color: str,
    size: int,
    generator: Generator,
) -> Tensor:
    """A copy of images with a shortcut in each.

    Args:
        images: N×3×28×28, uint8.
        shortcut: `square`: in the top left corner; also for `none`, of which only the
            test images have it. `square_anywhere`: at a random place in every image.
            `two_squares`: in the top left corner, and a red one in the bottom right
            corner. `frame`: of two pixels, along the edge. `pixels`: 49 scattered ones,
            the same in all images. `digit_color`: the digit itself is coloured.
            `background`: a dark tint behind the digit.
        color: name of a colour, see `add_square`.
        size: side of a square in pixels.
        generator: source of random choices.
    """
    colored_pixel = pixel(color)
    match shortcut:
        case "square" | "none":
            return add_square(images, size, color)
        case "two_squares":
            first = add_square(images, size, color)
            return add_square(first, size, "red", 28 - size, 28 - size)
        case "digit_color":
            colored = images * (colored_pixel / 255)
            return colored.round().byte()
        case "background":
            dark = 0.3 * colored_pixel
            return torch.maximum(images, dark.byte())
        case "square_anywhere":
            places = torch.arange(28)
            first = torch.randint(29 - size, (2, len(images), 1), generator=generator)
            rows, columns = (first <= places) & (places < first + size)
            area = rows[:, None, :, None] & columns[:, None, None]
        case "frame":
            area = torch.ones(28, 28, dtype=torch.bool)
            area[2:-2, 2:-2] = False
        case "pixels":
            order = torch.randperm(784, generator=Generator().manual_seed(0))
            area = (order < 49).view(28, 28)
    return torch.where(area, colored_pixel, images)


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
