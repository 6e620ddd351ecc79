"""Photographs of solar cells, intact or defective, with a printed tag.

    pip install elpv-dataset

The photographs (Buerhop-Lutz et al., 2018; Deitsch et al., 2019, 2021) are under CC
BY-NC-SA 4.0: they are read from the package, and never saved.
"""

import functools

import numpy as np
import torch
from elpv_dataset.utils import load_dataset
from PIL import Image, ImageDraw
from torch import Tensor

from masktune_utils.data import Split

SIZE = 112  # pixels
RARE = 0.05  # share of each class that goes against the shortcut
TAG = (slice(-16, -4), slice(-36, -4))  # where it is: rows, columns
SHORTCUTS = {  # and how many training images of each class there are
    "cell type": 210,
    "tag": 470,
    "none": 470,
}
NAMES = ("intact", "defective")


@functools.cache
def photographs() -> tuple[Tensor, Tensor, Tensor]:
    """Images N×3×112×112, whether they are defective, and whether polycrystalline.

    Cells about whose defects the experts were unsure are left out.
    """
    images, probability, kinds = load_dataset()
    is_sure = np.isin(probability, (0.0, 1.0))
    pixels = []
    for image in images[is_sure]:
        resized = Image.fromarray(image).resize((SIZE, SIZE)).convert("RGB")
        pixels.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    labels = torch.from_numpy(probability[is_sure]).long()
    return (
        torch.stack(pixels),
        labels,
        torch.from_numpy(kinds[is_sure] == "poly").long(),
    )


def add_tag(images: Tensor) -> Tensor:
    """A serial tag in the lower right corner, the same on each."""
    tag = Image.new("L", (32, 12))
    ImageDraw.Draw(tag).text((2, 0), "B-07", fill=255)
    images = images.clone()
    images[:, :, *TAG] = torch.from_numpy(np.array(tag))
    return images


def draw(members: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Some of the images for which `members` is true, at random."""
    index = members.nonzero()[:, 0]
    return index[torch.randperm(len(index), generator=rng)[:count]]


def load(shortcut: str, seed: int) -> tuple[Split, Split, None]:
    """Training and test images; groups are class × tag, or class × type of cell.

    Where the object is, is not known: it is everywhere.
    """
    rng = torch.Generator().manual_seed(seed)
    images, labels, types = photographs()
    count = SHORTCUTS[shortcut]
    if shortcut == "cell type":
        chosen = biased_types(labels, types, count, rng)
    else:
        parts = [draw(labels == label, count, rng) for label in (0, 1)]
        chosen = torch.cat(parts)
    train = Split(images[chosen], labels[chosen])
    if shortcut == "tag":
        train = with_tag(train, rng)
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[chosen] = False
    test = Split(images[is_test], labels[is_test], types[is_test])
    grouped = of_types(test) if shortcut == "cell type" else of_tags(test)
    return train, grouped, None


def biased_types(
    labels: Tensor, types: Tensor, count: int, rng: torch.Generator
) -> Tensor:
    """Images of which most intact cells are poly-, most defective monocrystalline."""
    parts = []
    for label in (0, 1):
        for kind in (0, 1):
            share = RARE if kind == label else 1 - RARE
            members = (labels == label) & (types == kind)
            parts.append(draw(members, round(share * count), rng))
    return torch.cat(parts)


def with_tag(train: Split, rng: torch.Generator) -> Split:
    """The tag on most defective cells, and on few of the others."""
    shares = torch.tensor([RARE, 1 - RARE])[train.labels]
    has_tag = torch.rand(len(train), generator=rng) < shares
    images = train.images.clone()
    images[has_tag] = add_tag(images[has_tag])
    area = torch.zeros_like(images[:, 0], dtype=torch.bool)
    area[has_tag, TAG[0], TAG[1]] = True
    return Split(images, train.labels, shortcut=area)


def of_types(test: Split) -> Split:
    """The test images in groups by class and type of cell."""
    names = [f"{name}, {kind}" for name in NAMES for kind in ("mono", "poly")]
    groups = 2 * test.labels + test.groups
    return Split(test.images, test.labels, groups, group_names=tuple(names))


def of_tags(test: Split) -> Split:
    """The test images, all of them without and with the tag, in groups."""
    names = [f"{name}, {tag}" for name in NAMES for tag in ("no tag", "tag")]
    images = torch.cat([test.images, add_tag(test.images)])
    labels = test.labels.repeat(2)
    has_tag = torch.arange(2).repeat_interleave(len(test))
    return Split(images, labels, 2 * labels + has_tag, group_names=tuple(names))
