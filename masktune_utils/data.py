"""Images with labels, as one set: a `Split`, made from any data set of torch."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil
import torch
from PIL import Image, ImageOps, ImageStat
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from masktune_utils import progress

FEWEST = 10  # images of a class, in a folder
BYTES = 48  # of memory that a pixel takes in a choice, masks included: measured


@dataclass(eq=False)
class Split(Dataset):
    """A set of images, all on one device.

    It is a data set of torch: `split[3]` is an image, C×H×W in [0, 1], and its label. A
    tensor, a list or a slice as index gives a `Split`.

    Attributes:
        images: N×C×H×W, uint8, or floating point in [0, 1]; a tensor or a NumPy array.
        labels: N, int64, 0, 1, …; a tensor, an array or a list.
        groups: N, int64: the number of the group in `group_names`; of digits, 0–9. By
            default the labels. They are for reports only.
        shortcut: N×H×W, bool, True where the shortcut is; by default N×1×1, nowhere.
        group_names: if there are none, the groups are class × shortcut.
        class_names: by default `class 0`, `class 1`, ….

    Raises:
        ValueError: another shape, type or range; the message tells what is allowed.
    """

    images: Tensor
    labels: Tensor
    groups: Tensor | None = None
    shortcut: Tensor | None = None
    group_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        images = self.images = torch.as_tensor(self.images)
        labels = self.labels = torch.as_tensor(self.labels)
        if self.groups is None:
            self.groups = labels
        if self.shortcut is None:
            self.shortcut = torch.zeros_like(labels, dtype=torch.bool).view(-1, 1, 1)
        is_image = images.dtype == torch.uint8
        if images.is_floating_point():
            is_image = torch.equal(images, images.clamp(0, 1))
        if images.ndim != 4 or not is_image:
            raise ValueError(
                f"images are {images.dtype}, {tuple(images.shape)}; allowed: N×C×H×W, "
                "uint8 or floating point from 0 to 1 (normalise them inside the "
                "network)."
            )
        counts = [len(of) for of in (images, labels, self.groups, self.shortcut)]
        if len(set(counts)) > 1:
            raise ValueError(
                f"there are {counts} images, labels, groups and areas of the shortcut; "
                "allowed: as many of each."
            )
        for name, numbers in {"labels": labels, "groups": self.groups}.items():
            is_number = numbers.dtype == torch.int64 and numbers.ndim == 1
            if not is_number or (numbers < 0).any():
                raise ValueError(
                    f"{name} are {tuple(numbers.shape)}, {numbers.dtype}, from "
                    f"{numbers.min()}; allowed: N, torch.int64, from 0."
                )
        count = len(labels.bincount())
        if not self.class_names:
            self.class_names = tuple(f"class {number}" for number in range(count))
        names = self.class_names
        if len(names) < count or len(set(names)) < len(names):
            raise ValueError(
                f"class_names are {names}; allowed: {count} or more, each once."
            )

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> Self:
        """Read all images of a map-style data set into memory.

        Args:
            dataset: pairs of an image and a label, 0, 1, …. Images are of one size:
                PIL images, arrays H×W×C, or tensors C×H×W; uint8, or floating point
                in [0, 1], of the type of the network's weights. Its `classes`, if it
                has any, are the names of the classes, unless its `target_transform`
                changes the labels.

        Raises:
            IndexError: there is no image.
            RuntimeError: images differ in size.
            TypeError: one is no image.
            ValueError: an item is no pair; see also `Split`.
        """
        from torchvision.transforms.v2.functional import to_image  # takes seconds

        pairs = []
        for number in progress.bar(range(len(dataset)), desc="reading images"):
            image, label = dataset[number]
            if getattr(image, "mode", "") in ("P", "PA"):  # numbers of a palette
                image = _on_white(image)
            pairs.append((to_image(image), label))
        images, labels = default_collate(pairs)
        class_names = getattr(dataset, "classes", ())
        if getattr(dataset, "target_transform", None):
            class_names = ()
        return cls(images, labels, class_names=tuple(class_names))

    @classmethod
    def from_folder(cls, folder: str | Path, size: int) -> Self:
        """Read photographs from a folder of folders, one for each class.

        Their order is that of torchvision's `ImageFolder`, without what is hidden.
        Files that are no images of eight bits a channel are skipped, and counted in a
        line that is printed. So it is told if one class has wider images than another.

        Args:
            folder: where the folders are. Their names are those of the classes.
            size: pixels, to which the longer side is resized. The image is made square
                by its mean colour, on both sides. Transparent pixels become white.

        Raises:
            FileNotFoundError: there is no such folder, no folder in it, or no file in
                one of these.
            ValueError: `size` is no number of pixels; there is one class, or a class
                with fewer than `FEWEST` images; most files are no images; or they do
                not fit into memory.
        """
        from torchvision.datasets import ImageFolder  # takes seconds

        class VisibleFolder(ImageFolder):
            def find_classes(self, directory: str) -> tuple[list, dict]:
                names, _ = super().find_classes(directory)
                visible = [name for name in names if not name.startswith(".")]
                return visible, {name: k for k, name in enumerate(visible)}

        if size < 1:
            raise ValueError(f"size is {size}; allowed: 1 pixel or more.")
        folder = Path(folder).expanduser()
        proportions = []  # width / height; NaN: no image

        def open_square(path: str) -> Image.Image:
            try:
                image = Image.open(path)
                if image.mode[0] in "IF":
                    raise ValueError  # Pillow would cut off all but eight bits
                image.draft("RGB", (size, size))  # a large JPEG is read in less time
                upright = _on_white(ImageOps.exif_transpose(image))
                mean = tuple(map(round, ImageStat.Stat(upright).mean))
                square = ImageOps.pad(upright, (size, size), color=mean)
                proportions.append(upright.width / upright.height)
            except Exception:  # noqa: BLE001 - of Pillow, for damaged files
                square = Image.new("RGB", (size, size))
                proportions.append(math.nan)
            return square

        def is_visible(path: str) -> bool:
            parts = Path(path).relative_to(folder).parts
            return not any(part.startswith(".") for part in parts)

        dataset = VisibleFolder(folder, loader=open_square, is_valid_file=is_visible)
        targets = torch.tensor(dataset.targets)
        needed = BYTES * len(dataset) * size**2
        if needed > psutil.virtual_memory().available:
            raise ValueError(
                f"{len(dataset)} images take {needed / 1e9:.1f} GB of memory, more than "
                "is free; allowed: a smaller size, or fewer images."
            )
        _check_counts(dataset.classes, targets)
        split = cls.from_dataset(dataset)
        widths = torch.tensor(proportions)
        others = widths.isnan().nonzero()[:, 0].tolist()
        if others:
            names = [
                f"{Path(dataset.imgs[k][0]).relative_to(folder)}" for k in others[:3]
            ]
            words = f"{len(others)} of {len(dataset)} files are no images, as {names}"
            if 2 * len(others) > len(dataset):
                raise ValueError(f"{words}; allowed: at most half of them.")
            print(f"{words}: they are skipped.")
            split = split[~widths.isnan()]
            _check_counts(dataset.classes, split.labels)
        _tell_of_padding(dataset.classes, targets, widths)
        return split

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def has_shortcut(self) -> Tensor:
        """N, bool."""
        return self.shortcut.flatten(1).any(1)

    def _change(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same with all tensors changed."""
        tensors = map(change, (self.images, self.labels, self.groups, self.shortcut))
        return type(self)(*tensors, self.group_names, self.class_names)

    def __getitem__(self, index: int | Tensor | slice) -> Any:
        if isinstance(index, int) or getattr(index, "ndim", 1) == 0:
            return to_float(self.images[index]), self.labels[index].item()
        return self._change(lambda tensor: tensor[index])

    def to(self, device: torch.device) -> Self:
        """The images on another device."""
        return self._change(lambda tensor: tensor.to(device))

    def in_epoch(self, epoch: int) -> Self:  # noqa: ARG002 - a masked data set needs it
        """The images of an epoch of training: they are the same in each."""
        return self

    def batch(
        self, index: Tensor | slice, device: torch.device | None = None
    ) -> tuple[Tensor, Tensor]:
        """Images as floating point in [0, 1], B×C×H×W, and their labels, B.

        Args:
            index: which images.
            device: where to put them; by default they stay where they are.
        """
        images = self.images[index].to(device)  # then to float: bytes are quicker sent
        return to_float(images), self.labels[index].to(device)


