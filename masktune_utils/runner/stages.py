"""What the command does: notebooks stage by stage, choices, tables, and pages."""

import argparse
import sys

from joblib import cpu_count, parallel_config

from masktune_utils import datasets, experiment, results, store
from masktune_utils.runner import jobs
from masktune_utils.runner.grids import FINETUNE, SWEEPS, read_grid
from masktune_utils.runner.jobs import BASE, ERM, PLOTS, Job, make_stage
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings, root

PUBLISHED = SWEEPS / "published.yaml"
OF_IMAGES = ("dataset", "train_folder", "test_folder", "limit", "image_size")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line asks for; returns the exit code.

    Args:
        arguments: see `command`.
    """
    command = arguments.command
    try:
        stems, grid = _read(arguments)
        device = store.resolve_device(grid[0].device)
        finished = results.finished(grid[0].directory)
        if arguments.dask:
            _connect(arguments.dask)
        images = ", ".join(dict.fromkeys(settings.dataset for settings in grid))
        print(f"{len(grid)} configurations, images: {images}, device: {device}")
        if arguments.dry_run:
            print_states(make_stage(stems[-1], grid), finished)
            return 0
        store.check_writable(grid[0].directory)
        bases = [job.settings for job in make_stage(ERM, grid)]
        if command == "export":
            for base in bases:
                print(f"export: {experiment.export(base)}")
            return 0
    except (ValueError, OSError) as error:
        print(f"masktune: {error}", file=sys.stderr)
        return 2
    count = arguments.jobs or min(cpu_count(), 8 if device.type == "cpu" else 4)
    try:
        errors = run_stages(command, stems, grid, count, arguments.force)
    except KeyboardInterrupt:
        print("\nmasktune: interrupted; rerun the command to resume", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"\nmasktune: {error}", file=sys.stderr)
        return 1
    for job, error in errors.items():
        name = f"{job.settings.experiment}, seed {job.settings.seed}, {job.copy.stem}"
        print(f"failed: {name}: {error}", file=sys.stderr)
    print(f"\n{len(errors)} failed or not run")
    if command != "sweep":
        print(results.conclude(bases))
    return 1 if errors else 0


def _read(arguments: argparse.Namespace) -> tuple[list[str], list[Settings]]:
    """The names of the notebooks to run before a choice, and all configurations.

    The data set `auto` is replaced by what it stands for.

    Raises:
        FileNotFoundError: see `datasets.read`.
        ValueError: see `read_grid`, `jobs.check_scope`, `datasets.read` and
            `experiment.map_size`.
    """
    command = arguments.command
    options = {name: getattr(arguments, name) for name in DEFAULTS}
    options = {name: values for name, values in options.items() if values}
    file = arguments.grid
    is_run_of_a_folder = command == "run" and options.get("dataset") == ["folder"]
    if file is None and command in ("run", "sweep") and not is_run_of_a_folder:
        file = PUBLISHED
    stem, grid = read_grid(file, options)
    jobs.check_scope(stem, grid, file)
    if stem != FINETUNE and command != "sweep":
        allowed = f"allowed, except with sweep: {FINETUNE}"
        raise ValueError(f"notebook is {stem!r}; {allowed}.")
    names = {settings.dataset for settings in grid}
    resolved = {name: datasets.resolve_dataset(name) for name in names}
    grid = [settings.replace(dataset=resolved[settings.dataset]) for settings in grid]
    sources = {}
    for settings in grid:
        experiment.map_size(settings.image_size, **settings.network)
        if command != "sweep":
            experiment.check_unseen(settings)
        sources[tuple(getattr(settings, name) for name in OF_IMAGES)] = settings
    for settings in sources.values():
        datasets.read(settings)  # what cannot be read is refused here
    if stem != FINETUNE:
        return [stem], grid
    if command in ("choose", "export"):
        return [*BASE], grid
    if command == "sweep":
        return [*BASE, FINETUNE], grid
    varies_finetuning = bool(options.keys() - BaseSettings.model_fields)
    last = [FINETUNE] if file is not None or varies_finetuning else []
    return ["01_dataset", *BASE, *last], grid


def _connect(address: str) -> None:
    """Let a Dask cluster do the work."""
    from distributed import Client  # heavy, and seldom wanted

    Client(address, timeout=5)
    parallel_config(backend="dask")


def print_states(stage: list[Job], finished: set[tuple]) -> None:
    """Print which jobs are done."""
    done = [job for job in stage if job.is_done(finished)]
    for job in stage:
        state = "done" if job in done else "    "
        print(state, *job.settings.folder("runs").parts[-2:], job.name)
    print(f"{len(done)} of them are done")


def run_stages(
    command: str, stems: list[str], grid: list[Settings], count: int, force: bool
) -> dict[Job, str]:
    """Run the notebooks of a command, choose, and print where everything is.

    Args:
        command: `run`, `sweep` or `choose`.
        stems: names of the notebooks before the choice, in their order.
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
        chosen = []
        for base in make_stage(ERM, trained):
            try:
                chosen += choose(command, base.settings, trained, count, force)
            except Exception as error:  # noqa: BLE001 - the other choices go on
                errors[Job("choice", base.settings)] = jobs.in_one_line(error)
        stages.append(make_stage(FINETUNE, chosen))
        if command == "run":
            stages.append(make_stage(PLOTS, trained))
        errors.update(jobs.execute(stages[len(stems) :], count, force))
    listed = [job for stage in stages for job in stage]
    _save_tables(listed, stems)
    for job in listed:
        if job.stem == PLOTS and job not in errors:
            print(f"report: {jobs.write_page(job)}")
    return errors


