"""What the command does: notebooks stage by stage, the choice, tables, the report."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from joblib import cpu_count, parallel_config

from masktune_utils import data, experiment, models, results, shortcuts, store
from masktune_utils.runner import jobs
from masktune_utils.runner.grids import FINETUNE, SWEEPS, read_grid
from masktune_utils.runner.jobs import BASE, ERM, Job, make_stage
from masktune_utils.runner.report import write_report
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings

STAGES = {
    "run": ("01_dataset", *BASE, FINETUNE),
    "sweep": (*BASE, FINETUNE),
    "choose": BASE,
    "report": (),
}


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code.

    Args:
        arguments: see `command`.
    """
    try:
        stem, grid = _read(arguments)
        if arguments.command != "report":  # it shows what is saved
            check_sources(grid)
        device = models.resolve_device(grid[0].device)
        finished = results.finished(grid[0].directory)
        if arguments.dask:
            _connect(arguments.dask)
        images = ", ".join(dict.fromkeys(settings.dataset for settings in grid))
        print(f"{len(grid)} configurations, images: {images}, device: {device}")
        if arguments.dry_run:
            stems = _stems(arguments, stem) or BASE
            print_states(make_stage(stems[-1], grid), finished)
            return 0
        store.check_writable(grid[0].directory)
    except (ValueError, OSError) as error:
        print(f"masktune: {error}", file=sys.stderr)
        return 2
    bases = [job.settings for job in make_stage(ERM, grid)]
    if arguments.command == "report":
        return _report(bases)
    stems = _stems(arguments, stem)
    count = arguments.jobs or min(cpu_count(), 8 if device.type == "cpu" else 4)
    try:
        errors = run_stages(arguments.command, stems, grid, count, arguments.force)
    except KeyboardInterrupt:
        print("\nmasktune: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nmasktune: {error}", file=sys.stderr)
        return 1
    _print_errors(errors)
    if arguments.command != "sweep":
        print(results.conclude(bases))
    return max(_report(bases), 1 if errors else 0)


def _stems(arguments: argparse.Namespace, stem: str) -> tuple[str, ...]:
    """The notebooks that are run before the choice, in their order."""
    if stem != FINETUNE:
        return (stem,)
    varies_finetuning = _options(arguments).keys() - BaseSettings.model_fields
    if (
        arguments.command == "run"
        and _grid_file(arguments) is None
        and not varies_finetuning
    ):
        return ("01_dataset", *BASE)  # no configuration to compare the choice with
    return STAGES[arguments.command]


def _print_errors(errors: dict[Job, str]) -> None:
    for job, error in errors.items():
        name = f"{job.settings.experiment}, seed {job.settings.seed}, {job.copy.stem}"
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(f"\n{len(errors)} failed or not run")


def _report(bases: list[Settings]) -> int:
    """Write the report, and print where it is; returns the exit code."""
    try:
        print(f"report: {write_report(bases)}")
    except OSError as error:
        print(f"masktune: no report: {error}", file=sys.stderr)
        return 1
    return 0


def _read(arguments: argparse.Namespace) -> tuple[str, list[Settings]]:
    """The name of the notebook that the command is about, and all configurations.

    The data set `auto` is replaced by what it stands for.

    Raises:
        ValueError: see `read_grid`, `jobs.check_scope` and `data.resolve_dataset`.
    """
    stem, grid = read_grid(_grid_file(arguments), _options(arguments))
    if stem != FINETUNE and arguments.command != "sweep":
        allowed = f"allowed, except with sweep: {FINETUNE}"
        raise ValueError(f"notebook is {stem!r}; {allowed}.")
    try:
        jobs.check_scope(stem, grid)
    except ValueError as error:
        if arguments.grid is None:
            raise
        raise ValueError(f"{arguments.grid}: {error}") from None
    names = {settings.dataset for settings in grid}
    datasets = {name: data.resolve_dataset(name) for name in names}
    return stem, [item.replace(dataset=datasets[item.dataset]) for item in grid]


