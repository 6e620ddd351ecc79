"""Notebooks for each setting of a grid. run: 01 to 06; sweep: 02 to 04, or the one
that the grid names; choose: 02 and 06.
"""

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
    "sweep": SWEEP,
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
    parser.add_argument("command", choices=COMMANDS)
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
            help=f"{field.description} (default: {field.default!r})",
        )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    """Run the notebooks; print what came out, and last the reasons of choices."""
    if arguments.dask:
        from distributed import Client  # heavy, and seldom wanted

        Client(arguments.dask, timeout=5)
        parallel_config(backend="dask")
    stages = _stages(arguments)
    if arguments.dry_run:
        jobs.execute(stages, 0)
        return 0
    planned = list(chain(*stages))
    settings = planned[0].settings
    device = store.resolve_device(settings.device)
    # Each kernel on a GPU has a context and the images of its own.
    count = min(cpu_count(), 8) if device.type == "cpu" else 1
    errors = jobs.execute(stages, arguments.jobs or count)
    _print_table(settings.directory, [job.settings.experiment for job in planned])
    for job, error in errors.items():
        print(f"failed: {job.copy}: {error}", file=sys.stderr)
    for job in reversed(planned):
        if job.stem in (CHOICE, PLOTS) and job not in errors:
            print(f"page: {jobs.write_page(job)}")
            if job.stem == CHOICE:
                reason = job.settings.folder("results") / "reason.txt"
                print(reason.read_text())
    return 1 if errors else 0


def _stages(arguments: argparse.Namespace) -> list[list[jobs.Job]]:
    """The notebooks of a command, or the one that the grid names, for each setting.

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
    stems = [notebook] if notebook else COMMANDS[arguments.command]
    return [jobs.make_stage(stem, ready) for stem in stems]


def _print_table(directory: str, experiments: list[str]) -> None:
    """Save the table of all results; print that of the experiments."""
    table = results.collect(directory)
    results.save_table(table, root(directory) / "results" / "results.csv")
    print(f"files: {directory}")
    rows = table[table["experiment"].isin(experiments)]
    if len(rows):
        print(f"\nAccuracy in %\n\n{results.worth(rows).to_string()}\n")
