"""The command `masktune`: notebooks 01 to 06, sweeps, choices."""

import argparse
import ast
import contextlib
from pathlib import Path

from masktune_utils.settings import REPOSITORY, RUNTIME, Settings

USAGE = """masktune run|sweep|choose [GRID] [--SETTING VALUE …]
       [--jobs N] [--dask ADDRESS] [--dry-run]"""


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command. Bad arguments end it with exit code 2 at once."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if not (REPOSITORY / "notebooks").is_dir():
        parser.error("there are no notebooks here; allowed: a clone of the repository.")
    from masktune_utils.runner import stages  # takes seconds, which --help need not

    return stages.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="masktune", usage=USAGE, description=__doc__)
    commands = "run: 01 to 06; sweep: 02 to 04, or as GRID says; choose"
    parser.add_argument("command", choices=("run", "sweep", "choose"), help=commands)
    parser.add_argument("grid", nargs="?", type=Path, help="YAML file, see sweeps/")
    parser.add_argument(
        "--jobs", type=int, choices=range(1, 65), metavar="N", help="notebooks at once"
    )
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="scheduler of a Dask cluster that shares the files",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the configurations, and run nothing",
    )
    for name, field in Settings.model_fields.items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(
            *spellings,
            dest=name,
            default=argparse.SUPPRESS,
            nargs=1 if name in RUNTIME else "+",
            type=str if field.annotation is str else _from_text,
            metavar="VALUE",
            help=f"{field.description} (default: {field.default!r})",
        )
    return parser


def _from_text(text: str) -> object:
    """A number, None, True or False as Python writes it; else the text itself."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text
