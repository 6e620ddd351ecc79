"""Jobs: notebooks executed with settings by papermill, side by side by joblib."""

import asyncio
import logging
import os
import re
from pathlib import Path
from typing import NamedTuple

from joblib import Parallel, cpu_count, delayed, parallel_config

from masktune_utils import progress, store
from masktune_utils.runner import kernels
from masktune_utils.runner.grids import NOTEBOOKS
from masktune_utils.settings import BaseSettings, Settings

# It warns of settings that are not in the cell of parameters.
logging.getLogger("papermill").setLevel(logging.ERROR)
BASE = "02_erm"  # makes the base model, on which all later ones depend
FINETUNE = "04_finetune_sweep"  # once for each configuration; the others, once
PLOTS = "05_plots"


class Job(NamedTuple):
    """One notebook to execute.

    Attributes:
        stem: name of the notebook.
        settings: those that the notebook depends on.
    """

    stem: str
    settings: BaseSettings

    @property
    def copy(self) -> Path:
        """The executed notebook."""
        name = self.stem
        if name == FINETUNE:
            name += f"_{self.settings.configuration}"
        return self.settings.folder("runs") / f"{name}.ipynb"

    @property
    def is_done(self) -> bool:
        """Whether its copy is there, and no older than the base model that it used."""
        if not self.copy.exists():
            return False
        base = self.settings.checkpoint_path("base")
        if self.stem <= BASE or not base.exists():
            return True
        return self.copy.stat().st_mtime >= base.stat().st_mtime

    def run(self, together: int) -> str | None:
        """Execute the notebook; if it fails, what there is of it has another name.

        Args:
            together: how many notebooks share the cores of this machine.

        Returns:
            The error that ended it, in one line; or None.
        """
        import papermill  # takes a second

        # Another process may run the same notebook.
        name = f"{self.copy.stem}_{os.getpid()}_unfinished"
        unfinished = self.copy.with_stem(name)
        # Cells of 04 that do not depend on its parameters run with the default ones.
        is_default = self.settings.configuration == Settings().configuration
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with kernels.take(max(1, cpu_count() // together)) as kernel:
                papermill.execute_notebook(
                    NOTEBOOKS / f"{self.stem}.ipynb",
                    unfinished,
                    self.settings.model_dump(),
                    km=kernel,
                    progress_bar=False,
                    skip_cells_with_tag="" if is_default else "from-scratch",
                )
            unfinished.replace(self.copy)
        except papermill.PapermillExecutionError as failure:
            return f"{failure.ename}: {failure.evalue}".splitlines()[0]
        except Exception as failure:  # noqa: BLE001 - the others go on
            return f"{type(failure).__name__}: {failure}".splitlines()[0]
        return None


def make_stage(stem: str, grid: list[BaseSettings]) -> list[Job]:
    """A notebook for each of the settings that differ in what it depends on."""
    if stem != FINETUNE:
        grid = [settings.base for settings in grid]
    return [Job(stem, settings) for settings in dict.fromkeys(grid)]


def execute(stages: list[list[Job]], count: int) -> dict[Job, str]:
    """Run notebooks, those of a stage side by side, one stage after the other.

    What is done is skipped. A notebook that fails stops only those that need its base
    model.

    Args:
        stages: the notebooks.
        count: how many at once; none if 0. Each has its share of the cores by the size
            of its whole stage, so that a sweep that goes on after a stop computes with
            as many threads, to the same bits.

    Returns:
        The error of each job that failed or could not be run.
    """
    errors = {}
    for stage in stages:
        todo = []
        for job in stage:
            if Job(BASE, job.settings.base) in errors:
                errors[job] = "not run, because its base model is missing"
            elif not job.is_done or job.stem == PLOTS:  # which shows all there is
                todo.append(job)
        print(f"{stage[0].stem}: {len(todo)} of {len(stage)} to run", flush=True)
        if not count:
            continue
        together = min(count, len(stage))
        tasks = [delayed(job.run)(together) for job in todo]
        outcomes = Parallel(together, prefer="threads", return_as="generator")(tasks)
        bar = progress.bar(outcomes, total=len(todo))
        for job, error in zip(todo, bar, strict=True):
            if error:
                errors[job] = error
    return errors


def use_cluster(address: str) -> None:
    """From now on, the workers of a Dask cluster execute what joblib gets.

    Args:
        address: of its scheduler, tcp://HOST:PORT.

    Raises:
        ValueError: the package distributed is missing; or no scheduler answers there.
    """
    try:
        from distributed import Client  # heavy, and seldom wanted
        from distributed.comm import connect
    except ImportError:
        raise ValueError("--dask: first run pip install distributed") from None
    try:  # A client would wait for ever for what accepts it and is no scheduler.
        asyncio.run(asyncio.wait_for(connect(address), 5)).abort()
    except Exception as problem:  # noqa: BLE001 - whatever it is that answers
        message = f"--dask {address!r}: there is no Dask scheduler ({problem!r})"
        raise ValueError(f"{message}; allowed: tcp://HOST:PORT of one") from None
    parallel_config("dask", client=Client(address))


def write_page(job: Job) -> Path:
    """Write an executed notebook without its code, as one file to be read offline."""
    from nbconvert import HTMLExporter  # heavy, and seldom wanted

    # The default template leaves out what pictures show, in words.
    exporter = HTMLExporter(template_name="classic", exclude_input=True)
    page, _ = exporter.from_filename(job.copy)
    # Scripts would be loaded from the network.
    page = re.sub("(?s)<script.*?</script>", "", page)
    path = job.settings.folder("results") / f"{job.stem}.html"
    store.write_bytes(path, page.encode())
    return path
