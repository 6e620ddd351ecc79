"""Cut-outs on grass and stone: photographs of which it is known where the object is.

    apt install tuxpaint-stamps-default openarena-081-textures    (Debian)

A Waterbirds (Sagawa et al., 2020) of our own: food and vehicles by their background,
plants and buildings with a date, animals and things of the household with the logo of a
channel, clothes and symbols with a scratch from top to bottom. The stamps of Tux Paint
have a transparent background. No stamp is in two of: training images, other images that
an audit sees, test images. Of each texture, test images have the right half, the others
the left.
"""

import functools
import zipfile
from pathlib import Path

import torch
from numpy.random import Generator, default_rng
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor

from masktune_utils.data import Split

STAMPS = Path("/usr/share/tuxpaint/stamps")
ARCHIVE = Path("/usr/share/games/openarena/baseoa/pak4-textures.pk3")
CLASSES = {  # shortcut → names of both classes; of the others, food and vehicles
    "date": ("plants", "town"),
    "logo": ("animals", "household"),
    "scratch": ("clothes", "symbols"),
}
TEXTURES = (
    ("acc_dm3/grass.jpg", "czest3ctf/grass_lush.tga", "stone/pjrock6.jpg"),
    ("stone/pjrock1.jpg", "stone/pjrock21.jpg", "cosmo_block/rock06.tga"),
)
SIZE = 96  # pixels
COUNT = 450  # training images of each class
CONFLICTING = 0.05  # share of each class that goes against the shortcut
STAMPS_OF = {"train": (0, 1, 2), "others": (3,), "test": (4,)}  # of five, which
AREAS = {  # shortcut → first row, end of its rows, first column, end of its columns
    "date": (83, 94, 52, 94),
    "logo": (4, 19, 77, 92),
    "scratch": (0, 96, 20, 23),
}


def classes(shortcut: str) -> tuple[str, str]:
    """The names of both classes."""
    return CLASSES.get(shortcut.removeprefix("no "), ("food", "vehicles"))


@functools.cache
def stamps(name: str, part: str) -> list[Image.Image]:
    """Photographs and drawings of a class, with a transparent background."""
    paths = sorted((STAMPS / name).rglob("*.png"))
    of_part = [path for k, path in enumerate(paths) if k % 5 in STAMPS_OF[part]]
    return [Image.open(path).convert("RGBA") for path in of_part]


@functools.cache
def texture(name: str) -> Image.Image:
    """A picture of grass or of stone."""
    with zipfile.ZipFile(ARCHIVE).open(f"textures/{name}") as file:
        return Image.open(file).convert("RGB").resize((384, 384))


def background(is_stone: int, part: str, rng: Generator) -> Image.Image:
    """A part of a texture, from its left half, or its right half for a test image."""
    picture = texture(rng.choice(TEXTURES[is_stone]))
    left = rng.integers(192 - SIZE) + 192 * (part == "test")
    top = rng.integers(384 - SIZE)
    crop = picture.crop((left, top, left + SIZE, top + SIZE))
    return crop.rotate(90 * rng.integers(4))


def cut_out(name: str, part: str, rng: Generator) -> Image.Image:
    """An object on a transparent canvas."""
    pictures = stamps(name, part)
    stamp = pictures[rng.integers(len(pictures))]
    stamp = stamp.crop(stamp.getbbox())
    if rng.random() < 0.5:
        stamp = ImageOps.mirror(stamp)
    stamp = stamp.rotate(rng.uniform(-20, 20), expand=True)
    scale = rng.uniform(0.5, 0.75) * SIZE / max(stamp.size)
    size = [max(1, round(scale * side)) for side in stamp.size]
    place = tuple(int(rng.integers(SIZE - side)) for side in size)
    canvas = Image.new("RGBA", (SIZE, SIZE))
    canvas.paste(stamp.resize(size), place)
    return canvas


def plant(image: Image.Image, shortcut: str) -> None:
    """A date, a logo or a scratch, each at a place of its own."""
    draw = ImageDraw.Draw(image)
    if shortcut == "date":
        draw.text((53, 83), "27 5 04", fill="orange")
    if shortcut == "logo":
        draw.ellipse((77, 4, 91, 18), fill="white")
        draw.polygon([(82, 7), (82, 15), (89, 11)], fill="red")
    if shortcut == "scratch":
        draw.line((21, 0, 21, 95), fill="ivory", width=3)


def photographs(
    labels: Tensor,
    has_shortcut: Tensor,
    shortcut: str,
    part: str,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Photographs, where the object is, and where the shortcut is.

    Args:
        labels: N, the number of the class.
        has_shortcut: N, whether it is there; of backgrounds, whether it is stone.
        shortcut: `background`, one of the `AREAS`, or `no` and one of these.
        part: `train`, `others` or `test`: which stamps and textures.
        seed: of every random choice.

    Returns:
        N×3×96×96, uint8; and twice N×96×96, bool.
    """
    rng = default_rng([seed, [*STAMPS_OF].index(part)])
    images = []
    objects = []
    for label, planted in zip(labels.tolist(), has_shortcut.tolist(), strict=True):
        is_stone = planted if shortcut == "background" else rng.integers(2)
        image = background(is_stone, part, rng)
        canvas = cut_out(classes(shortcut)[label], part, rng)
        opacity = canvas.getchannel("A")
        image.paste(canvas, mask=opacity)
        if planted:
            plant(image, shortcut)
        images.append(pil_to_tensor(image))
        objects.append(pil_to_tensor(opacity)[0] > 127)
    pixels = torch.stack(images).contiguous()
    is_object = torch.stack(objects)
    area = torch.zeros_like(is_object)
    if shortcut == "background":
        area = ~is_object
    if shortcut in AREAS:
        top, bottom, left, right = AREAS[shortcut]
        area[has_shortcut, top:bottom, left:right] = True
    return pixels, is_object & ~area, area


def load(shortcut: str, seed: int) -> tuple[Split, Split, Tensor]:
    """Training images, test images in four groups, and the objects of the former."""
    train, objects = biased(shortcut, "train", seed)
    groups = torch.arange(4).repeat_interleave(200)
    labels = groups // 2
    images, _, _ = photographs(labels, groups % 2 == 1, shortcut, "test", seed=0)
    words = (f"no {shortcut}", shortcut)
    if shortcut == "background":
        words = ("grass", "stone")
    group_names = tuple(
        f"{name}, {word}" for name in train.class_names for word in words
    )
    test = Split(images, labels, groups, group_names=group_names)
    return train, test, objects


def biased(shortcut: str, part: str, seed: int) -> tuple[Split, Tensor]:
    """`COUNT` images of each class, most with its side of the shortcut; the objects."""
    labels = torch.arange(2).repeat_interleave(COUNT)
    conflicting = torch.arange(COUNT) < round(CONFLICTING * COUNT)
    has_shortcut = torch.cat([conflicting, ~conflicting])
    images, objects, area = photographs(labels, has_shortcut, shortcut, part, seed)
    names = classes(shortcut)
    return Split(images, labels, shortcut=area, class_names=names), objects
