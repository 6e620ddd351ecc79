"""The studies: a rule of notebook 10 by hand; each notebook on tiny data."""

from collections.abc import Callable

import nbformat
import papermill
import pytest
import torch
from conftest import TINY

from masktune_utils.runner import jobs
from masktune_utils.settings import Settings


def rules() -> Callable:
    """The function of notebook 10; nothing else of it is executed."""
    path = jobs.NOTEBOOKS / "10_selective.ipynb"
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (definition,) = [text for text in sources if text.startswith("def rules(")]
    namespace = {"torch": torch}
    exec(definition, namespace)
    return namespace["rules"]


def test_where_the_models_disagree_masktune_decides_and_comes_last():
    erm = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    masktune = torch.tensor([[0.4, 0.6], [0.2, 0.8], [0.9, 0.1]])
    score = rules()(erm, masktune)["mean, if they agree"]
    confidence, label = score.max(1)
    assert label.tolist() == [1, 1, 0]
    assert confidence.tolist() == pytest.approx([0.75, -0.2, -0.1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "values"),
    [
        ("08_limits", {"limit": 60}),
        ("09_alternatives", {}),
        ("10_selective", {"limit": 60, "validation_share": 0.2}),
    ],
)
def test_the_studies_run_on_tiny_data(stem, values, tmp_path):
    """And notebook 05 after them, whether ERM was kept or not."""
    settings = Settings(**TINY | values, directory=str(tmp_path))
    for name in (stem, "05_plots"):
        (job,) = jobs.make_stage(name, [settings])
        assert job.run(together=1) is None
    assert job.settings.folder("results").joinpath(f"{stem}.csv").exists()


@pytest.mark.slow
def test_notebook_11_makes_its_photographs_and_runs_on_few_of_them(tmp_path):
    values = {"count": 8, "epochs": 1}
    source = jobs.NOTEBOOKS / "11_your_own.ipynb"
    target = tmp_path / "copy.ipynb"
    papermill.execute_notebook(source, target, values, progress_bar=False)
