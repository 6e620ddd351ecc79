"""A grid of settings → notebooks, run by papermill, side by side by joblib."""

import contextlib
import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import papermill
import yaml
from joblib import Parallel, cpu_count, delayed
from pydantic import TypeAdapter, ValidationError, conlist
from sklearn.model_selection import ParameterGrid
from tqdm import tqdm

from masktune_utils import data, evaluation, kernels, models, progress, store
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings

NOTEBOOKS = REPOSITORY / "notebooks"
BASE, FINETUNE = ("02_erm", "03_saliency_masks"), "04_finetune_sweep"
ALWAYS = "01_dataset", "05_plots"  # they are quick, and show what is there
GRIDS = {path.stem: path for path in (REPOSITORY / "sweeps").glob("*.yaml")}


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
        """Whether it went through, and what it makes is saved; never for those of `ALWAYS`.

        Args:
            finished: see `store.finished_results`.
        """
        one = self.settings
        saved = (one.experiment, self.name, one.seed, one.test_folder) in finished
        files = self.copy, one.checkpoint_path(self.name)
        return saved and all(file.exists() for file in files) and self.stem not in ALWAYS

    def run(self, threads: int, force: bool = False) -> tuple["Job", str | None]:
        """Execute the notebook in a kernel that has forgotten all others.

        Args:
            threads: see `kernels.warm`.
            force: train again.

        Returns:
            The job, and None or the error that ended it, in one line.
        """
        values = {name: getattr(self.settings, name) for name in notebook_settings(self.stem)}
        values |= {"retrain": True} if force else {}
        options = {"progress_bar": False, "stdout_file": progress.Bars()}
        source, target = NOTEBOOKS / f"{self.stem}.ipynb", self.copy
        with tempfile.TemporaryDirectory() as folder:
            copy, error = Path(folder) / "copy.ipynb", None
            try:
                with kernels.warm(NOTEBOOKS, threads) as kernel:
                    papermill.execute_notebook(source, copy, values, km=kernel, **options)
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
    errors = {}
    with tqdm(total=sum(map(len, stages)), unit="notebook", ncols=110) as bar:
        for stage in stages:
            bad = {job.settings.folder("runs") for job in errors if job.stem in BASE}
            orphans = [job for job in stage if job.settings.folder("runs") in bad]
            errors |= dict.fromkeys(orphans, "not run, because its base model is missing")
            again = force and stage[0].stem not in (*BASE, *ALWAYS)
            finished = store.finished_results(stage[0].settings.directory)
            todo = [job for job in stage if job not in errors and (again or not job.done(finished))]
            bar.update(len(stage) - len(todo))
            together = min(count, len(stage))
            run = partial(Job.run, threads=max(1, cpu_count() // together), force=again)
            options = {"prefer": "threads", "return_as": "generator_unordered"}
            for job, error in Parallel(together, **options)(delayed(run)(job) for job in todo):
                errors |= {job: error} if error else {}
                bar.set_description(f"{job.copy.stem}, seed {job.settings.seed}", refresh=False)
                bar.update()
    return errors


def report(stages: list[list[Job]], summary: bool = True) -> None:
    """Save the table of all results, and print where everything is.

    What a study's notebook has saved for each experiment as `{stem}.csv` becomes one table.

    Args:
        stages: what was run.
        summary: print the results of these notebooks first, over their seeds.
    """
    jobs = [job for stage in stages for job in stage]
    directory = jobs[0].settings.directory
    table, root = store.collect(directory), REPOSITORY / directory / "results"
    store.write_bytes(root / "results.csv", table.to_csv(index=False).encode())
    for name in {f"{stage[0].stem}.csv" for stage in stages}:
        if parts := [pd.read_csv(path) for path in sorted(root.glob(f"*/seed*/{name}"))]:
            store.write_bytes(root / name, pd.concat(parts).to_csv(index=False).encode())
    wanted = {(job.settings.experiment, job.name, job.settings.seed) for job in jobs}
    table = table[[key in wanted for key in table[store.KEY].itertuples(index=False, name=None)]]
    if len(table) and summary:
        print(f"\nAccuracy in %\n\n{evaluation.summarize(table, store.KEY[:2]).to_string()}\n")
    for kind in ("checkpoints", "results", "runs", "figures"):
        folders = dict.fromkeys(str(job.settings.folder(kind)) for job in jobs)
        print(f"{kind}:", *folders, sep="\n  ")


def read_grid(file: Path | None, given: dict[str, list]) -> tuple[str, list[Settings]]:
    """A grid file: the notebook, and all configurations.

    Args:
        file: None: all defaults. YAML; blocks of settings, each with a value or a list of values. A block stands for
            all their combinations. The first may name the `notebook`, by default 04.
        given: values from the command line, which win.

    Raises:
        FileNotFoundError: a data set is not on disk and cannot be downloaded.
        ValueError: the file is missing or no YAML, there is no such notebook, a setting or value is
            not allowed, or images are damaged.
    """
    grid, block, stem = [], {}, FINETUNE
    try:
        blocks = TypeAdapter(conlist(dict[str, Any], min_length=1))
        blocks = blocks.validate_python(yaml.safe_load(file.read_bytes()) if file else [{}])
        stem, stems = blocks[0].pop("notebook", stem), [p.stem for p in NOTEBOOKS.glob("*.ipynb")]
        if stem not in stems:
            raise ValueError(f"notebook is {stem!r}; allowed: {', '.join(sorted(stems))}.")
        foreign = DEFAULTS.keys() - set(notebook_settings(stem))
        for block in blocks:
            if unknown := (block | given).keys() & foreign:
                raise ValueError(f"{min(unknown)} is not a parameter of {stem}; leave it out.")
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
    for one in grid:
        models.check(one.image_size, **one.network)
    sources = "dataset", "train_folder", "test_folder", "limit", "image_size"
    for one in {tuple(getattr(one, name) for name in sources): one for one in grid}.values():
        data.load(one)
    return stem, list(dict.fromkeys(grid))
