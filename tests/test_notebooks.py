"""The notebooks' form; that they run is in test_sweep.py and test_studies.py."""

import ast
import re

import nbformat
import pytest

from masktune_utils.runner import jobs
from masktune_utils.settings import DEFAULTS, Settings

PATHS = sorted(jobs.NOTEBOOKS.glob("*.ipynb"))
MOST_CELLS = 25
MOST_LINES = 20  # of a cell of code
MOST_PARAMETERS = 12
# Defaults of parameters of one notebook alone, and other ones than of the settings.
OTHER_DEFAULTS = {
    "05_plots": {"base_model": "", "finetuned_model": ""},
    "09_limits": {"dataset": "mnist5k", "shortcut": "two_squares"},
    "10_methods": {"dataset": "mnist5k", "validation_share": 0.2, "epochs": 20},
    "11_abstaining": {"dataset": "mnist5k", "validation_share": 0.2},
    "07_your_own": {
        "folder": "",
        "classifier": "",
        "mean": [0.0, 0.0, 0.0],
        "std": [1.0, 1.0, 1.0],
        "size": 96,
        "example": "date",
        "network": "small",
        "weights": "",
        "epochs": 20,
    },
}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    """A notebook; `path`: its file; `code`: its cells of code, the parameters first."""
    content = nbformat.read(request.param, as_version=4)
    content.path = request.param
    content.code = [cell for cell in content.cells if cell.cell_type == "code"]
    return content


def test_the_first_cell_of_code_has_the_parameters(notebook):
    assert notebook.code[0].metadata["tags"] == ["parameters"]


def test_notebooks_are_committed_as_executed_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in notebook.code]
    assert counts == list(range(1, len(counts) + 1))
    for cell in notebook.code:
        for output in cell.outputs:
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert "\r" not in output.get("text", "")  # a progress bar
            for kind in {"image/png", "image/jpeg"} & output.get("data", {}).keys():
                image = output.metadata[kind]
                assert {"alt", "width", "height"} <= image.keys()
    assert not re.search("/(work|tmp|root|home)/", notebook.path.read_text())
    assert notebook.path.stat().st_size < 1_000_000


def test_notebooks_are_short(notebook):
    assert len(notebook.cells) <= MOST_CELLS
    for cell in notebook.code:
        assert len(cell.source.splitlines()) <= MOST_LINES


def test_parameters_are_few_literals_with_default_and_documentation(notebook):
    others = OTHER_DEFAULTS.get(notebook.path.stem, {})
    defaults = DEFAULTS | others
    lines = notebook.code[0].source.splitlines()
    assert len(lines) <= MOST_PARAMETERS
    assigned = []
    for line in lines:
        name, value, text = re.fullmatch(r"(\w+) = (.+?)  # (.+)", line).groups()
        assigned.append(name)
        # by its text, since 1 == 1.0 == True
        assert repr(ast.literal_eval(value)) == repr(defaults[name])
        if name in DEFAULTS:
            assert text == Settings.model_fields[name].description
    assert len({*assigned}) == len(assigned)
    assert "directory" in assigned
    assert others.keys() <= {*assigned}
