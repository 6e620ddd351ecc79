"""The command `masktune`: the notebooks run headless by papermill, side by side by joblib, on one machine or many."""

import argparse
import ast
import contextlib
import dataclasses
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import papermill
from joblib import Parallel, cpu_count, delayed, parallel_config
from tqdm import tqdm

from masktune_utils import data, evaluation, experiment, training
from masktune_utils.experiment import REPOSITORY, Settings

NOTEBOOKS = REPOSITORY / "notebooks"
GRID = {"method": ["threshold", "top_k", "mean"], "param": [0.1, 0.3, 0.5, 0.7, 0.9]}  # the published configurations
FIELDS = tuple(field.name for field in dataclasses.fields(Settings))


@cache
def notebook_parameters(stem: str) -> tuple[str, ...]:
    """Names of the parameters of the notebook `stem`."""
    return tuple(papermill.inspect_notebook(NOTEBOOKS / f"{stem}.ipynb"))


class Job(NamedTuple):
    """One notebook to execute, with those settings that are parameters of it (see `job`)."""

    stem: str
    settings: Settings

    @property
    def copy(self) -> Path:
        """Where the executed notebook goes."""
        suffix = f"_{self.settings.configuration}" if self.is_configuration else ""
        return self.settings.folder("runs") / f"{self.stem}{suffix}.ipynb"

    @property
    def log(self) -> Path:
        """What it prints while it runs."""
        return self.copy.with_suffix(".log")

    @property
    def is_configuration(self) -> bool:
        """Whether it is one configuration of the grid (04)."""
        return "method" in notebook_parameters(self.stem)

    def done(self) -> bool:
        """Whether what it makes is there and matches its settings; 01 and 05 make only pictures, and never are."""
        with contextlib.suppress(ValueError):  # a damaged file: the notebook makes it again, or names it
            if self.is_configuration:
                return evaluation.recorded(self.settings) is not None
            if self.stem.startswith("02"):
                return self._went_through() and evaluation.recorded(self.settings, base=True) is not None
            return self.stem.startswith("03") and self._went_through() and self.settings.saliency_path.exists()
        return False

    def _went_through(self) -> bool:
        about = (experiment.read_json(self.copy) or {}).get("metadata", {})
        return not about.get("papermill", {}).get("exception", True)  # None, where all went well

    def run(self, force: bool = False) -> str | None:
        """Execute the notebook in a kernel of its own, unless it is done.

        Args:
            force: train again where it is a configuration that is done.

        Returns:
            None, or the error that ended it, in one line; the executed notebook shows where.
        """
        force = force and self.is_configuration
        if self.done() and not force:
            return None
        try:
            self._execute(force)
        except papermill.PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}".splitlines()[0]
        except Exception as error:  # noqa: BLE001 - a kernel that died, a full disk: it stops no other notebook
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None

    def _execute(self, force: bool) -> None:
        parameters = {name: getattr(self.settings, name) for name in notebook_parameters(self.stem) if name in FIELDS}
        options = {"cwd": NOTEBOOKS, "progress_bar": False, "shutdown_kernel": "immediate"}
        options["extra_arguments"] = ["--IPKernelApp.log_level=CRITICAL"]  # else it warns of every local TCP port
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder) / self.copy.name
            try:
                parameters |= {"retrain": True} if force else {}
                self.log.parent.mkdir(parents=True, exist_ok=True)
                with open(self.log, "w", encoding="utf-8") as options["stdout_file"]:
                    papermill.execute_notebook(NOTEBOOKS / f"{self.stem}.ipynb", unfinished, parameters, **options)
            finally:
                self.log.unlink(missing_ok=True)
                if unfinished.exists():
                    with experiment.atomic_write(self.copy) as file:
                        file.write(unfinished.read_bytes())


def job(stem: str, settings: Settings) -> Job:
    """The notebook `stem` with those of the settings that are parameters of it; the others at their defaults."""
    known = notebook_parameters(stem)
    return Job(stem, Settings(**{name: getattr(settings, name) for name in FIELDS if name in known}))


def default_jobs(device: str) -> int:
    """How many notebooks at once: one a core, up to 8; up to 4 where they share an accelerator."""
    return min(cpu_count(), 8 if training.resolve_device(device).type == "cpu" else 4)


@contextlib.contextmanager
def backend(dask: str | None) -> Iterator[None]:
    """Let joblib run the notebooks in processes of this machine, or on the Dask cluster of a scheduler.

    Both give each process, and so its kernels, a share of the cores (OMP_NUM_THREADS).

    Raises:
        ValueError: the package distributed is missing.
        OSError: no scheduler answers at the address.
    """
    if dask is None:
        with parallel_config(backend="loky"):
            yield
        return
    try:
        from distributed import Client
    except ImportError:
        raise ValueError("--dask needs the package distributed: pip install distributed") from None
    with Client(dask, timeout=5), parallel_config(backend="dask"):
        yield