def choose(
    command: str, base: Settings, grid: list[Settings], count: int, force: bool
) -> list[Settings]:
    """Choose a configuration for a base model.

    Args:
        command: with `choose`, the configurations of the base model are its candidates,
            if there are several, or one that is not the default. Else those of
            `experiment.candidates` are.
        base: settings of the base model.
        grid: all configurations.
        count: how many processes.
        force: train the models of the folds again, as with the setting `retrain`.

    Returns:
        The chosen configuration; none if ERM is kept.
    """
    train = datasets.load(base).train
    listed = [item for item in grid if item.folder("runs") == base.folder("runs")]
    if command == "choose" and listed != [base]:
        candidates = [*dict.fromkeys(item.replace(cross_fit=True) for item in listed)]
    else:
        candidates = experiment.candidates(base, len(train))
    trained = experiment.base_model(base, train)
    retrain = force or base.retrain
    choice = experiment.choose(candidates, trained, train, count, retrain)
    settings = experiment.chosen_settings(choice, candidates)
    return [] if settings is None else [settings]


def _save_tables(listed: list[Job], stems: list[str]) -> None:
    """Save the tables of all results, and print those of a sweep, and where they are.

    Args:
        listed: what was run.
        stems: see `run_stages`.
    """
    directory = listed[0].settings.directory
    table = results.collect(directory)
    results.save_table(table, root(directory) / "results" / "results.csv")
    for stem in stems:
        results.gather_study(directory, stem)
    wanted = {(job.settings.experiment, job.name, job.settings.seed) for job in listed}
    keys = table[results.KEY].itertuples(index=False, name=None)
    of_jobs = table[[key in wanted for key in keys]]
    if FINETUNE in stems and len(of_jobs):
        summary = results.summarize(of_jobs, ["experiment", "configuration"])
        print(f"\nAccuracy in %\n\n{summary.to_string()}\n")
    for kind in ("checkpoints", "results", "runs", "figures"):
        folders = dict.fromkeys(str(job.settings.folder(kind)) for job in listed)
        print(f"{kind}:", *folders, sep="\n  ")
