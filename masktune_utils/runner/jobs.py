"""Jobs: notebooks executed with settings by papermill, side by side by joblib."""

import logging
import re
from pathlib import Path
from typing import NamedTuple

import papermill
from joblib import Parallel, cpu_count, delayed

from masktune_utils import progress, results, store
from masktune_utils.runner import kernels
from masktune_utils.runner.grids import FINETUNE
from masktune_utils.settings import REPOSITORY, BaseSettings, Settings

# It warns of settings that are not in the cell of parameters.
logging.getLogger("papermill").setLevel(logging.ERROR)
NOTEBOOKS = REPOSITORY / "notebooks"
ERM = "02_erm"
BASE = (ERM, "03_saliency_masks")
SHOWN = ("05_plots", "06_choice")
ALWAYS = ("01_dataset", *SHOWN)  # they are quick, and show what is there


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

    def is_done(self, finished: set[tuple]) -> bool:
        """Whether its executed copy, and the result and checkpoint of its model exist.

        A notebook other than 04 has the base model.

        Never with `retrain`, nor for those of `ALWAYS`.

        Args:
            finished: see `results.finished`.
        """
        settings = self.settings
        key = (settings.experiment, self.name, settings.seed)
        if settings.retrain or key not in finished or self.stem in ALWAYS:
            return False
        return self.copy.exists() and settings.checkpoint_path(self.name).exists()

    def run(self, together: int) -> str | None:
        """Execute the notebook; if it fails, what there is of it has another name.

        Args:
            together: how many notebooks share the cores of this machine.

        Returns:
            The error that ended it, in one line; or None.
        """
        values = self.settings.model_dump(include=scope(self.stem))
        unfinished = self.copy.with_stem(f"{self.copy.stem}_unfinished")
        # Cells of 04 that do not depend on its parameters run with the default ones.
        is_default = self.settings.configuration == Settings().configuration
        try:
            unfinished.parent.mkdir(parents=True, exist_ok=True)
            with kernels.take(max(1, cpu_count() // together)) as kernel:
                papermill.execute_notebook(
                    NOTEBOOKS / f"{self.stem}.ipynb",
                    unfinished,
                    values,
                    km=kernel,
                    progress_bar=False,
                    skip_cells_with_tag="" if is_default else "from-scratch",
                )
            unfinished.replace(self.copy)
        except Exception as failure:  # noqa: BLE001 - the others go on
            return in_one_line(failure)
        return None


def in_one_line(failure: Exception) -> str:
    """Kind and message, those of the cell if a cell failed."""
    kind = getattr(failure, "ename", type(failure).__name__)
    message = getattr(failure, "evalue", failure)
    return f"{kind}: {message}".splitlines()[0]


def scope(stem: str) -> set[str]:
    """Names of the settings that a notebook depends on."""
    if stem == FINETUNE:
        return set(Settings.model_fields)
    own = {"upsample", "dilation"} if stem == "03_saliency_masks" else set()
    return set(BaseSettings.model_fields) | own


def make_stage(stem: str, configurations: list[Settings]) -> list[Job]:
    """A notebook for each of the settings that differ in what it depends on."""
    own = [item.model_dump(include=scope(stem)) for item in configurations]
    return list(dict.fromkeys(Job(stem, Settings(**values)) for values in own))


def execute(stages: list[list[Job]], count: int) -> dict[Job, str]:
    """Run notebooks, those of a stage side by side, one stage after the other.

    What is done is skipped. A notebook that fails stops only those that need its base
    model.

    Args:
        stages: the notebooks.
        count: how many at once. Each has its share of the cores by the size of its
            whole stage, so that a sweep that goes on after a stop computes with as many
            threads, to the same bits.

    Returns:
        The error of each job that failed or could not be run.
    """
    errors = {}
    for stage in filter(None, stages):
        finished = results.finished(stage[0].settings.directory)
        todo = []
        for job in stage:
            (base,) = make_stage(ERM, [job.settings])
            if base in errors:
                errors[job] = "not run, because its base model is missing"
            elif not job.is_done(finished):
                todo.append(job)
        together = min(count, len(stage))
        tasks = [delayed(job.run)(together) for job in todo]
        outcomes = Parallel(together, prefer="threads", return_as="generator")(tasks)
        if todo:
            stems = " and ".join(dict.fromkeys(job.stem for job in stage))
            print(f"{stems}: {len(todo)} of {len(stage)} to run", flush=True)
        bar = progress.bar(outcomes, total=len(todo), unit="notebook")
        for job, error in zip(todo, bar, strict=True):
            if error:
                errors[job] = error
    return errors


def write_page(job: Job) -> Path:
    """Write an executed notebook without its code, as one file to be read offline."""
    from nbconvert import HTMLExporter  # heavy, and seldom wanted

    page, _ = HTMLExporter(exclude_input=True).from_filename(str(job.copy))
    # Scripts would be loaded from the network.
    page = re.sub("<script.*?</script>", "", page, flags=re.DOTALL)
    path = job.settings.folder("results") / f"{job.stem}.html"
    store.write_bytes(path, page.encode())
    return path
