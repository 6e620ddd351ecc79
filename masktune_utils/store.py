"""Files: atomic writing, checkpoints, results, and the table of all results."""

import hashlib
import io
import json
import os
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from masktune_utils import models
from masktune_utils.settings import DEFAULTS, REPOSITORY

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
RESULT = {*KEY, "sha256", "base_sha256", "seconds", "worst_group", "metrics"}
CHOICE = {"configuration", "reason", "images", "mistakes", "candidates", "base_sha256"}
# Settings that are no more, with the value at which a checkpoint is as one of today.
RETIRED = {"iterations": 1, "accumulate": False, "restart": False}


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, is damaged, or was made with other settings."""


def check_writable(directory: str) -> None:
    """Make the folder of an experiment's files, unless it is there, and see whether it can be written to.

    Args:
        directory: see `Settings.directory`.

    Raises:
        ValueError: it cannot.
    """
    folder = REPOSITORY / directory
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        allowed = f"a folder to write to, or a new one ({error.strerror})"
        raise ValueError(f"directory is {directory!r}; allowed: {allowed}.") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that takes the place of `path` once it is complete; an error leaves nothing behind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as unfinished:
        with open(Path(unfinished) / "part", "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)


def read_result(path: Path) -> dict[str, Any]:
    """A saved result; or, if the file's name is `chosen.json`, a choice, see `selection.choose`.

    Raises:
        ValueError: the file is damaged, or not a result.
    """
    try:
        result = json.loads(path.read_bytes())
        if missing := (CHOICE if path.stem == "chosen" else RESULT) - set(result):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged or not a result ({error}). Delete it.") from error
    return result


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_tensors(path: Path, content: dict[str, Any]) -> None:
    """Save by torch.save, through memory, since torch hides a full disk behind another error."""
    torch.save(content, buffer := io.BytesIO())
    write_bytes(path, buffer.getvalue())


def read_tensors(path: Path) -> Any:
    """What `write_tensors` saved. No code in the file is run; a damaged file raises some exception."""
    file = io.BytesIO(path.read_bytes())
    if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):
        raise ValueError(f"its part {damaged} has another CRC")  # torch does not look
    file.seek(0)
    return torch.load(file, map_location="cpu", weights_only=True)


def save_checkpoint(path: Path, model: nn.Module, settings: dict, history: list[dict]) -> None:
    """Save a model with its settings, its history and the SHA-256 of its weights.

    The same run on the same machine writes the same bytes.

    Args:
        path: the file; it is replaced once the new one is complete.
        model: the model.
        settings: what made it, as plain values.
        history: see `training.train`; saved without the seconds, which differ from run to run.
    """
    weights = {name: w.detach().cpu().contiguous() for name, w in model.state_dict().items()}
    rows = [{key: row[key] for key in row if key != "seconds"} for row in history]
    content = {"state_dict": weights, "settings": settings, "history": rows}
    write_tensors(path, content | {"sha256": weights_sha256(weights)})


def load_checkpoint(
    path: str | Path, settings: dict | None = None, device: str | torch.device = "cpu"
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a model, and refuse it if anything is wrong. No code in the file is run.

    Args:
        path: a file of `save_checkpoint`; if `settings` is None, also a plain state dict.
        settings: what the model must have been made with.
        device: where to put the model.

    Returns:
        The model, in evaluation mode, and the `settings`, `history` and `sha256` of the file.

    Raises:
        CheckpointError: the file is damaged, foreign, or made with other settings. The message
            names the file and what is wrong.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; give the path of a checkpoint.")
    try:
        about = read_tensors(path)
        if settings is None and "sha256" not in about:  # a plain state dict
            sha = weights_sha256(about)
            about = {"state_dict": about, "settings": {}, "history": [], "sha256": sha}
        about |= {"settings": dict(about["settings"]), "history": list(about["history"])}
        weights, made_with = about.pop("state_dict"), about["settings"]
        for name, value in RETIRED.items():
            if made_with.pop(name, value) != value:
                raise ValueError(f"an older version wrote it, with {name} other than {value}")
        if unknown := made_with.keys() - DEFAULTS - {"base_sha256"}:
            raise ValueError(f"a newer version wrote it, with the setting {', '.join(unknown)}")
        if weights_sha256(weights) != about["sha256"]:
            raise ValueError("its weights have another SHA-256")
        name = made_with.get("model", DEFAULTS["model"])
        model = models.build(name, len([*weights.values()][-1]))
        model.load_state_dict(weights)
    except Exception as error:  # torch.load has no error class of its own for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason}).") from error
    for name, asked in (settings or {}).items():
        found = made_with.get(name, DEFAULTS.get(name))  # a younger setting had its default
        if found != asked and name != "test_folder":  # any images may serve to test
            hint = "Use retrain = True to replace it, or another directory."
            raise CheckpointError(f"{path} was made with {name} = {found!r}, not {asked!r}. {hint}")
    return model.to(device, memory_format=torch.channels_last).eval(), about


def collect(directory: str = "") -> pd.DataFrame:
    """Gather all saved results into a table.

    A result whose base model has been replaced since is left out.

    Args:
        directory: see `Settings.directory`.

    Returns:
        One row per result, base models first; without `metrics`, what `experiment.record` returns.
        Also `chosen`: whether `selection.choose` chose it; None if there was no choice.

    Raises:
        ValueError: a JSON file there is damaged, or not a result.
    """
    results, choices = {}, {}
    for path in sorted((REPOSITORY / directory / "results").rglob("*.json")):
        content = read_result(path)
        if path.stem == "chosen":
            choices[path.parent] = content
        else:
            results[path] = content
    bases = {path.parent: row["sha256"] for path, row in results.items() if path.stem == "base"}
    rows = []
    for path, row in results.items():
        if row["base_sha256"] != bases.get(path.parent):
            continue
        row["chosen"] = None
        choice = choices.get(path.parent)
        if choice and choice["base_sha256"] == row["base_sha256"]:
            row["chosen"] = row["configuration"] == choice["configuration"]
        rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else [*KEY, "metrics"]).drop(columns="metrics")
    return table.sort_values(KEY, key=lambda column: column.replace("base", ""), ignore_index=True)


def finished_results(directory: str) -> set[tuple]:
    """All saved results: experiment, configuration, seed, test folder."""
    table = collect(directory).reindex(columns=[*KEY, "test_folder"])
    return set(table.itertuples(index=False, name=None))
