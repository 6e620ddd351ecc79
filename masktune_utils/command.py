"""The command `masktune`: the notebooks in their order, a sweep, or a choice among candidates."""

import argparse
import ast
import contextlib
import dataclasses
import itertools
import sys
from pathlib import Path

from joblib import cpu_count, parallel_config

from masktune_utils import evaluation, models, selection, shortcuts, store, sweep
from masktune_utils.settings import DEFAULTS, RUNTIME, Settings
from masktune_utils.sweep import BASE, FINETUNE, GRIDS, Job, make_stage

STAGES = {"run": ("01_dataset", *BASE, FINETUNE), "sweep": (*BASE, FINETUNE), "choose": BASE}
USAGE = "masktune run|sweep|choose [GRID] [--SETTING VALUE …] [--jobs N] [--dask ADDRESS] [--force] [--dry-run]"


def conclude(bases: list[Settings]) -> None:
    """Print for each experiment what was chosen, why, and what it is worth.

    Args:
        bases: the settings of the base models.
    """
    table = store.collect(bases[0].directory)
    chosen = [base for base in bases if (base.folder("results") / "chosen.json").exists()]
    for name, group in itertools.groupby(chosen, lambda base: base.experiment):
        print(f"\n{name}\n")
        seeds = list(group)
        for base in seeds:
            choice = store.read_result(base.folder("results") / "chosen.json")
            print(f"seed {base.seed}: {choice['reason']}")
        rows = selection.compare(table, seeds[0])
        print(f"\nAccuracy in %\n\n{evaluation.summarize(rows, ['model']).to_string()}\n")
        worst = rows.groupby("model")["worst_group"].mean()
        print(f"In its worst group, ERM is right on {worst['ERM']:.1%} of the images;", end=" ")
        print(f"what was chosen, on {worst[selection.CHOSEN]:.1%}.")
        groups = [name for name in rows if name.startswith("group ")]
        print(f"{evaluation.summarize(rows, ['model'], groups).T.to_string()}\n")
        if (picture := seeds[0].folder("figures") / "05_chosen.png").exists():
            print(f"See {picture}")


def from_text(text: str) -> object:
    """A number, None, True or False as Python writes it; else the text itself."""
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="masktune", usage=USAGE, description=__doc__)
    option = parser.add_argument
    about = "run: all notebooks, and a choice; sweep: 02, 03 and 04; choose: among candidates"
    option("command", choices=STAGES, help=about)
    option("grid", nargs="?", type=Path, help="YAML file, see sweeps/")
    option("--jobs", type=int, choices=range(1, 65), metavar="N", help="notebooks at once")
    option("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that shares the files")
    option("--force", action="store_true", help="do configurations again that are done")
    option("--dry-run", action="store_true", help="print the configurations, and run nothing")
    for name, field in Settings.__pydantic_fields__.items():
        about = f"{field.description} (default: {field.default!r})"
        count = 1 if name in RUNTIME else "+"
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        option(*spellings, dest=name, nargs=count, type=from_text, metavar="VALUE", help=about)
    return parser


def choose(grid: list[Settings], listed: bool, count: int, force: bool, errors: dict) -> list[Job]:
    """Choose a configuration for each base model of the grid.

    Args:
        grid: all configurations.
        listed: whether several of one base model are its candidates; else, and of a base model with one
            configuration, those of `selection.candidates` are.
        count: how many processes.
        force: train the models of the halves again.
        errors: of the jobs that failed; a choice that fails is added.

    Returns:
        The chosen configurations, to be run as a notebook; none where ERM is kept.
    """
    failed = {job.settings.folder("runs") for job in errors if job.stem in BASE}
    chosen = []
    for job in make_stage(BASE[0], grid):
        folder = job.settings.folder("runs")
        if folder in failed:
            continue
        try:
            of_base = [one for one in grid if one.folder("runs") == folder]
            if listed and len(of_base) > 1:
                candidates = [dataclasses.replace(one, cross_fit=True) for one in of_base]
            else:
                images = len(shortcuts.load(job.settings).train)
                candidates = selection.candidates(job.settings, images)
            choice = selection.choose(candidates, count, force)
        except Exception as error:  # noqa: BLE001 - any failure: the other choices go on
            errors[job._replace(stem="choice")] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        chosen += [one for one in candidates if one.configuration == choice["configuration"]]
    return make_stage(FINETUNE, chosen)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command. Bad arguments end it with exit code 2 before anything runs."""
    arguments = _parser().parse_intermixed_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS and value}
    published = None if given.get("dataset") == ["folder"] else GRIDS["published"]
    default = None if arguments.command == "choose" else published
    file = arguments.grid or default
    try:
        stem, grid = sweep.read_grid(file, given)
        if stem != FINETUNE and arguments.command != "sweep":
            raise ValueError(f"notebook is {stem!r}; allowed, except with sweep: {FINETUNE}.")
        device = models.resolve_device(grid[0].device)
        finished = store.finished_results(grid[0].directory)
        if arguments.dask:
            from distributed import Client

            Client(arguments.dask, timeout=5)
            parallel_config(backend="dask")
    except (ValueError, OSError) as error:
        print(f"masktune: {error}", file=sys.stderr)
        return 2
    print(f"{len(grid)} configurations, images: {grid[0].dataset}, device: {device}")
    if arguments.dry_run:
        states = {job: job.done(finished) for job in make_stage(stem, grid)}
        for job, done in states.items():
            print("done" if done else "    ", *job.settings.folder("runs").parts[-2:], job.name)
        print(f"{sum(states.values())} of them are done")
        return 0
    stems = STAGES[arguments.command] if stem == FINETUNE else [stem]
    if arguments.command == "run" and not file:  # there is nothing to compare the choice with
        stems = [stem for stem in stems if stem != FINETUNE]
    stages = [make_stage(stem, grid) for stem in stems]
    count = arguments.jobs or min(cpu_count(), 8 if device.type == "cpu" else 4)
    try:
        store.check_writable(grid[0].directory)
    except ValueError as error:
        print(f"masktune: {error}", file=sys.stderr)
        return 2
    try:
        errors = sweep.execute(stages, count, arguments.force)
        if arguments.command != "sweep":
            listed = arguments.command == "choose"
            chosen = choose(grid, listed, count, arguments.force, errors)
            last = make_stage("05_plots", grid) if arguments.command == "run" else []
            later = [stage for stage in (chosen, last) if stage]
            errors |= sweep.execute(later, count)
            stages += later
        sweep.report(stages, summary=FINETUNE in stems and arguments.command == "sweep")
    except (KeyboardInterrupt, OSError) as error:
        print("\nmasktune:", f"{error}" or "interrupted; the same command goes on", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 130
    for job, error in errors.items():
        print(f"failed: {job.copy.stem}, seed {job.settings.seed}: {error}", file=sys.stderr)
    print(f"\n{len(errors)} notebooks failed")
    if arguments.command != "sweep":
        conclude([job.settings for job in make_stage(BASE[0], grid)])
    return 1 if errors else 0
