"""Image files as one uint8 tensor. They are decoded once, into a file that is kept."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from joblib import Memory, Parallel, delayed
from joblib import hash as fingerprint
from PIL import Image, ImageOps
from torch import Tensor

from masktune_utils import progress


def decode(paths: Sequence[str], side: int, folder: Path) -> Tensor:
    """Read images, and squeeze each to a square.

    Args:
        paths: of the files; of an animated image the first picture is read.
        side: of the squares, in pixels.
        folder: where the decoded images are kept, for the same files with the same
            sizes and times of change; those of other files are deleted.

    Returns:
        N×3×side×side, uint8, channels last.

    Raises:
        ValueError: files cannot be read.
    """
    files = []
    for path in paths:
        status = Path(path).stat()
        files.append((path, status.st_size, status.st_mtime_ns))
    place = fingerprint((side, os.path.commonpath(paths)))
    memory = Memory(folder / place, mmap_mode="c", verbose=0)
    read = memory.cache(_read)
    if not read.check_call_in_cache(files, side):
        read.clear(warn=False)
    return torch.from_numpy(read(files, side)).permute(0, 3, 1, 2)


def _read(files: Sequence[tuple], side: int) -> np.ndarray:
    """Read all images side by side: N×side×side×3."""
    paths = [path for path, *_ in files]
    tasks = [delayed(_read_one)(path, (side, side)) for path in paths]
    outcomes = Parallel(-1, prefer="threads", return_as="generator")(tasks)
    pixels = np.empty((len(paths), side, side, 3), np.uint8)
    bad = []
    bar = progress.bar(outcomes, total=len(paths), desc="reading images")
    for number, outcome in enumerate(bar):
        if isinstance(outcome, str):
            bad.append(outcome)
        else:
            pixels[number] = outcome
    if bad:
        first = ", ".join(bad[:10])
        raise ValueError(f"{len(bad)} of {len(paths)} images cannot be read: {first}.")
    return pixels


def _read_one(path: str, size: tuple[int, int]) -> np.ndarray | str:
    """The pixels of an image; or why it cannot be read."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", size)  # a large JPEG is decoded at a smaller scale
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I"):  # 16 bit
                image = image.convert("I")  # also of a big-endian file
                image = image.point(lambda value: value / 256).convert("L")
            image = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
            return np.asarray(image)
    except Exception as error:  # noqa: BLE001 - PIL has many
        return f"{path} ({error})"
