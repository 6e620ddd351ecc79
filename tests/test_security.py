"""Nothing in data, checkpoints or results is ever executed, and no shell is given a string."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from masktune_utils import evaluation, experiment
from masktune_utils.experiment import REPOSITORY

SOURCES = sorted([*REPOSITORY.glob("masktune_utils/*.py"), *REPOSITORY.glob("benchmarks/*.py")])
SOURCES += sorted(REPOSITORY.glob("notebooks/*.ipynb"))
FUNCTIONS = {"eval", "exec", "compile", "__import__"}
METHODS = {"system", "popen", "getoutput", "getstatusoutput", "run_cell", "read_pickle", "to_pickle"}
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "yaml", "code"}


def calls(path: Path) -> list[ast.Call]:
    source = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    tree = ast.parse(source)
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names} | {getattr(node, "module", "") for node in imports}
    assert not {name.partition(".")[0] for name in names if name} & MODULES
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_executed_from_a_string_or_a_file(path):
    for call in calls(path):
        name = ast.unparse(call.func)
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        forbidden = FUNCTIONS if isinstance(call.func, ast.Name) else METHODS  # a model's own eval() is none
        assert name.rpartition(".")[2] not in forbidden, name
        assert options.get("shell", "False") == "False", name
        assert name not in ("torch.load", "np.load") or options.get("weights_only") == "True", name
        if name.startswith(("subprocess.", "psutil.Popen")):
            assert isinstance(call.args[0], ast.List | ast.Name), name


def test_no_notebook_has_a_shell_command_or_a_magic():
    for path in REPOSITORY.glob("notebooks/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            assert cell.cell_type != "code" or not re.search(r"^\s*[!%]", cell.source, re.MULTILINE)


def test_no_jupyterlab_is_started_without_a_token():
    files = [REPOSITORY / "README.md", REPOSITORY / ".ci" / "run", *REPOSITORY.glob("*/*.md")]
    files += [path for path in REPOSITORY.glob("*/*.py") if path != Path(__file__)]
    for path in files:
        assert not re.search(
            r"""token\s*=\s*(''|""|None|$)|\.token=["'\s]|disable_check_xsrf|allow_origin""",
            path.read_text(),
            re.MULTILINE,
        ), path


def test_a_result_is_shown_as_text_and_never_as_a_page(tmp_path):
    """A configuration's name with a script in it, in a file that someone else wrote."""
    script = "<script>alert(1)</script>"
    result = {"experiment": "mnist", "configuration": script, "seed": 0, "worst_group": 0.0, "sha256": "a"}
    result |= {test: {"accuracy": 0.0, "class_accuracy": [0.0, 0.0]} for test in ("raw", "biased")}
    result |= {"base_sha256": "a", "settings": {}, "seconds": 0, "device": "", "threads": 1, "versions": {"torch": ""}}
    for name in ("base", "script"):
        experiment.write_json(tmp_path / "results" / "mnist" / "seed0" / f"{name}.json", result)
    table = evaluation.summarize(evaluation.collect(str(tmp_path)))
    assert isinstance(table, pd.DataFrame) and script in table.index
    assert script not in table._repr_html_() and "&lt;script&gt;" in table._repr_html_()
