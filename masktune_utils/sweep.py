"""The command `masktune`: a grid of settings → notebooks, run by papermill, side by side by joblib."""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import papermill
import yaml
from joblib import Parallel, cpu_count, delayed, parallel_config
from pydantic import TypeAdapter, ValidationError, conlist
from sklearn.model_selection import ParameterGrid
from tqdm import tqdm

from masktune_utils import data, evaluation, models, progress, store
from masktune_utils.settings import DEFAULTS, REPOSITORY, RUNTIME, Settings, from_text

NOTEBOOKS, PUBLISHED = REPOSITORY / "notebooks", REPOSITORY / "sweeps" / "published.yaml"
BASE, FINETUNE = ("02_erm", "03_saliency_masks"), "04_finetune_sweep"
STAGES = {"run": ("01_dataset", *BASE, FINETUNE, "05_plots"), "sweep": (*BASE, FINETUNE)}
USAGE = "masktune run|sweep [GRID] [--SETTING VALUE …] [--jobs N] [--dask ADDRESS] [--force] [--dry-run]"


def notebook_settings(stem: str) -> list[str]:
    """Names of the settings that are parameters of a notebook."""
    names = papermill.inspect_notebook(NOTEBOOKS / f"{stem}.ipynb")
    return [name for name in names if name in DEFAULTS]


class Job(NamedTuple):
    """One notebook to execute.

    Attributes:
        stem: name of the notebook.
        settings: those that are parameters of the notebook; the others have their defaults.
        name: the configuration, or `base`.
    """

    stem: str
    settings: Settings
    name: str

    @property
    def copy(self) -> Path:
        """The executed notebook."""
        suffix = f"_{self.name}" if self.stem == FINETUNE else ""
        return self.settings.folder("runs") / f"{self.stem}{suffix}.ipynb"

    def done(self, finished: set[tuple]) -> bool:
        """Whether it went through, and what it makes is saved; 01 and 05 are never done.

        Args:
            finished: see `store.finished_results`.
        """
        one = self.settings
        saved = (one.experiment, self.name, one.seed, one.test_folder) in finished
        files = self.copy, one.checkpoint_path(self.name)
        return saved and all(file.exists() for file in files) and self.stem in STAGES["sweep"]

    def run(self, force: bool = False) -> tuple["Job", str | None]:
        """Execute the notebook in a kernel of its own.

        Args:
            force: train again.

        Returns:
            The job, and None or the error that ended it, in one line.
        """
        values = {name: getattr(self.settings, name) for name in notebook_settings(self.stem)}
        values |= {"retrain": True} if force else {}
        options = {"cwd": NOTEBOOKS, "progress_bar": False, "stdout_file": progress.Bars()}
        options |= {"shutdown_kernel": "immediate", "extra_arguments": ["--log-level=50"]}
        source, target = NOTEBOOKS / f"{self.stem}.ipynb", self.copy
        with tempfile.TemporaryDirectory() as folder:
            copy, error = Path(folder) / "copy.ipynb", None
            try:
                papermill.execute_notebook(source, copy, values, **options)
                store.write_bytes(target, copy.read_bytes())
            except Exception as failure:  # noqa: BLE001 - any failure: the other notebooks go on
                kind = getattr(failure, "ename", type(failure).__name__)
                error = f"{kind}: {getattr(failure, 'evalue', failure)}".splitlines()[0]
                with contextlib.suppress(OSError):
                    store.write_bytes(target.with_stem(f"{target.stem}_failed"), copy.read_bytes())
        return self, error


def make_stage(stem: str, grid: list[Settings]) -> list[Job]:
    """A notebook for each of the settings, without those that differ only in what it ignores."""
    known = notebook_settings(stem)
    own = [Settings(**{name: getattr(one, name) for name in known}) for one in grid]
    names = [one.configuration if stem == FINETUNE else "base" for one in own]
    return list(dict.fromkeys(Job(stem, *pair) for pair in zip(own, names, strict=True)))


def execute(stages: list[list[Job]], count: int, force: bool = False) -> dict[Job, str]:
    """Run notebooks, those of a stage side by side, one stage after the other.

    What is done is skipped. A notebook that fails stops only those that need its base model.

    Args:
        stages: the notebooks.
        count: how many at once. Each has its share of the cores by the size of its whole stage, so
            that a sweep that goes on after a stop computes with as many threads, to the same bits.
        force: do configurations again that are done.

    Returns:
        The error of each job that failed or could not be run.
    """
    errors, directory = {}, stages[0][0].settings.directory
    with tqdm(total=sum(map(len, stages)), unit="notebook", ncols=110) as bar:
        for stage in stages:
            bad = {job.settings.folder("runs") for job in errors if job.stem in BASE}
            orphans = [job for job in stage if job.settings.folder("runs") in bad]
            errors |= dict.fromkeys(orphans, "not run, because its base model is missing")
            again, finished = force and stage[0].stem == FINETUNE, store.finished_results(directory)
            todo = [job for job in stage if job not in errors and (again or not job.done(finished))]
            bar.update(len(stage) - len(todo))
            parallel = Parallel(min(count, len(stage)), return_as="generator_unordered")
            for job, error in parallel(delayed(Job.run)(job, again) for job in todo):
                errors |= {job: error} if error else {}
                bar.set_description(f"{job.copy.stem}, seed {job.settings.seed}", refresh=False)
                bar.update()
    return errors


