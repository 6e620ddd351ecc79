"""Image files as one uint8 tensor. They are decoded once, into a file that is kept."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from joblib import Parallel, delayed
from joblib import hash as fingerprint
from PIL import Image, ImageOps
from torch import Tensor

from masktune_utils import progress

# Bytes of images; more stay in the file, and go to a GPU batch by batch. (A choice
# still copies half of them into memory, and a second round the masked ones.)
IN_MEMORY = 4 * 2**30


def decode(paths: Sequence[str], side: int, folder: Path) -> Tensor:
    """Read images, and squeeze each to a square.

    Args:
        paths: of the files; of an animated image the first picture is read.
        side: of the squares, in pixels.
        folder: where the decoded images are kept, for the same files with the same
            times of change.

    Returns:
        N×3×side×side, uint8, channels last.

    Raises:
        OSError: the disk has no room.
        ValueError: files cannot be read; or the file of decoded images is damaged.
    """
    shape = (len(paths), side, side, 3)
    files = []
    for path in paths:
        status = Path(path).stat()
        files.append((path, status.st_size, status.st_mtime_ns))
    decoded = folder / f"{fingerprint((side, files))}.npy"
    if not decoded.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(folder).free < np.prod(shape):
            raise OSError(
                f"{folder} has no room for {np.prod(shape):,} bytes of images."
            )
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:
            part = Path(unfinished) / decoded.name
            _read(paths, np.lib.format.open_memmap(part, "w+", np.uint8, shape))
            part.replace(decoded)
    try:
        pixels = np.load(decoded, "c", allow_pickle=False).reshape(shape)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{decoded} is damaged ({error}). Delete it.") from error
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _read(paths: Sequence[str], pixels: np.ndarray) -> None:
    """Read all images side by side into N×side×side×3."""
    size = pixels.shape[1:3]

    def read(k: int) -> str:
        try:
            with Image.open(paths[k]) as image:
                image.draft("RGB", size)  # a large JPEG is decoded at a smaller scale
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bit
                    image = image.convert("I")  # also of a big-endian file
                    image = image.point(lambda value: value / 256).convert("L")
                pixels[k] = image.convert("RGB").resize(size, Image.Resampling.BILINEAR)
        except Exception as error:  # noqa: BLE001 - PIL has many
            return f"{paths[k]} ({error})"
        return ""

    parallel = Parallel(-1, prefer="threads", return_as="generator")
    messages = parallel(delayed(read)(k) for k in range(len(paths)))
    messages = progress.bar(
        messages, total=len(paths), unit="image", desc="reading images"
    )
    bad = [message for message in messages if message]
    if bad:
        first = ", ".join(bad[:10])
        raise ValueError(f"{len(bad)} of {len(paths)} images cannot be read: {first}.")
