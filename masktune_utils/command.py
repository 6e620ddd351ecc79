"""The command `masktune`: the notebooks in their order, a sweep, or a choice among candidates."""

import argparse
import ast
import contextlib
import itertools
import sys
from collections import Counter
from pathlib import Path

from joblib import cpu_count, parallel_config

from masktune_utils import evaluation, models, selection, store, sweep
from masktune_utils.settings import DEFAULTS, RUNTIME, Settings
from masktune_utils.sweep import BASE, FINETUNE, GRIDS, Job, make_stage

STAGES = {"run": ("01_dataset", *BASE, FINETUNE), "sweep": (*BASE, FINETUNE), "choose": BASE}
USAGE = "masktune run|sweep|choose [GRID] [--SETTING VALUE …] [--jobs N] [--dask ADDRESS] [--force] [--dry-run]"


def conclude(bases: list[Settings]) -> None:
    """Print for each experiment what was chosen, how sure that is, and what it is worth.

    Args:
        bases: the settings of the base models.
    """
    table = store.collect(bases[0].directory)
    chosen = [one for one in bases if (one.folder("results") / "chosen.json").exists()]
    for name, group in itertools.groupby(chosen, lambda one: one.experiment):
        print(f"\n{name}\n")
        same = list(group)
        for one in same:
            choice = store.read_result(one.folder("results") / "chosen.json")
            print(f"seed {one.seed}: {selection.describe(choice)}")
        rows = selection.compare(table, same[0])
        print(f"\nAccuracy in %\n\n{evaluation.summarize(rows, ['model']).to_string()}\n")
        worst = rows.groupby("model")["worst_group"].mean()
        print(f"In its worst group, ERM is right on {worst['ERM']:.1%} of the images;", end=" ")
        print(f"with the mask that it chose itself, MaskTune on {worst[selection.SELF_TUNED]:.1%}.")
        groups = [name for name in rows if name.startswith("group ")]
        print(f"{evaluation.summarize(rows, ['model'], groups).T.to_string()}\n")
        if (picture := same[0].folder("figures") / "05_self_tuned.png").exists():
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


def choose(command: str, grid: list[Settings], count: int, force: bool, errors: dict) -> list[Job]:
    """Choose a configuration for each base model of the grid.

    Args:
        command: `choose`: among the grid. `run`: among those of `sweep.candidates`.
        grid: all configurations.
        count: how many processes.
        force: fine-tune candidates again.
        errors: of the jobs that failed; a choice that fails is added.

    Returns:
        The chosen configurations, to be run as a notebook.
    """
    chosen, failed = [], {job.settings.folder("runs") for job in errors if job.stem in BASE}
    bases = make_stage(BASE[0], grid)
    for job in [base for base in bases if base.settings.folder("runs") not in failed]:
        folder = job.settings.folder("runs")
        candidates, others = [one for one in grid if one.folder("runs") == folder], []
        if command == "run":
            lost = {bad.name for bad in errors if bad.settings.folder("runs") == folder}
            others = [one for one in candidates if one.configuration not in lost]
            candidates = sweep.self_tuned(job.settings)
        try:
            choice = selection.choose(candidates, others, count, force)
            chosen += [one for one in candidates if one.configuration == choice["configuration"]]
        except Exception as error:  # noqa: BLE001 - any failure: the other choices go on
            errors[job._replace(stem="choice")] = f"{type(error).__name__}: {error}".splitlines()[0]
    return make_stage(FINETUNE, chosen)


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command. Bad arguments end it with exit code 2 before anything runs."""
    arguments = _parser().parse_intermixed_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS and value}
    try:
        candidates = sweep.candidates(given.get("dataset", [""])[0])
        default = candidates if arguments.command == "choose" else GRIDS["published"]
        stem, grid = sweep.read_grid(arguments.grid or default, given)
        if stem != FINETUNE and arguments.command != "sweep":
            raise ValueError(f"notebook is {stem!r}; allowed, except with sweep: {FINETUNE}.")
        sizes = Counter(one.folder("runs") for one in grid).values()
        if arguments.command == "choose" and min(sizes) < 2:
            raise ValueError("1 candidate for a base model; allowed: 2 or more.")
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
    stages = [make_stage(stem, grid) for stem in stems]
    count = arguments.jobs or min(cpu_count(), 8 if device.type == "cpu" else 4)
    try:
        errors = sweep.execute(stages, count, arguments.force)
        if arguments.command != "sweep":
            chosen = choose(arguments.command, grid, count, arguments.force, errors)
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