def report(stages: list[list[Job]]) -> None:
    """Print the table of a grid, over its seeds, and where everything is; save the whole table."""
    jobs = [job for stage in stages for job in stage]
    directory = jobs[0].settings.directory
    table, root = store.collect(directory), REPOSITORY / directory / "results"
    store.write_bytes(root / "results.csv", table.to_csv(index=False).encode())
    wanted = {(job.settings.experiment, job.name, job.settings.seed) for job in jobs}
    table = table[[key in wanted for key in table[store.KEY].itertuples(index=False, name=None)]]
    if len(table):
        print(f"\nAccuracy in %\n\n{evaluation.summarize(table, store.KEY[:2]).to_string()}\n")
    for kind in ("checkpoints", "results", "runs", "figures"):
        folders = dict.fromkeys(str(job.settings.folder(kind)) for job in jobs)
        print(f"{kind}:", *folders, sep="\n  ")


def read_grid(file: Path, given: dict[str, list]) -> list[Settings]:
    """All configurations of a grid file.

    Args:
        file: YAML; blocks of settings, each with a value or a list of values. A block stands for
            all their combinations.
        given: values from the command line, which win.

    Raises:
        FileNotFoundError: a data set is not on disk and cannot be downloaded.
        ValueError: the file is missing or no YAML, a setting or value is not allowed, or images are
            damaged.
    """
    grid, block = [], {}
    try:
        blocks = TypeAdapter(conlist(dict[str, Any], min_length=1))
        for block in blocks.validate_python(yaml.safe_load(file.read_bytes())):
            values = {key: v if isinstance(v, list) else [v] for key, v in block.items()}
            grid += [Settings(**combination) for combination in ParameterGrid(values | given)]
    except (OSError, ValidationError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"{file}: allowed: a list of blocks of settings ({reason}).") from error
    except ValueError as error:
        elsewhere = f"{error}".split()[0] in DEFAULTS.keys() - block | given.keys()
        raise ValueError(f"{error}" if elsewhere else f"{file}: {error}") from error
    names = {name: data.resolve_dataset(name) for name in {one.dataset for one in grid}}
    grid = [dataclasses.replace(one, dataset=names[one.dataset]) for one in grid]
    for one in {(s.dataset, s.train_folder, s.test_folder, s.limit): s for s in grid}.values():
        data.load(one)
    return list(dict.fromkeys(grid))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="masktune", usage=USAGE, description=__doc__)
    option = parser.add_argument
    option("command", choices=STAGES, help="run: all notebooks; sweep: 02, 03 and 04")
    option("grid", nargs="?", type=Path, default=PUBLISHED, help="YAML file, see sweeps/")
    option("--jobs", type=int, choices=range(1, 65), metavar="N", help="notebooks at once")
    option("--dask", metavar="ADDRESS", help="scheduler of a Dask cluster that shares the files")
    option("--force", action="store_true", help="do configurations again that are done")
    option("--dry-run", action="store_true", help="print the configurations, and run nothing")
    for name, field in Settings.__pydantic_fields__.items():
        about = f"{field.description} (default: {field.default!r})"
        count = 1 if name in RUNTIME else "+"
        option(f"--{name}", nargs=count, type=from_text, metavar="VALUE", help=about)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command. Bad arguments end it with exit code 2 before anything runs."""
    arguments = _parser().parse_intermixed_args(argv)
    given = {name: value for name, value in vars(arguments).items() if name in DEFAULTS and value}
    try:
        grid = read_grid(arguments.grid, given)
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
        states = {job: job.done(finished) for job in make_stage(FINETUNE, grid)}
        for job, done in states.items():
            print("done" if done else "    ", *job.settings.folder("runs").parts[-2:], job.name)
        print(f"{sum(states.values())} of them are done")
        return 0
    stages = [make_stage(stem, grid) for stem in STAGES[arguments.command]]
    count = arguments.jobs or min(cpu_count(), 8 if device.type == "cpu" else 4)
    try:
        errors = execute(stages, count, arguments.force)
        report(stages)
    except (KeyboardInterrupt, OSError) as error:
        print("\nmasktune:", f"{error}" or "interrupted; the same command goes on", file=sys.stderr)
        return 1 if isinstance(error, OSError) else 130
    for job, error in errors.items():
        print(f"failed: {job.copy.stem}, seed {job.settings.seed}: {error}", file=sys.stderr)
    print(f"\n{len(errors)} notebooks failed")
    return 1 if errors else 0
