"""The notebooks' form; that they run is in test_sweep.py and test_studies.py.

And the code in answers to exercises, which runs after the last cell.
"""

import ast
import dis
import re

import nbformat
import papermill
import pytest
from conftest import TINY, write_photographs

from masktune_utils.runner import jobs
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings

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
        "place": "",
    },
}
ANSWERS = {  # notebooks with code in an answer, and how they run on tiny data
    "02_erm": TINY,
    "04_finetune_sweep": TINY,
    "05_plots": TINY,
    "06_choice": TINY | {"limit": 60},
    "07_your_own": {"epochs": 1, "size": 32},
    "08_seeds": {},
}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    """A notebook; `path`: its file; `code`: its cells of code, the parameters first."""
    content = nbformat.read(request.param, as_version=4)
    content.path = request.param
    content.code = [cell for cell in content.cells if cell.cell_type == "code"]
    return content


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


def test_a_notebook_has_a_row_and_a_picture_in_the_readme(notebook):
    readme = (REPOSITORY / "README.md").read_text()
    assert f"(notebooks/{notebook.path.name})" in readme
    number, _, _ = notebook.path.name.partition("_")
    assert f"figures/thumbnails/{number}.png" in readme


def test_notebooks_are_short(notebook):
    assert len(notebook.cells) <= MOST_CELLS
    for cell in notebook.code:
        assert len(cell.source.splitlines()) <= MOST_LINES


def test_parameters_are_few_literals_with_default_and_documentation(notebook):
    others = OTHER_DEFAULTS.get(notebook.path.stem, {})
    defaults = DEFAULTS | others
    first = notebook.code[0]
    assert first.metadata["tags"] == ["parameters"]
    lines = first.source.splitlines()
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


def test_no_other_cell_uses_the_name_of_a_setting_for_something_else(notebook):
    """Else it would be read as the setting once the first cells are run again."""
    if notebook.path.stem == "07_your_own":  # which reads its parameters itself
        return
    for cell in notebook.code[1:]:
        assert not names_assigned(cell.source) & DEFAULTS.keys()


def names_assigned(source):
    """Global names that a cell assigns."""
    instructions = dis.get_instructions(compile(source, "cell", "exec"))
    return {step.argval for step in instructions if step.opname == "STORE_NAME"}


def answers(notebook):
    """All code in the folded answers to a notebook's exercises: Python."""
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = []
    for answer in re.findall("<details>.*?</details>", "\n".join(cells), re.DOTALL):
        code += re.findall(r"^```\w+\n(.*?)^```$", answer, re.DOTALL | re.MULTILINE)
    return code


def test_code_in_answers_is_run_by_the_next_test(notebook):
    assert bool(answers(notebook)) == (notebook.path.stem in ANSWERS)


@pytest.mark.slow
@pytest.mark.parametrize("stem", ANSWERS)
def test_code_in_answers_runs_after_the_last_cell_and_shows_something(stem, tmp_path):
    values = {"directory": str(tmp_path), **ANSWERS[stem]}
    if stem == "07_your_own":
        folder = tmp_path / "mine"
        write_photographs(folder, {"goats": 10, "sheep": 10})
        values["folder"] = str(folder)
    notebook = nbformat.read(jobs.NOTEBOOKS / f"{stem}.ipynb", as_version=4)
    cells = [nbformat.v4.new_code_cell(code) for code in answers(notebook)]
    notebook.cells += cells
    path = tmp_path / f"{stem}.ipynb"
    nbformat.write(notebook, path)
    executed = papermill.execute_notebook(path, None, values, progress_bar=False)
    assert all(cell.outputs for cell in executed.cells[-len(cells) :])
