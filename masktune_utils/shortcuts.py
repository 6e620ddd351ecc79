"""The shortcut that is planted in the images, the biased test set, and the groups."""

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

    @property
    def tests(self) -> dict[str, Split]:
        """The test sets: `raw` and `biased`; or, of a folder, `test`."""
        if len(self.biased):
            return {"raw": self.raw, "biased": self.biased}
        return {"test": self.raw}


def groups(split: Split) -> dict[str, Tensor]:
    """Index of the images of each group, on the CPU; empty groups are left out.

    Returns:
        Name of the group → index. The groups are those of the folders, else class ×
        shortcut.
    """
    members = {}
    if split.group_names:
        for number, name in enumerate(split.group_names):
            members[name] = split.digits.cpu() == number
    else:
        labels = split.labels.cpu()
        has_shortcut = split.has_shortcut.cpu()
        for label in labels.unique().tolist():
            members[f"class {label}, shortcut"] = (labels == label) & has_shortcut
            members[f"class {label}, no shortcut"] = (labels == label) & ~has_shortcut
    index = {}
    for name, is_in in members.items():
        if is_in.any():
            index[name] = is_in.nonzero()[:, 0]
    return index


def examples(split: Split, per_group: int = 1) -> tuple[Tensor, list[str]]:
    """At most `per_group` images of each group, spread over the split.

    Returns:
        Their index, and the name of its group for each, on two lines.
    """
    chosen = []
    titles = []
    for name, index in groups(split).items():
        step = max(1, len(index) // per_group)
        spread = index[::step][:per_group]
        chosen.append(spread)
        titles += [name.replace(", ", "\n")] * len(spread)
    return torch.cat(chosen), titles


def add_square(
    images: Tensor, size: int, color: str, row: int = 0, column: int = 0
) -> Tensor:
    """A copy of images with a square in each.

    Args:
        images: N×3×H×W, uint8.
        size: side in pixels.
        color: name of a colour or `#rrggbb`, as matplotlib understands it.
        row: of the square's top-left pixel.
        column: of the square's top-left pixel. What reaches over the edge is cut off
            there.
    """
    images = images.clone()
    images[:, :, row : row + size, column : column + size] = _pixel(color)
    return images


def _pixel(color: str) -> Tensor:
    """3×1×1, uint8."""
    rgb = 255 * torch.tensor(to_rgb(color))
    return rgb.round().to(torch.uint8).view(3, 1, 1)


def square(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """In the top left corner.

    Args, as of all shortcuts:
        images: N×3×28×28, uint8.
        settings: have the square's size and the shortcut's colour.
        generator: source of random choices.

    Returns:
        N×3×28×28.
    """
    return add_square(images, settings.square_size, settings.square_color)


def square_anywhere(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """At a random place in every image."""
    size = settings.square_size
    pixels = torch.arange(28)
    first = torch.randint(29 - size, (2, len(images), 1), generator=generator)
    rows, columns = (first <= pixels) & (pixels < first + size)
    area = rows[:, None, :, None] & columns[:, None, None, :]
    return torch.where(area, _pixel(settings.square_color), images)


def two_squares(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """In the top left corner, and a red one in the bottom right corner."""
    far = 28 - settings.square_size
    return add_square(
        square(images, settings, generator), settings.square_size, "red", far, far
    )


def frame(images: Tensor, settings: DataSettings, generator: torch.Generator) -> Tensor:
    """Of two pixels, along the edge."""
    edge = torch.ones(28, 28, dtype=torch.bool)
    edge[2:-2, 2:-2] = False
    return torch.where(edge, _pixel(settings.square_color), images)


def pixels(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """49 scattered pixels, the same in all images."""
    same_places = torch.Generator().manual_seed(0)
    order = torch.randperm(784, generator=same_places)
    area = (order < 49).view(28, 28)
    return torch.where(area, _pixel(settings.square_color), images)


def digit_color(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """The digit itself is coloured."""
    colored = images * (_pixel(settings.square_color) / 255)
    return colored.round().to(torch.uint8)


def background(
    images: Tensor, settings: DataSettings, generator: torch.Generator
) -> Tensor:
    """A dark tint behind the digit."""
    dark = 0.3 * _pixel(settings.square_color)
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


def plant(
    split: Split, which: Tensor, settings: DataSettings, generator: torch.Generator
) -> Split:
    """Plant the shortcut in some of the images.

    Args:
        split: the images, on the CPU.
        which: N, bool.
        settings: if its `shortcut` is `none`, these images get the square.
        generator: see `square`.
    """
    name = "square" if settings.shortcut == "none" else settings.shortcut
    add = SHORTCUTS[name]
    before = split.images[which]
    after = add(before, settings, generator)
    images = split.images.clone()
    images[which] = after
    area = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool)
    area[which] = (after != before).any(1)
    return Split(images, split.labels, split.digits, area)


def halves(labels: Tensor) -> Tensor:
    """0 for the lower half of the classes (digits 0–4), 1 for the upper; N, int64."""
    return (labels > labels.max() // 2).long()


def place(
    split: Split, placement: str, conflicting: float, generator: torch.Generator
) -> Tensor:
    """Choose the training images that get the shortcut: most of class 0, few of 1.

    With digits as classes, 0–4 stand for class 0 and 5–9 for class 1.

    Args:
        split: the images.
        placement: `random`: each image independently. `ordered`: the images are sorted
            by digit, and the first of each class get it, as in the authors' code. Every
            class-0 image without a square is then a 4, every class-1 image with one a
            5.
        conflicting: share of class 0 without and of class 1 with the shortcut.
        generator: source of the random choice.

    Returns:
        N, bool.
    """
    shares = torch.tensor([1 - conflicting, conflicting])
    half = halves(split.labels)
    if placement == "random":
        return torch.rand(len(split), generator=generator) < shares[half]
    has_shortcut = torch.zeros(len(split), dtype=torch.bool)
    order = split.digits.argsort(stable=True)
    for number, share in enumerate(shares.tolist()):
        members = order[half[order] == number]
        has_shortcut[members[: round(share * len(members))]] = True
    return has_shortcut


def load(settings: DataSettings) -> BiasedSets:
    """Read the images, plant the shortcut, and hold some of the training images out.

    Returns:
        `train`; `raw`, the test images without a shortcut; `biased`, the test images
        with it in every image of class 1 (of ten classes, the last five; see `halves`)
        and in no other; `validation`, what is held out of `train`: the
        `validation_share`, or the other `half`. Nothing is planted in a folder of
        images: its test set is `raw`, and `biased` is empty.

    Raises:
        FileNotFoundError: see `data.load`.
        ValueError: see `data.load`; a class has no training images left; or none can be
            held out.
    """
    train, test = data.load(settings)
    num_classes = len(train.labels.unique())
    generator = torch.Generator().manual_seed(settings.seed)
    biased = test[:0]
    which = torch.zeros(len(train), dtype=torch.bool)
    if settings.dataset != "folder" and settings.shortcut != "none":
        which = place(train, settings.placement, settings.conflicting_share, generator)
    held_out_order = torch.randperm(len(train), generator=generator)
    if settings.dataset != "folder":
        train = plant(train, which, settings, generator)
        biased = plant(test, halves(test.labels) == 1, settings, generator)
    train, validation = _hold_out(train, held_out_order, settings)
    if len(train.labels.unique()) < num_classes:
        name = "validation_share" if settings.half is None else "half"
        raise ValueError(
            f"{name} leaves a class without training images; allowed: more images."
        )
    device = models.resolve_device(settings.device)
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
    if settings.half is not None:
        two_halves = data.stratified_halves(train.labels, settings.seed)
        validation = train[two_halves[1 - settings.half]]
        train = train[two_halves[settings.half]]
    return train, validation