def execute(stages: list[list[Job]], jobs: int, force: bool = False) -> dict[Job, str]:
    """Run notebooks, those of a stage side by side, one stage after the other.

    What is done is skipped. One that fails stops none but those that need its base model or its saliency maps.

    Args:
        stages: the notebooks.
        jobs: how many at once. Each has its share of the cores by the size of its whole stage, so that a sweep that
            goes on after a stop computes with as many threads as one that never stopped, and to the same bits.
        force: do configurations again that are done.

    Returns:
        The error of each job that failed or could not be run.
    """
    errors: dict[Job, str] = {}
    skipped = 0
    with tqdm(total=sum(map(len, stages)), unit="notebook") as bar:
        for stage in stages:
            broken = {job.settings.folder("checkpoints") for job in errors if job.stem.startswith(("02", "03"))}
            orphans = [job for job in stage if job.settings.folder("checkpoints") in broken]
            errors |= dict.fromkeys(orphans, "not run, for want of its base model")
            done = [job for job in stage if job not in errors and job.done() and not (force and job.is_configuration)]
            todo = [job for job in stage if job not in errors and job not in done]
            skipped += len(done)
            bar.update(len(stage) - len(todo))
            bar.set_postfix_str(f"{skipped} skipped" if skipped else "")
            parallel = Parallel(n_jobs=min(jobs, max(1, len(stage))), return_as="generator_unordered")
            with _watching(bar, todo):
                for current, error in parallel(delayed(_run)(job, force) for job in todo):
                    errors |= {current: error} if error else {}
                    bar.set_description(f"{current.copy.stem}, seed {current.settings.seed}", refresh=False)
                    bar.update()
    return errors


@contextlib.contextmanager
def _watching(bar: tqdm, jobs: list[Job], seconds: float = 3) -> Iterator[None]:
    """Every few seconds, show beside the bar how far the notebooks that run are: what their own bars print last."""
    stop, before = threading.Event(), bar.postfix or ""

    def watch() -> None:
        while not stop.wait(seconds):
            last = {}
            for job in jobs:
                with contextlib.suppress(OSError):
                    printed = job.log.read_text(encoding="utf-8", errors="replace")
                    last[job] = re.search(r"(.*%).*<([\d:]+)", printed.rpartition("\n")[2])
            said = [f"seed {job.settings.seed} {line[1]}, {line[2]} left" for job, line in last.items() if line]
            bar.set_postfix_str("; ".join(filter(None, [before, *said])))

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.set_postfix_str(before, refresh=False)


def _run(job: Job, force: bool) -> tuple[Job, str | None]:
    return job, job.run(force)


def run(grid: list[Settings], *, jobs: int, whole: bool, force: bool = False) -> int:
    """Execute the notebooks for a grid: 02 and 03 once per base model, 04 for each of the settings.

    Args:
        grid: the settings of every configuration.
        jobs: notebooks at once.
        whole: the dataset (01) and the plots (05) as well.
        force: do configurations again that are done.

    Returns:
        The exit code: 0, or 1 where something failed.
    """
    started = time.perf_counter()
    stems = ["01_dataset", "02_erm", "03_saliency_masks", "04_finetune_sweep", "05_plots"]
    stages = [
        list(dict.fromkeys(job(stem, settings) for settings in grid)) for stem in (stems if whole else stems[1:-1])
    ]
    print(f"{len(grid)} configurations, digits: {grid[0].dataset}, device: {training.resolve_device(grid[0].device)}")
    errors = execute(stages, jobs, force)
    code = 1 if errors else 0
    try:
        report([job for stage in stages for job in stage], grid)
    except (ValueError, OSError) as error:  # a damaged result, perhaps of another experiment; a full disk
        print(f"masktune: no table: {error}", file=sys.stderr)
        code = 1
    print(f"\n{len(grid)} configurations in {time.perf_counter() - started:.0f} s, {len(errors)} notebooks failed")
    for failed, error in errors.items():
        print(
            f"failed: {failed.copy.stem}, seed {failed.settings.seed}: {error}\n        {failed.copy}", file=sys.stderr
        )
    return code


def report(jobs: list[Job], grid: list[Settings]) -> None:
    """Print the table of a grid, over its seeds, and where everything lies."""
    table = evaluation.collect(grid[0].directory)
    wanted = {(s.experiment, s.seed, name) for s in grid for name in ("base", s.configuration)}
    found = table[["experiment", "seed", "configuration"]].itertuples(index=False, name=None)
    table = table[[row in wanted for row in found]]
    if len(table):
        print(f"\nAccuracy in %\n\n{evaluation.summarize(table).to_string()}\n")
    leaves = {"checkpoints": grid, "runs": [job.settings for job in jobs], "figures": [job.settings for job in jobs]}
    for kind, settings in leaves.items():
        print(f"{kind + ':':13}{', '.join(dict.fromkeys(str(s.folder(kind)) for s in settings))}")
    print(f"{'results:':13}{grid[0].folder('results').parents[1] / 'results.csv'}")
    pictures = [(job.settings.folder("figures"), f"{job.stem[:2]}_*.png") for job in jobs]
    for figure in dict.fromkeys(path for folder, names in pictures for path in sorted(folder.glob(names))):
        print(f"{'':13}{figure}")


