"""Files, which are whole or not there; and one cache.

No module of the package is imported here.
"""

import contextlib
import hashlib
import io
import json
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class CheckpointError(ValueError):
    """A file that is damaged, foreign, or was made with something else."""


def sha256(tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that takes its place only once it is complete.

    Args:
        path: the file.
        content: what is in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".tmp") as folder:
        unfinished = Path(folder) / path.name
        unfinished.write_bytes(content)
        unfinished.replace(path)


@contextlib.contextmanager
def blame(path: Path) -> Iterator[None]:
    """Whatever goes wrong here is blamed on the file that is read.

    Raises:
        CheckpointError: it is damaged or foreign; the message names it.
    """
    try:
        yield
    except Exception as error:  # torch has no class of its own for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{path} is damaged, foreign or of another version ({reason}). Delete it, "
            "and the notebook in runs that made it."
        ) from error


def read(path: Path) -> Any:
    """What torch.save has written; no code in the file is run.

    Args:
        path: the file.

    Raises:
        CheckpointError: the file is damaged or foreign.
        FileNotFoundError: there is none.
    """
    with path.open("rb") as file, blame(path):
        if zipfile.is_zipfile(file) and zipfile.ZipFile(file).testzip():
            raise ValueError("a part has another CRC")  # torch does not look
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def load_or_make(
    path: Path,
    made_with: dict,
    make: Callable[[], dict],
    **defaults: Any,
) -> dict:
    """What a file holds; it is made first if it is not there, and never replaced.

    The same content gives the same bytes.

    Args:
        path: the file.
        made_with: all that the content depends on, by name, as values that JSON has.
        make: returns the content: tensors and plain values by name.
        **defaults: by name, the value that is meant where the file, or `made_with`,
            does not have the name.

    Returns:
        The content, and `settings`: with what it was made.

    Raises:
        CheckpointError: the file is damaged or foreign, or was made with something
            else.
        OSError: it cannot be written; nothing is made then.
        TypeError: a value that JSON does not have.
    """
    made_with = json.loads(json.dumps(made_with))
    if not path.exists():
        # It fails before anything is made.
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent) as probe:
            probe.write(bytes(2**20))  # as much as a checkpoint
        # Through memory: torch hides that a disk is full.
        buffer = io.BytesIO()
        content = {**make(), "settings": made_with}
        torch.save(content, buffer)
        write_bytes(path, buffer.getvalue())
    content = read(path)
    with blame(path):
        settings = content["settings"]
        names = {**settings, **made_with}
    for name in names:
        value = settings.get(name, defaults.get(name))
        wanted = made_with.get(name, defaults.get(name))
        if value != wanted:
            raise CheckpointError(
                f"{path} was made with {name} = {value!r}, not {wanted!r}. "
                "Delete it, or use another directory."
            )
    return content
