"""Devices and files: atomic writing, weights, and checkpoints, refused by name."""

import hashlib
import io
import os
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masktune_utils import models
from masktune_utils.settings import DEFAULTS, root


class CheckpointError(ValueError):
    """A file that is damaged, foreign, or was made with other settings."""


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        model: in evaluation mode.
        settings: what made it, as plain values; none for a plain state dict.
        history: see `training.train`, without the seconds.
    """

    model: nn.Module
    settings: dict[str, Any]
    history: list[dict[str, float]]


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes CUDA if there is one, then MPS, then CPU.

    Raises:
        ValueError: PyTorch does not know the name, or this machine does not have the
            device.
    """
    if device == "auto":
        device = torch.accelerator.current_accelerator(check_available=True) or "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        allowed = f"auto, cpu, or a device of this machine ({reason})"
        raise ValueError(f"device is {device!r}; allowed: {allowed}.") from None
    return torch.device(device)


def check_writable(directory: str) -> None:
    """Make the folder of all files, unless it is there; see if it can be written to.

    Args:
        directory: see `Settings.directory`.

    Raises:
        ValueError: it cannot.
    """
    folder = root(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        allowed = f"a folder to write to, or a new one ({error.strerror})"
        raise ValueError(f"directory is {directory!r}; allowed: {allowed}.") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that takes the place of `path` only once it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}."
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=prefix) as unfinished:
        part = Path(unfinished) / "part"
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save by torch.save, through memory: torch hides that a disk is full."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def read_tensors(path: Path) -> Any:
    """What `write_tensors` saved. It runs no code; a damaged file raises an error."""
    file = io.BytesIO(path.read_bytes())
    if zipfile.is_zipfile(file):
        damaged = zipfile.ZipFile(file).testzip()
        if damaged:
            # torch does not look
            raise ValueError(f"its part {damaged} has another CRC")
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def write_arrays(path: Path, arrays: dict[str, Any]) -> None:
    """Save arrays by np.savez_compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """What `write_arrays` saved. It runs no code; a damaged file raises an error."""
    with np.load(path, allow_pickle=False) as arrays:
        return dict(arrays)


def save_checkpoint(
    path: Path, model: nn.Module, settings: dict, history: list[dict]
) -> None:
    """Save a model with its settings and its history.

    The same run on the same machine writes the same bytes.

    Args:
        path: the file; it is replaced once the new one is complete.
        model: the model.
        settings: what made it, as plain values.
        history: see `training.train`; saved without the seconds, which differ from run
            to run.
    """
    state = model.state_dict()
    weights = {name: state[name].cpu().contiguous() for name in state}
    rows = [{key: row[key] for key in row if key != "seconds"} for row in history]
    content = {"state_dict": weights, "settings": settings, "history": rows}
    write_tensors(path, content)


def load_checkpoint(
    path: str | Path, settings: dict | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Load a model, and refuse it if anything is wrong. No code in the file is run.

    Args:
        path: a file of `save_checkpoint`; if `settings` is None, also a plain state
            dict.
        settings: what the model must have been made with.
        device: where to put the model.

    Raises:
        CheckpointError: the file is damaged, foreign, or made with other settings. The
            message names the file and what is wrong.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a checkpoint.")
    try:
        content = read_tensors(path)
        if settings is None and "state_dict" not in content:
            content = {"state_dict": content, "settings": {}, "history": []}
        checkpoint = _checked(content)
    except Exception as error:  # torch has no class of its own for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{path} is damaged, foreign or of another version ({reason})."
        ) from error
    # A setting that is younger than the file had its default.
    made_with = {**DEFAULTS, **checkpoint.settings}
    for name, asked in (settings or {}).items():
        if made_with.get(name) != asked:
            raise CheckpointError(
                f"{path} was made with {name} = {made_with.get(name)!r}, not {asked!r}."
                " Delete it, use retrain = True, or use another directory."
            )
    checkpoint.model.to(device, memory_format=torch.channels_last).eval()
    return checkpoint


def _checked(content: dict[str, Any]) -> Checkpoint:
    """What a file holds, unless something is wrong with it; the model is on the CPU."""
    weights = content["state_dict"]
    made_with = dict(content["settings"])
    unknown = made_with.keys() - DEFAULTS - {"base_sha256"}
    if unknown:
        raise ValueError(
            f"another version wrote it, with the setting {', '.join(unknown)}"
        )
    *_, last_bias = weights.values()
    model = models.SmallCNN(len(last_bias))
    model.load_state_dict(weights)
    return Checkpoint(model, made_with, list(content["history"]))
