"""The studies: each notebook on tiny data."""

import re

import papermill
import pytest
from conftest import TINY

from masktune_utils.runner import jobs
from masktune_utils.settings import Settings


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "values"),
    [
        ("09_limits", {"limit": 60}),
        ("10_methods", {}),
        ("11_abstaining", {"limit": 60, "validation_share": 0.2}),
    ],
)
def test_the_studies_run_on_tiny_data(stem, values, tmp_path):
    """And notebook 05 after them, whether ERM was kept or not."""
    settings = Settings(**TINY | values, directory=str(tmp_path))
    for name in (stem, "05_plots"):
        (job,) = jobs.make_stage(name, [settings])
        assert job.run(together=1) is None
    saved = {path.name for path in job.settings.folder("results").glob("*.csv")}
    assert saved == {f"{stem}.csv"} - {"10_methods.csv"}  # which saves none


@pytest.mark.slow
def test_notebook_07_makes_its_photographs_and_chooses_on_few_of_them(tmp_path):
    values = {"count": 8, "epochs": 1}
    source = jobs.NOTEBOOKS / "07_your_own.ipynb"
    options = {"progress_bar": False, "cwd": tmp_path}
    executed = papermill.execute_notebook(source, None, values, **options)
    printed = ""
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            printed += output.get("text", "")
    assert "16 training images, 400 to test" in printed
    assert re.search("Chosen|ERM is kept", printed)
    assert not [*tmp_path.iterdir()]