def _options(arguments: argparse.Namespace) -> dict[str, list]:
    """The settings that were given as options, each with its values."""
    values = vars(arguments)
    return {name: values[name] for name in DEFAULTS if values[name]}


def _grid_file(arguments: argparse.Namespace) -> Path | None:
    """The file that was given; else, except for a folder, the published one."""
    if arguments.grid is not None or arguments.command == "choose":
        return arguments.grid
    is_folder = arguments.dataset == ["folder"]
    if arguments.command == "run" and is_folder:
        return None
    return SWEEPS / "published.yaml"


def _connect(address: str) -> None:
    """Let a Dask cluster do the work."""
    from distributed import Client  # heavy, and seldom wanted

    Client(address, timeout=5)
    parallel_config(backend="dask")


def check_sources(grid: list[Settings]) -> None:
    """Refuse networks that do not fit and images that cannot be read.

    Raises:
        FileNotFoundError: see `data.load`.
        ValueError: see `data.load` and `models.check`.
    """
    sources = {}
    of_images = ("dataset", "train_folder", "test_folder", "limit", "image_size")
    for settings in grid:
        models.check(settings.image_size, **settings.network)
        sources[tuple(getattr(settings, name) for name in of_images)] = settings
    for settings in sources.values():
        data.load(settings)


def print_states(stage: list[Job], finished: set[tuple]) -> None:
    """Print which jobs are done."""
    states = {job: job.is_done(finished) for job in stage}
    for job, done in states.items():
        print(
            "done" if done else "    ",
            *job.settings.folder("runs").parts[-2:],
            job.name,
        )
    print(f"{sum(states.values())} of them are done")


def run_stages(
    command: str, stems: Sequence[str], grid: list[Settings], count: int, force: bool
) -> dict[Job, str]:
    """Run the notebooks of a command, choose, and print where everything is.

    Args:
        command: see `STAGES`.
        stems: names of the notebooks, in their order.
        grid: all configurations.
        count: how many notebooks at once.
        force: do configurations again that are done.

    Returns:
        See `jobs.execute`.
    """
    stages = [make_stage(stem, grid) for stem in stems]
    errors = jobs.execute(stages, count, force)
    if command != "sweep":
        failed = {job.settings.folder("runs") for job in errors if job.stem == ERM}
        trained = [item for item in grid if item.folder("runs") not in failed]
        choices, failed_choices = choose(command, trained, count, force)
        errors.update(failed_choices)
        chosen = make_stage(FINETUNE, choices)
        last = make_stage("05_plots", trained) if command == "run" else []
        later = [stage for stage in (chosen, last) if stage]
        errors.update(jobs.execute(later, count, force))
        stages += later
    jobs.save_tables(stages, summary=command == "sweep" and FINETUNE in stems)
    return errors


def choose(
    command: str, grid: list[Settings], count: int, force: bool
) -> tuple[list[Settings], dict[Job, str]]:
    """Choose a configuration for each base model of the grid.

    Args:
        command: with `choose`, the configurations of a base model are its candidates,
            if there are several, or one that is not the default. Else those of
            `experiment.candidates` are.
        grid: all configurations whose base models are there.
        count: how many processes.
        force: train the models of the halves again, as with the setting `retrain`.

    Returns:
        The chosen configurations, none where ERM is kept; and the error of each choice
        that failed.
    """
    chosen = []
    errors = {}
    for job in make_stage(ERM, grid):
        folder = job.settings.folder("runs")
        try:
            listed = [item for item in grid if item.folder("runs") == folder]
            if command == "choose" and listed != [job.settings]:
                cross_fitted = [item.replace(cross_fit=True) for item in listed]
                candidates = list(dict.fromkeys(cross_fitted))
            else:
                images = len(shortcuts.load(job.settings).train)
                candidates = experiment.candidates(job.settings, images)
            retrain = force or job.settings.retrain
            choice = experiment.choose(candidates, count, retrain)
        except Exception as error:  # noqa: BLE001 - the other choices go on
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            errors[Job("choice", job.settings, job.name)] = message
            continue
        settings = experiment.chosen_settings(choice, candidates)
        if settings is not None:
            chosen.append(settings)
    return chosen, errors
