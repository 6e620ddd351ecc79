"""The command `masktune`: the notebooks run headless, one after the other, by papermill."""

import argparse
import ast
import dataclasses
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pandas as pd
import papermill
from tqdm import tqdm

from masktune_utils import evaluation, experiment, masking, training
from masktune_utils.experiment import REPOSITORY, Settings

NOTEBOOKS = REPOSITORY / "notebooks"
PARAMS = (0.1, 0.3, 0.5, 0.7, 0.9)


def run_notebook(stem: str, settings: Settings, suffix: str = "") -> Path:
    """Execute a notebook with those settings that are parameters of it.

    Args:
        stem: its file name without `.ipynb`.
        settings: the experiment.
        suffix: added to the name of the executed copy.

    Returns:
        The executed copy, in the experiment's folder among the `runs`.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    notebook = NOTEBOOKS / f"{stem}.ipynb"
    known = papermill.inspect_notebook(notebook)
    parameters = {name: value for name, value in dataclasses.asdict(settings).items() if name in known}
    copy = settings.folder("runs") / f"{stem}{suffix}.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    quiet = ["--IPKernelApp.log_level=ERROR"]  # no warning a kernel that it talks over local TCP
    papermill.execute_notebook(notebook, copy, parameters, cwd=NOTEBOOKS, progress_bar=False, extra_arguments=quiet)
    return copy


def run(grid: list[Settings]) -> int:
    """Execute 01, 02 and 03 for each seed of the grid, 04 for each of its settings, and 05 for each seed.

    Returns:
        The exit code: 0, or 1 where a notebook failed.
    """
    seeds = {settings.seed: settings for settings in grid}.values()
    jobs = [(stem, settings, "") for settings in seeds for stem in ("01_dataset", "02_erm", "03_saliency_masks")]
    jobs += [("04_finetune_sweep", settings, f"_{settings.configuration}") for settings in grid]
    jobs += [("05_plots", settings, "") for settings in seeds]
    print(f"{len(jobs)} notebooks, digits: {grid[0].dataset}, device: {training.resolve_device(grid[0].device)}")
    with tqdm(jobs, unit="notebook") as progress:
        for stem, settings, suffix in progress:
            progress.set_description(f"{stem}{suffix}, seed {settings.seed}")
            try:
                run_notebook(stem, settings, suffix)
            except papermill.PapermillExecutionError as error:
                copy = settings.folder("runs") / f"{stem}{suffix}.ipynb"
                progress.close()
                print(f"masktune: {stem} failed: {error.ename}: {error.evalue}\nSee {copy}", file=sys.stderr)
                return 1
    report(grid)
    return 0


def report(grid: list[Settings]) -> None:
    """Print the table of a finished grid, and where everything lies."""
    folders = {
        kind: sorted({settings.folder(kind) for settings in grid})
        for kind in ("checkpoints", "results", "runs", "figures")
    }
    table = pd.concat([evaluation.collect(folder) for folder in folders["results"]])
    wanted = ["base", *dict.fromkeys(settings.configuration for settings in grid)]
    summary = evaluation.summarize(table[table["configuration"].isin(wanted)])
    print(f"\nAccuracy in %, {grid[0].dataset}\n\n{summary.to_string()}\n")
    for kind, paths in folders.items():
        print(f"{kind + ':':13}{', '.join(map(str, paths))}")
    for figure in sorted(figure for folder in folders["figures"] for figure in folder.glob("*.png")):
        print(f"{'':13}{figure}")


def _grid(arguments: argparse.Namespace) -> list[Settings]:
    fixed: dict[str, Any] = {name: getattr(arguments, name) for name in ("dataset", "epochs", "device")}
    fixed["directory"] = str(Path(arguments.directory or REPOSITORY).resolve())
    known = [field.name for field in dataclasses.fields(Settings)]
    for name, value in arguments.parameters or []:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}; allowed: {', '.join(known)}.")
        fixed[name] = _literal(value)
    combinations = product(arguments.seeds, arguments.methods, arguments.params)
    return [
        Settings(**{**fixed, "seed": seed, "method": method, "param": param}) for seed, method, param in combinations
    ]


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _parser() -> argparse.ArgumentParser:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="masktune", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run_parser = commands.add_parser(
        "run",
        help="execute the notebooks 01, 02, 03, 04 for every method and parameter, and 05",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        allow_abbrev=False,
    )
    option = run_parser.add_argument
    option("--dataset", default=defaults.dataset, help="auto, mnist or mnist5k")
    option("--methods", nargs="+", default=list(masking.METHODS), metavar="METHOD", help="mask methods")
    option("--params", nargs="+", type=float, default=list(PARAMS), metavar="PARAM", help="parameters of each method")
    option("--seeds", nargs="+", type=int, default=[defaults.seed], metavar="SEED", help="seeds")
    option("--epochs", type=int, default=defaults.epochs, help="epochs of the base model")
    option("--directory", default=defaults.directory, help="where artefacts go; empty: the repository root")
    option("--device", default=defaults.device, help="auto, cpu, cuda or mps")
    option(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        metavar=("NAME", "VALUE"),
        help="any other parameter of the notebooks",
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command `masktune`; bad arguments end it with exit code 2 before anything runs."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        grid = _grid(arguments)
        grid = [dataclasses.replace(settings, dataset=experiment.resolve(grid[0]).dataset) for settings in grid]
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    return run(grid)
