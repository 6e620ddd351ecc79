"""Grids: YAML files of settings → all their combinations."""

from pathlib import Path
from typing import Any

import yaml
from sklearn.model_selection import ParameterGrid

from masktune_utils.settings import REPOSITORY, RUNTIME, Settings

SWEEPS = REPOSITORY / "sweeps"
FINETUNE = "04_finetune_sweep"


def read_grid(
    file: Path | None, options: dict[str, list]
) -> tuple[str, list[Settings]]:
    """All configurations of a grid file.

    Args:
        file: None: the defaults alone. YAML; blocks of settings, each with a value or a
            list of values. A block stands for all their combinations. The first may
            name the `notebook`, by default 04.
        options: values from the command line, by name, which win over those of the
            file.

    Returns:
        The name of the notebook, and the settings.

    Raises:
        ValueError: the file is missing or no YAML; or a setting or value is not
            allowed. The message names the file, the block and the setting.
    """
    blocks = [{}] if file is None else _read_blocks(file)
    notebook = f"{blocks[0].pop('notebook', FINETUNE)}"
    configurations = []
    for number, block in enumerate(blocks, start=1):
        values = {name: _as_list(value) for name, value in {**block, **options}.items()}
        try:
            combinations = ParameterGrid(values)
            configurations += [Settings(**values) for values in combinations]
        except ValueError as error:
            if file is None or not _is_valid(options):
                raise  # a bad option, wherever it is used
            raise ValueError(f"{file}, block {number}: {error}") from None
    for name in RUNTIME:
        if len({getattr(settings, name) for settings in configurations}) > 1:
            raise ValueError(f"{file}: {name} has several values; allowed: one.")
    return notebook, list(dict.fromkeys(configurations))


def _is_valid(options: dict[str, list]) -> bool:
    try:
        return bool([Settings(**values) for values in ParameterGrid(options)])
    except ValueError:
        return False


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [value]


def _read_blocks(file: Path) -> list[dict[str, Any]]:
    allowed = "allowed: a list of blocks of settings"
    try:
        blocks = yaml.safe_load(file.read_bytes())
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{file}: {allowed} ({reason}).") from error
    if not isinstance(blocks, list) or not blocks:
        raise ValueError(f"{file}: {allowed}.")
    for number, block in enumerate(blocks, start=1):
        if not isinstance(block, dict) or not all(
            isinstance(key, str) for key in block
        ):
            raise ValueError(f"{file}, block {number}: {allowed}.")
    return blocks
