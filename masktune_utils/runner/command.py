"""The command `masktune`: a list of notebooks for each setting of a grid."""

import argparse
import sys
from functools import cache
from itertools import chain
from pathlib import Path

from joblib import cpu_count, parallel_config
from yaml import YAMLError

from masktune_utils import datasets, results, store
from masktune_utils.runner import jobs
from masktune_utils.runner.grids import read_grid
from masktune_utils.runner.jobs import ERM, FINETUNE, PLOTS
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings, root

USAGE = """masktune run|sweep|choose [GRID] [--SETTING VALUE …]
       [--jobs N] [--dask ADDRESS] [--dry-run]"""
PUBLISHED = REPOSITORY / "sweeps" / "published.yaml"
CHOICE = "06_choice"
SWEEP = [ERM, "03_saliency_masks", FINETUNE]
COMMANDS = {
    "run": ["01_dataset", *SWEEP, CHOICE, PLOTS],
    "sweep": SWEEP,  # or the notebook that the grid names
    "choose": [ERM, CHOICE],
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    arguments = _parser().parse_intermixed_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\nmasktune: interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError, YAMLError) as error:
        print("masktune:", *f"{error}".split(), file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="masktune", usage=USAGE, description=__doc__)
    notebooks = "; ".join(f"{name}: {', '.join(COMMANDS[name])}" for name in COMMANDS)
    parser.add_argument("command", choices=COMMANDS, help=notebooks)
    parser.add_argument(
        "grid",
        nargs="?",
        type=Path,
        default=PUBLISHED,
        help="YAML file, see sweeps/",
    )
    parser.add_argument("--jobs", type=int, help="notebooks at once")
    parser.add_argument(
        "--dask",
        metavar="ADDRESS",
        help="scheduler of a Dask cluster that shares the files",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="count the notebooks, and run nothing"
    )
    for name, field in Settings.model_fields.items():
        parser.add_argument(
            *sorted({f"--{name}", f"--{name.replace('_', '-')}"}),
            nargs="+",
            metavar="VALUE",
            help=f"{field.description} (default: {field.default!r})",
        )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """Run the notebooks; print what came out, and last the reasons of choices."""
    notebook, grid = _read(arguments)
    device = store.resolve_device(grid[0].device)
    if arguments.dask:
        from distributed import Client  # heavy, and seldom wanted

        Client(arguments.dask, timeout=5)
        parallel_config(backend="dask")
    print(f"device: {device}")
    stems = [notebook] if notebook else COMMANDS[arguments.command]
    stages = [jobs.make_stage(stem, grid) for stem in stems]
    if arguments.dry_run:
        jobs.execute(stages, 0)
        return 0
    # Each kernel on a GPU has a context and the images of its own.
    count = min(cpu_count(), 8) if device.type == "cpu" else 1
    errors = jobs.execute(stages, arguments.jobs or count)
    _print_table(grid)
    for job, error in errors.items():
        print(f"failed: {job.copy}: {error}", file=sys.stderr)
    for job in reversed(list(chain(*stages))):
        if job.stem in (CHOICE, PLOTS) and job not in errors:
            print(f"page: {jobs.write_page(job)}")
            if job.stem == CHOICE:
                reason = job.settings.folder("results") / "reason.txt"
                print(reason.read_text())
    return 1 if errors else 0


def _read(arguments: argparse.Namespace) -> tuple[str | None, list[Settings]]:
    """The notebook that the grid names, and all configurations, ready to be run.

    Raises:
        FileNotFoundError: see `datasets.read`.
        ValueError: see `read_grid` and `datasets.read`.
    """
    given = vars(arguments)
    options = {name: given[name] for name in DEFAULTS if given[name]}
    notebook, grid = read_grid(arguments.grid, options)
    resolve = cache(datasets.resolve_dataset)  # which may read MNIST
    ready = []
    for settings in grid:
        # A Dask worker may have another working directory.
        directory = str(root(settings.directory).absolute())
        dataset = resolve(settings.dataset)
        ready.append(settings.replace(dataset=dataset, directory=directory))
    datasets.read(ready[0])  # what cannot be read is refused here
    return notebook, ready


def _print_table(grid: list[Settings]) -> None:
    """Save the table of all results; print that of the grid, and where files are."""
    directory = grid[0].directory
    table = results.collect(directory)
    results.save_table(table, root(directory) / "results" / "results.csv")
    print(f"files: {directory}")
    experiments = [settings.experiment for settings in grid]
    rows = table[table["experiment"].isin(experiments)]
    if len(rows):
        print(f"\nAccuracy in %\n\n{results.worth(rows).to_string()}\n")
