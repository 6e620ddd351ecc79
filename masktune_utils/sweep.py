"""The command `masktune`: the notebooks run headless, one after the other, by papermill."""

import argparse
import ast
import dataclasses
import sys
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import papermill
from tqdm import tqdm

from masktune_utils import data, evaluation, masking, training
from masktune_utils.experiment import REPOSITORY, Settings

NOTEBOOKS = REPOSITORY / "notebooks"
PARAMS = (0.1, 0.3, 0.5, 0.7, 0.9)


class Job(NamedTuple):
    """One notebook to execute: with which of the settings, and where the executed copy goes."""

    notebook: Path
    settings: Settings
    parameters: dict[str, Any]
    copy: Path

    def run(self) -> None:
        """Execute the notebook in a kernel of its own.

        Raises:
            papermill.PapermillExecutionError: a cell failed.
        """
        self.copy.parent.mkdir(parents=True, exist_ok=True)
        quiet = ["--IPKernelApp.log_level=ERROR"]  # else every kernel warns that it is reached by local TCP
        papermill.execute_notebook(
            self.notebook, self.copy, self.parameters, cwd=NOTEBOOKS, progress_bar=False, extra_arguments=quiet
        )


def job(stem: str, settings: Settings) -> Job:
    """The notebook `stem` with those of the settings that are parameters of it."""
    notebook = NOTEBOOKS / f"{stem}.ipynb"
    known = papermill.inspect_notebook(notebook)
    parameters = {name: value for name, value in dataclasses.asdict(settings).items() if name in known}
    own = Settings(**parameters)
    suffix = f"_{own.configuration}" if "method" in known else ""
    return Job(notebook, own, parameters, own.folder("runs") / f"{stem}{suffix}.ipynb")


def run(grid: list[Settings]) -> int:
    """Execute 01, 02 and 03 for each seed of the grid, 04 for each of its settings, and 05 for each seed.

    Returns:
        The exit code: 0, or 1 where a notebook failed.
    """
    seeds = {settings.seed: settings for settings in grid}.values()
    jobs = [job(stem, settings) for settings in seeds for stem in ("01_dataset", "02_erm", "03_saliency_masks")]
    jobs += [job("04_finetune_sweep", settings) for settings in grid]
    jobs += [job("05_plots", settings) for settings in seeds]
    print(f"{len(jobs)} notebooks, digits: {grid[0].dataset}, device: {training.resolve_device(grid[0].device)}")
    with tqdm(jobs, unit="notebook") as progress:
        for current in progress:
            progress.set_description(f"{current.copy.stem}, seed {current.settings.seed}")
            try:
                current.run()
            except papermill.PapermillExecutionError as error:
                progress.close()
                print(f"masktune: {current.copy.stem} failed: {error.ename}: {error.evalue}", file=sys.stderr)
                print(f"See {current.copy}", file=sys.stderr)
                return 1
    report(jobs)
    return 0


def report(jobs: list[Job]) -> None:
    """Print the table of finished jobs, and where everything lies."""
    tuned = [job for job in jobs if "method" in job.parameters]
    leaves = {"checkpoints": tuned, "results": tuned, "runs": jobs, "figures": jobs}
    folders = {kind: list(dict.fromkeys(job.settings.folder(kind) for job in some)) for kind, some in leaves.items()}
    table = pd.concat([evaluation.collect(folder) for folder in folders["results"]])
    wanted = {"base"} | {job.settings.configuration for job in tuned}
    print(f"\nAccuracy in %, {jobs[0].settings.dataset}\n")
    print(evaluation.summarize(table[table["configuration"].isin(wanted)]).to_string(), end="\n\n")
    for kind, paths in folders.items():
        print(f"{kind + ':':13}{', '.join(map(str, paths))}")
    pictures = [(job.settings.folder("figures"), f"{job.notebook.stem[:2]}_*.png") for job in jobs]
    for figure in dict.fromkeys(path for folder, names in pictures for path in sorted(folder.glob(names))):
        print(f"{'':13}{figure}")


def _grid(arguments: argparse.Namespace) -> list[Settings]:
    """All combinations of the command's arguments, checked."""
    fixed: dict[str, Any] = {}
    known = list(papermill.inspect_notebook(NOTEBOOKS / "04_finetune_sweep.ipynb"))
    for name, value in arguments.parameters or []:
        if name not in known:
            raise ValueError(f"unknown parameter {name!r}; allowed: {', '.join(known)}.")
        fixed[name] = _literal(value)
    fixed = {name: getattr(arguments, name) for name in ("directory", "dataset", "epochs", "device")} | fixed
    fixed["directory"] = str(Path(fixed["directory"] or REPOSITORY).resolve())
    axes = {"seed": arguments.seeds, "method": arguments.methods, "param": arguments.params}
    axes = {name: [fixed.pop(name)] if name in fixed else values for name, values in axes.items()}
    grid = [Settings(**fixed, **dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    dataset = data.resolve_dataset(grid[0].dataset)
    return [dataclasses.replace(settings, dataset=dataset) for settings in dict.fromkeys(grid)]


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
    run_parser.set_defaults(parser=run_parser)
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
    arguments, unknown = _parser().parse_known_args(argv)
    if unknown:
        arguments.parser.error(f"unknown arguments: {' '.join(unknown)}")
    try:
        grid = _grid(arguments)
    except (ValueError, TypeError, OSError) as error:
        arguments.parser.error(str(error))
    return run(grid)