def _grid(arguments: argparse.Namespace) -> list[Settings]:
    """All combinations of the command's arguments, each of them checked."""
    fixed = {"directory": str(Path(arguments.directory or REPOSITORY).resolve()), "device": arguments.device}
    values = GRID | {name: [value] for name, value in experiment.PRESETS.get(arguments.preset, {}).items()}
    given = {"dataset": [arguments.dataset], "epochs": [arguments.epochs], "seed": arguments.seeds}
    given |= {"method": arguments.methods, "param": arguments.params}
    values |= {name: value for name, value in given.items() if value is not None}
    known = [name for name in notebook_parameters("04_finetune_sweep") if name not in experiment.RUNTIME]
    for name, *texts in arguments.parameters:
        if name not in known or not texts:
            raise ValueError(f"-p {' '.join([name, *texts])}: give a name and values; names: {', '.join(known)}.")
        values[name] = [_literal(text) for text in texts]
    combinations = [dict(zip(values, combination, strict=True)) for combination in product(*values.values())]
    grid = [Settings(**combination, **fixed) for combination in combinations]
    experiment.check_directory(grid[0].directory)
    digits = {name: data.resolve_dataset(name) for name in values["dataset"]}
    grid = list(dict.fromkeys(dataclasses.replace(settings, dataset=digits[settings.dataset]) for settings in grid))
    for dataset, *folders in {(settings.dataset, settings.train_folder, settings.test_folder) for settings in grid}:
        data.load(dataset, train_folder=folders[0], test_folder=folders[1])  # downloaded once; refused now, if at all
    return grid


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _add_command(commands: argparse._SubParsersAction, name: str, help: str) -> None:
    defaults = Settings()
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = commands.add_parser(name, help=help, description=help, formatter_class=formatter, allow_abbrev=False)
    parser.set_defaults(parser=parser, whole=name == "run")
    option = parser.add_argument
    option("--dataset", default=defaults.dataset, help=", ".join(data.DATASETS))
    option("--preset", choices=experiment.PRESETS, help="start from the settings of this name")
    option(
        "--methods",
        nargs="+",
        metavar="METHOD",
        help=f"mask methods; None: {', '.join(GRID['method'])}, or the preset's",
    )
    option(
        "--params",
        nargs="+",
        type=float,
        metavar="PARAM",
        help=f"of each method; None: {GRID['param']}, or the preset's",
    )
    option("--seeds", nargs="+", type=int, default=[defaults.seed], metavar="SEED", help="each with its base model")
    option("--epochs", type=int, default=defaults.epochs, help="of the base model")
    option(
        "-p",
        dest="parameters",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="any other parameter of notebook 04; with several values it is one more dimension of the grid",
    )
    option("--directory", default=defaults.directory, help="where artefacts go; empty: the repository root")
    option("--device", default=defaults.device, help="auto, cpu, cuda or mps")
    option("--jobs", type=int, metavar="N", help="notebooks at once; None: one a core, up to 8 (4 on a GPU)")
    option("--dask", metavar="ADDRESS", help="run on the Dask cluster of this scheduler, which shares the directory")
    option("--force", action="store_true", help="do configurations again that are done")


def main(argv: list[str] | None = None) -> int:
    """Entry point of the command `masktune`; bad arguments end it with exit code 2 before anything runs."""
    parser = argparse.ArgumentParser(prog="masktune", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_command(commands, "run", "execute all notebooks: 01, 02, 03, then 04 for every configuration, then 05")
    _add_command(commands, "sweep", "execute 04 for every configuration; before it 02 and 03, where they are missing")
    arguments, unknown = parser.parse_known_args(argv)
    with contextlib.ExitStack() as stack:
        try:
            if unknown:
                raise ValueError(f"unknown arguments: {' '.join(unknown)}")
            grid = _grid(arguments)
            jobs = default_jobs(grid[0].device) if arguments.jobs is None else arguments.jobs
            if jobs < 1:
                raise ValueError(f"--jobs is {jobs}; allowed: 1 and more.")
            stack.enter_context(backend(arguments.dask))
        except (ValueError, TypeError, OSError) as error:
            arguments.parser.error(str(error))
        try:
            return run(grid, jobs=jobs, whole=arguments.whole, force=arguments.force)
        except KeyboardInterrupt:
            print("\nmasktune: interrupted; what is finished is kept, and the same command goes on", file=sys.stderr)
            return 130