def group_members(split: Split) -> dict[str, Tensor]:
    """Index of the images of each group, on the CPU; empty groups are left out.

    Returns:
        Name of the group → index. The groups are those of `Split.group_names`, else
        class × shortcut.

    Raises:
        IndexError: a group or class has no name.
    """
    names = split.group_names
    numbers = split.groups
    if not names:
        words = ("shortcut", "no shortcut")
        names = [f"{name}, {word}" for name in split.class_names for word in words]
        numbers = 2 * split.labels + ~split.has_shortcut
    return {
        names[number]: (numbers == number).nonzero()[:, 0].cpu()
        for number in numbers.unique().tolist()
    }


def check_split(images: object) -> None:
    """Refuse images of another kind, where people give their own.

    Raises:
        TypeError: they are no `Split`.
    """
    if not isinstance(images, Split):
        raise TypeError(
            f"the images are a {type(images).__name__}; allowed: a Split, as "
            "Split.from_dataset(images) is one."
        )


def _check_counts(names: list[str], labels: Tensor) -> None:
    """Refuse a class without enough images."""
    counts = labels.bincount(minlength=len(names)).tolist()
    if len(counts) < 2 or min(counts) < FEWEST:
        raise ValueError(
            f"the folders {names} have {counts} images; allowed: 2 folders or more, of "
            f"{FEWEST} images or more each."
        )


def _tell_of_padding(names: list[str], labels: Tensor, widths: Tensor) -> None:
    """Print it, if the images of one class are wider than those of another."""
    of_classes = [widths[labels == k].nanmean().item() for k in range(len(names))]
    if max(of_classes) > 1.1 * min(of_classes):
        words = [f"{name} {of_classes[k]:.2f}" for k, name in enumerate(names)]
        print(
            f"Width / height differs by class: {', '.join(words)}. So does the padding: "
            "a network may learn it, and marks in a corner move. Crop all to one shape."
        )


def _on_white(image: Image.Image) -> Image.Image:
    """In RGB, as viewers show it: colours of transparent pixels are not seen."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    opaque = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, opaque).convert("RGB")


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; what has another type stays as it is."""
    return images / 255 if images.dtype == torch.uint8 else images


def folds(labels: Tensor, seed: int) -> list[Tensor]:
    """Two folds, each with half of the images of each class, at random.

    Args:
        labels: N, on any device.
        seed: of the choice.

    Returns:
        The index of the images of each fold, in ascending order, on the CPU.
    """
    from sklearn.model_selection import StratifiedKFold  # takes a second

    splitter = StratifiedKFold(2, shuffle=True, random_state=seed)
    classes = labels.cpu().numpy()
    return [torch.from_numpy(index) for _, index in splitter.split(classes, classes)]
