"""What the command does: notebooks stage by stage, choices, tables, and pages."""

import argparse
import sys
from functools import cache
from pathlib import Path

from joblib import cpu_count, parallel_config

from masktune_utils import datasets, experiment, results, store
from masktune_utils.runner import jobs
from masktune_utils.runner.grids import FINETUNE, PUBLISHED, read_grid
from masktune_utils.runner.jobs import BASE, ERM, SHOWN, Job, make_stage
from masktune_utils.settings import DEFAULTS, Settings, root

# The others read tables, or photographs.
SWEPT = ["01_dataset", *BASE, FINETUNE, *SHOWN, "09_limits", "11_abstaining"]
# What the commands run where a grid names no notebook of its own.
STEMS = {
    "run": ["01_dataset", *BASE, FINETUNE],
    "sweep": [*BASE, FINETUNE],
    "choose": [*BASE],
}


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code.

    Args:
        arguments: see `command`.
    """
    try:
        stems, grid = _read(arguments)
        directory = grid[0].directory
        if arguments.dask:
            from distributed import Client  # heavy, and seldom wanted

            Client(arguments.dask, timeout=5)
            parallel_config(backend="dask")
        device = store.resolve_device(grid[0].device)
        print(f"{len(grid)} configurations, device: {device}")
        if arguments.dry_run:
            print_plan(stems[-1], grid)
            return 0
        store.check_writable(directory)
        # Each kernel on a GPU has a context and the images of its own.
        count = arguments.jobs or (min(cpu_count(), 8) if device.type == "cpu" else 1)
        errors = run_stages(arguments.command, stems, grid, count)
        _save_tables(grid, stems[-1])
    except KeyboardInterrupt:
        print("\nmasktune: interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"masktune: {error}", file=sys.stderr)
        return 2
    for job, error in errors.items():
        name = f"{job.settings.experiment}, seed {job.settings.seed}, {job.copy.stem}"
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(f"{len(errors)} failed or not run")
    return 1 if errors else 0


def _read(arguments: argparse.Namespace) -> tuple[list[str], list[Settings]]:
    """The names of the notebooks to run before a choice, and all configurations.

    The data set `auto` is replaced by what it stands for.

    Raises:
        FileNotFoundError: see `datasets.read`.
        ValueError: see `read_grid` and `datasets.read`; or the notebook is unknown, not
            for this command, or does not depend on a setting that varies.
    """
    command = arguments.command
    given = vars(arguments)
    options = {name: given[name] for name in DEFAULTS if name in given}
    file = arguments.grid
    if file is None and command != "choose":
        file = PUBLISHED
    stem, grid = read_grid(file, options)
    allowed = SWEPT if command == "sweep" else [FINETUNE]
    if stem not in allowed:
        raise ValueError(f"{file}: notebook is {stem!r}; allowed: {allowed}.")
    scope = jobs.scope(ERM if command == "choose" else stem)
    for settings in grid:
        for name in settings.model_dump(exclude_defaults=True).keys() - scope:
            raise ValueError(f"{name} changes nothing here; leave it out.")
    directory = grid[0].directory
    if directory:  # a Dask worker may have another working directory
        directory = str(Path(directory).absolute())
    resolve = cache(datasets.resolve_dataset)  # which may read MNIST
    grid = [
        settings.replace(dataset=resolve(settings.dataset), directory=directory)
        for settings in grid
    ]
    sources = {(settings.dataset, settings.limit): settings for settings in grid}
    for settings in sources.values():
        datasets.read(settings)  # what cannot be read is refused here
    return STEMS[command] if stem == FINETUNE else [stem], grid


def print_plan(stem: str, grid: list[Settings]) -> None:
    """Print which jobs of a notebook are done."""
    finished = results.finished(grid[0].directory)
    for job in make_stage(stem, grid):
        state = "done" if job.is_done(finished) else "    "
        print(state, *job.settings.folder("runs").parts[-2:], job.name)


def run_stages(
    command: str, stems: list[str], grid: list[Settings], count: int
) -> dict[Job, str]:
    """Run the notebooks of a command, and choose.

    Args:
        command: `run`, `sweep` or `choose`.
        stems: names of the notebooks before the choice, in their order.
        grid: all configurations.
        count: how many notebooks at once.

    Returns:
        See `jobs.execute`.
    """
    errors = jobs.execute([make_stage(stem, grid) for stem in stems], count)
    if command == "sweep":
        return errors
    trained = [job.settings for job in make_stage(ERM, grid) if job not in errors]
    for settings in trained:
        try:
            choose(settings, count)
        except Exception as error:  # noqa: BLE001 - the other choices go on
            errors[Job("choice", settings)] = jobs.in_one_line(error)
    if command == "run":
        shown = [settings.replace(retrain=False) for settings in trained]
        stage = [job for stem in SHOWN for job in make_stage(stem, shown)]
        errors.update(jobs.execute([stage], count))
        for job in stage:
            if job not in errors:
                print(f"page: {jobs.write_page(job)}")
    return errors


def choose(settings: Settings, count: int) -> None:
    """Choose a mask for a base model, and fine-tune with it; print the reason.

    Args:
        settings: of the base model.
        count: how many processes.
    """
    print(f"choice: {settings.experiment}, seed {settings.seed}", flush=True)
    sets = datasets.load(settings)
    base = experiment.base_model(settings, sets.train)
    choice = experiment.choose(base, sets.train, count, settings.retrain)
    chosen = experiment.chosen_model(choice, base, sets.train, settings.retrain)
    experiment.record(chosen, sets)
    print(f"{settings.experiment}, seed {settings.seed}: {choice.reason}")


def _save_tables(grid: list[Settings], notebook: str) -> None:
    """Save the tables of all results; print one, and where everything is.

    Args:
        grid: what was run.
        notebook: the last one.
    """
    directory = grid[0].directory
    folder = root(directory)
    table = results.collect(directory)
    results.save_table(table, folder / "results" / "results.csv")
    results.gather_study(directory, notebook)
    for kind in ("checkpoints", "results", "runs", "figures"):
        print(f"{kind}: {folder / kind}")
    experiments = {settings.experiment for settings in grid}
    rows = table[table["experiment"].isin(experiments)]
    if len(rows):
        summary = results.worth(results.named(rows))
        print(f"\nAccuracy in %\n\n{summary.to_string()}\n")
