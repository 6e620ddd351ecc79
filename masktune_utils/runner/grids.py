"""Grids: YAML files of settings → all their combinations."""

from pathlib import Path
from typing import Any

import yaml
from sklearn.model_selection import ParameterGrid

from masktune_utils.settings import REPOSITORY, RUNTIME, Settings

PUBLISHED = REPOSITORY / "sweeps" / "published.yaml"
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
            allowed. The message names the setting, and the file and the block, unless
            there are options.
    """
    blocks = [{}] if file is None else _read_blocks(file)
    notebook = f"{blocks[0].pop('notebook', FINETUNE)}"
    configurations = []
    for number, block in enumerate(blocks, start=1):
        values = {}
        for name, value in {**block, **options}.items():
            values[name] = value if isinstance(value, list) else [value]
        try:
            for combination in ParameterGrid(values):
                configurations.append(Settings(**combination))
        except ValueError as error:
            where = "" if options or file is None else f"{file}, block {number}: "
            raise ValueError(f"{where}{error}") from None
    for name in RUNTIME:
        if len({getattr(settings, name) for settings in configurations}) > 1:
            raise ValueError(f"{file}: {name} has several values; allowed: one.")
    return notebook, list(dict.fromkeys(configurations))


def _read_blocks(file: Path) -> list[dict[str, Any]]:
    try:
        blocks = yaml.safe_load(file.read_bytes())
        if not blocks or not all(isinstance(block, dict) for block in blocks):
            raise ValueError("no block in it")
        return [{f"{name}": block[name] for name in block} for block in blocks]
    except (OSError, TypeError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(f"{error}".split())[:150]
        allowed = "allowed: a list of blocks of settings"
        raise ValueError(f"{file}: {allowed} ({reason}).") from error
