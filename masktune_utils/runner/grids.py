"""Grids: YAML files of settings → all their combinations."""

from pathlib import Path

import yaml
from pydantic import TypeAdapter, conlist

from masktune_utils.settings import REPOSITORY, Settings

NOTEBOOKS = REPOSITORY / "notebooks"
Blocks = TypeAdapter(conlist(dict[str, object], min_length=1))


def read_grid(
    file: Path, options: dict[str, list]
) -> tuple[str | None, list[Settings]]:
    """All configurations of a grid file.

    Args:
        file: YAML; blocks of settings, each with a value or a
            list of values. A block stands for all their combinations. The first may
            name the `notebook`.
        options: values from the command line, by name, which win over those of the
            file.

    Returns:
        The name of the notebook, if there is one, and the settings.

    Raises:
        ValueError: the file has no such blocks; or a setting, value or notebook is
            not allowed.
        OSError: the file cannot be read.
        YAMLError: it is no YAML.
    """
    from sklearn.model_selection import ParameterGrid  # takes a second

    with file.open("rb") as stream:  # by its name, YAML's errors tell the file
        blocks = Blocks.validate_python(yaml.safe_load(stream))
    notebook = blocks[0].pop("notebook", None)
    allowed = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if notebook not in [None, *allowed]:
        raise ValueError(f"notebook = {notebook!r}: allowed are {', '.join(allowed)}")
    configurations = []
    for block in blocks:
        values = {
            name: value if isinstance(value, list) else [value]
            for name, value in {**block, **options}.items()
        }
        configurations += [Settings(**combined) for combined in ParameterGrid(values)]
    return notebook, configurations
