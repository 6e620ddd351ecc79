"""Jobs: notebooks executed with settings by papermill, side by side by joblib."""

import contextlib
import logging
import re
import tempfile
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import papermill
from joblib import Parallel, cpu_count, delayed
from tqdm import tqdm

from masktune_utils import progress, results, store
from masktune_utils.runner.grids import FINETUNE
from masktune_utils.runner.kernels import warm_kernels
from masktune_utils.settings import REPOSITORY, BaseSettings, Settings

# It warns of settings that are not in the cell of parameters.
logging.getLogger("papermill").setLevel(logging.ERROR)
NOTEBOOKS = REPOSITORY / "notebooks"
ERM = "02_erm"
BASE = (ERM, "03_saliency_masks")
PLOTS = "05_plots"
ALWAYS = ("01_dataset", PLOTS)  # they are quick, and show what is there


class Job(NamedTuple):
    """One notebook to execute.

    Attributes:
        stem: name of the notebook.
        settings: those that the notebook depends on; the others have their defaults.
    """

    stem: str
    settings: Settings

    @property
    def name(self) -> str:
        """The configuration, or `base`."""
        return self.settings.configuration if self.stem == FINETUNE else "base"

    @property
    def copy(self) -> Path:
        """The executed notebook."""
        suffix = f"_{self.name}" if self.stem == FINETUNE else ""
        return self.settings.folder("runs") / f"{self.stem}{suffix}.ipynb"

    @property
    def failed_copy(self) -> Path:
        """The notebook as far as it got, if it failed."""
        return self.copy.with_stem(f"{self.copy.stem}_failed")

    def is_done(self, finished: set[tuple]) -> bool:
        """Whether its executed copy, and the result and checkpoint of its model exist.

        A notebook other than 04 has the base model.

        Never with `retrain`, nor for those of `ALWAYS`.

        Args:
            finished: see `results.finished`.
        """
        settings = self.settings
        key = (settings.experiment, self.name, settings.seed, settings.test_folder)
        if settings.retrain or key not in finished or self.stem in ALWAYS:
            return False
        return self.copy.exists() and settings.checkpoint_path(self.name).exists()

    def run(self, together: int, force: bool = False) -> tuple["Job", str | None]:
        """Execute the notebook, and keep the copy, or what there is of it.

        Args:
            together: how many notebooks share the cores of this machine.
            force: train again.

        Returns:
            The job, and None or the error that ended it, in one line.
        """
        threads = max(1, cpu_count() // together)
        values = self._values()
        if force:
            values["retrain"] = True
        error = None
        with tempfile.TemporaryDirectory() as folder:
            executed = Path(folder) / "executed.ipynb"
            try:
                with warm_kernels.take(threads) as kernel:
                    papermill.execute_notebook(
                        NOTEBOOKS / f"{self.stem}.ipynb",
                        executed,
                        values,
                        km=kernel,
                        progress_bar=False,
                        stdout_file=progress.Bars(),
                    )
                store.write_bytes(self.copy, executed.read_bytes())
                self.failed_copy.unlink(missing_ok=True)
            except Exception as failure:  # noqa: BLE001 - the others go on
                error = in_one_line(failure)
                with contextlib.suppress(OSError):
                    store.write_bytes(self.failed_copy, executed.read_bytes())
        return self, error

    def _values(self) -> dict[str, Any]:
        """The parameters to inject: what the notebook shows, or is not the default."""
        names = {*parameters(self.stem), *self.settings.changed()}
        in_scope = [name for name in scope(self.stem).model_fields if name in names]
        return {name: getattr(self.settings, name) for name in in_scope}


def in_one_line(failure: Exception) -> str:
    """Kind and message, those of the cell if a cell failed."""
    kind = getattr(failure, "ename", type(failure).__name__)
    message = getattr(failure, "evalue", failure)
    return f"{kind}: {message}".splitlines()[0]


def scope(stem: str) -> type[BaseSettings]:
    """The settings that a notebook depends on."""
    return Settings if stem == FINETUNE else BaseSettings


@cache
def parameters(stem: str) -> list[str]:
    """Names in the cell of parameters of a notebook."""
    return list(papermill.inspect_notebook(NOTEBOOKS / f"{stem}.ipynb"))


def check_scope(stem: str, configurations: list[Settings], file: Path | None) -> None:
    """Refuse a notebook that does not exist, and settings that it does not depend on.

    Args:
        stem: name of the notebook.
        configurations: all of them.
        file: the grid that names them.

    Raises:
        ValueError: the message names it, and what is allowed.
    """
    stems = sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb"))
    if stem not in stems:
        raise ValueError(f"{file}: notebook is {stem!r}; allowed: {', '.join(stems)}.")
    for configuration in configurations:
        for name in configuration.changed().keys() - scope(stem).model_fields:
            raise ValueError(f"{file}: no sweep of {stem} varies {name}; leave it out.")


def make_stage(stem: str, configurations: list[Settings]) -> list[Job]:
    """A notebook for each of the settings that differ in what it depends on."""
    names = scope(stem).model_fields
    jobs = []
    for configuration in configurations:
        settings = Settings(**{name: getattr(configuration, name) for name in names})
        jobs.append(Job(stem, settings))
    return list(dict.fromkeys(jobs))


def execute(stages: list[list[Job]], count: int, force: bool = False) -> dict[Job, str]:
    """Run notebooks, those of a stage side by side, one stage after the other.

    What is done is skipped. A notebook that fails stops only those that need its base
    model.

    Args:
        stages: the notebooks.
        count: how many at once. Each has its share of the cores by the size of its
            whole stage, so that a sweep that goes on after a stop computes with as many
            threads, to the same bits.
        force: do configurations again that are done.

    Returns:
        The error of each job that failed or could not be run.
    """
    errors = {}
    with tqdm(total=sum(map(len, stages)), unit="notebook", ncols=110) as bar:
        for stage in filter(None, stages):
            failed = {job.settings.folder("runs") for job in errors if job.stem == ERM}
            again = force and stage[0].stem not in (*BASE, *ALWAYS)
            finished = results.finished(stage[0].settings.directory)
            todo = []
            for job in stage:
                if job.settings.folder("runs") in failed:
                    errors[job] = "not run, because its base model is missing"
                elif again or not job.is_done(finished):
                    todo.append(job)
            bar.update(len(stage) - len(todo))
            together = min(count, len(stage))
            run = partial(Job.run, together=together, force=again)
            parallel = Parallel(
                together, prefer="threads", return_as="generator_unordered"
            )
            for job, error in parallel(delayed(run)(job) for job in todo):
                if error:
                    errors[job] = error
                bar.set_description(
                    f"{job.copy.stem}, seed {job.settings.seed}", refresh=False
                )
                bar.update()
    return errors


def write_page(job: Job) -> Path:
    """Write an executed notebook without its code, as one file to be read offline."""
    from nbconvert import HTMLExporter  # heavy, and seldom wanted

    exporter = HTMLExporter(
        exclude_input=True, exclude_output_prompt=True, embed_images=True
    )
    page, _ = exporter.from_filename(str(job.copy))
    # Scripts would be loaded from the network.
    page = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    path = job.settings.folder("results") / "report.html"
    store.write_bytes(path, page.encode())
    return path
