"""Notebooks for each setting of a grid. run: 01 to 06; sweep: 02 to 04, or the one
that the grid names; choose: 02 and 06.
"""

import sys
from argparse import ArgumentParser, Namespace
from functools import cache
from pathlib import Path

from joblib import cpu_count
from yaml import YAMLError

from masktune_utils import datasets, models, results
from masktune_utils.runner import jobs
from masktune_utils.runner.grids import read_grid
from masktune_utils.settings import DEFAULTS, REPOSITORY, RUNTIME, Settings, root

PUBLISHED = REPOSITORY / "studies/sweeps/published.yaml"
SWEEP = ["02_erm", "03_saliency_masks", "04_finetune_sweep"]
CHOICE = "06_choice"
COMMANDS = {
    "run": ["01_dataset", *SWEEP, CHOICE, "05_plots"],
    "sweep": SWEEP,
    "choose": ["02_erm", CHOICE],
}


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command; returns the exit code."""
    parser = ArgumentParser(
        usage="masktune run|sweep|choose [GRID] [--SETTING VALUE …]\n"
        "       [--jobs N] [--dask ADDRESS] [--dry-run]",
        description=__doc__,
    )
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add(
        "grid",
        nargs="?",
        type=Path,
        default=PUBLISHED,
        help="YAML file, see studies/sweeps/",
    )
    add("--jobs", type=int, help="notebooks at once")
    add("--dask", help="scheduler of a Dask cluster, tcp://HOST:PORT, that executes")
    add("--dry-run", action="store_true", help="count the notebooks, and run nothing")
    for name, field in Settings.model_fields.items():
        add(
            *sorted({f"--{name}", f"--{name.replace('_', '-')}"}),
            nargs=1 if name in RUNTIME else "+",
            help=f"{field.description} (default: {field.default!r})",
        )
    arguments = parser.parse_intermixed_args(argv)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        print("\nmasktune: interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, YAMLError) as error:
        print("masktune:", *f"{error}".split(), file=sys.stderr)
        return 2


def _run(arguments: Namespace) -> int:
    """Run the notebooks; print what came out, and last the reasons of choices.

    Raises:
        FileNotFoundError: see `datasets.load`.
        ValueError: see `read_grid`, `datasets.load` and `use_cluster`.
    """
    if arguments.dask:
        jobs.use_cluster(arguments.dask)
    given = vars(arguments)
    options = {name: given[name] for name in DEFAULTS if given[name]}
    notebook, grid = read_grid(arguments.grid, options)
    resolve = cache(datasets.resolve_dataset)  # which may read MNIST
    grid = [
        settings.replace(
            dataset=resolve(settings.dataset),
            directory=str(root(settings.directory).absolute()),
        )
        for settings in grid
    ]
    # What cannot be read or drawn is refused here, once for each base model.
    for base in {settings.base for settings in grid}:
        datasets.load(base)
    stems = COMMANDS[arguments.command]
    if notebook and arguments.command == "sweep":
        stems = [notebook]
    stages = [jobs.make_stage(stem, grid) for stem in stems]
    if arguments.dry_run:
        jobs.execute(stages, 0)
        return 0
    device = models.resolve_device(grid[0].device)
    # Each kernel on a GPU has a context and the images of its own.
    count = min(cpu_count(), 8) if device.type == "cpu" else 1
    errors = jobs.execute(stages, arguments.jobs or count)
    for job, error in errors.items():
        print(f"failed: {job.copy}: {error}", file=sys.stderr)
    experiments = {settings.experiment for settings in grid}
    for directory in {settings.directory for settings in grid}:
        table = results.collect(directory)
        results.save_table(table, Path(directory, "results", "results.csv"))
        print(f"files: {directory}")
        rows = table[table["experiment"].isin(experiments)]
        if len(rows):
            print(f"\nAccuracy in %\n\n{results.accuracy_table(rows).to_string()}\n")
    for stage in reversed(stages):
        for job in stage:
            if job not in errors and job.stem in (CHOICE, jobs.PLOTS):
                page = jobs.write_page(job)
                print(f"page: {page}")
                reason = page.with_name("reason.txt")
                if job.stem == CHOICE and reason.exists():
                    print(reason.read_text())
    return 1 if errors else 0
