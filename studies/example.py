"""Notebook 7's example with three seeds, and with one and two threads.

    python studies/example.py

makes `results/reference_07_example.csv`, in twenty minutes on two cores.
"""

import itertools
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import papermill

from masktune_utils.results import save_table
from masktune_utils.settings import REPOSITORY

NOTEBOOK = REPOSITORY / "notebooks" / "07_your_own.ipynb"
FILE = REPOSITORY / "results" / "reference_07_example.csv"


def run(seed: int, threads: int) -> pd.DataFrame:
    """A row for each network; with what the audit says."""
    os.environ["OMP_NUM_THREADS"] = f"{threads}"  # of the notebook's kernel
    with TemporaryDirectory() as directory:
        values = {"seed": seed, "directory": directory}
        notebook = papermill.execute_notebook(
            NOTEBOOK, Path(directory, "report.ipynb"), values, progress_bar=False
        )
        (path,) = Path(directory).rglob("groups.csv")
        table = pd.read_csv(path)
    texts = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            texts += output.get("text", "").splitlines()
    place = next(text for text in texts if text.startswith("If the"))
    return table.assign(seed=seed, threads=threads, audit=place.partition(" comes")[0])


if __name__ == "__main__":
    runs = itertools.product((0, 1, 2), (1, 2))
    save_table(pd.concat([run(*values) for values in runs]), FILE)
