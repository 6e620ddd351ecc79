"""Nothing in data, checkpoints or results is ever executed.

Ruff's rules S look for `eval`, `exec`, pickle and shells. Here is the rest.
"""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest
from IPython.core.formatters import HTMLFormatter

from masktune_utils import results, store
from masktune_utils.settings import REPOSITORY

FOLDERS = ("masktune_utils/**/*.py", "benchmarks/*.py", "notebooks/*.ipynb")
SOURCES = [path for folder in FOLDERS for path in sorted(REPOSITORY.glob(folder))]
# Loaders that unpickle or execute what they read, unless an option forbids it.
LOADERS = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
EXECUTING = {"compile", "__import__", "joblib.load", "pd.eval"}
EXECUTING |= {"yaml.load", "yaml.full_load", "yaml.unsafe_load"}
EXECUTING_METHODS = {"to_pickle", "load_state_dict_from_url"}
EXECUTING_METHODS |= {"run_cell", "run_line_magic", "system", "getoutput"}  # IPython's
EXECUTING_MODULES = {"cloudpickle", "code"}
# By whose own name a function of theirs would not be recognised.
MODULES_WITH_LOADERS = {"joblib", "numpy", "pandas", "torch", "yaml"}


def python_of(path: Path) -> ast.Module:
    """The syntax tree of a file; a magic or a shell command is an error."""
    source = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return ast.parse(source)


def is_safe_call(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    options = {f"{option.arg}={ast.unparse(option.value)}" for option in call.keywords}
    if name in EXECUTING or name.rpartition(".")[2] in EXECUTING_METHODS:
        return False
    return name not in LOADERS or LOADERS[name] in options


def is_safe_import(node: ast.Import | ast.ImportFrom) -> bool:
    names = {alias.name for alias in node.names}
    if isinstance(node, ast.Import):
        return not names & EXECUTING_MODULES
    if node.module in EXECUTING_MODULES:
        return False
    loads = {name for name in names if "load" in name or name == "eval"}
    return node.module not in MODULES_WITH_LOADERS or not loads


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_executed_from_a_string_or_a_file(path):
    for node in ast.walk(python_of(path)):
        if isinstance(node, ast.Call):
            assert is_safe_call(node), ast.unparse(node)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            assert is_safe_import(node), ast.unparse(node)


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "joblib.load(path)",
        "yaml.unsafe_load(text)",
        "get_ipython().run_cell(text)",
        "compile(text, name, 'exec')",
        "import cloudpickle",
        "from torch import load",
        "from yaml import unsafe_load",
    ],
)
def test_what_would_execute_is_found(source):
    node = ast.parse(source).body[0]
    if isinstance(node, ast.Expr):
        assert not is_safe_call(node.value)
    else:
        assert not is_safe_import(node)


def test_no_jupyterlab_is_started_without_a_token():
    files = [REPOSITORY / ".ci" / "run"]
    files += REPOSITORY.glob("*.md")
    files += REPOSITORY.glob("*/*.md")
    files += [path for path in REPOSITORY.glob("*/*.py") if path != Path(__file__)]
    switched_off = r"""token\s*=\s*(''|""|None|$)|\.token=["'\s]"""
    open_to_all = "disable_check_xsrf|allow_origin"
    for path in files:
        text = path.read_text()
        assert not re.search(f"{switched_off}|{open_to_all}", text, re.MULTILINE), path


def test_a_result_is_shown_as_text_and_never_as_a_page(tmp_path):
    """A configuration's name with a script in it, in a file that someone else wrote."""
    script = "<script>alert(1)</script>"
    result = dict.fromkeys(results.RESULT_KEYS, 0.0)
    result |= {"experiment": "mnist", "configuration": script}
    for name in ("base", "script"):
        path = tmp_path / "results" / "mnist" / "seed0" / f"{name}.json"
        store.write_bytes(path, json.dumps(result).encode())
    page = HTMLFormatter()(results.summarize(results.collect(str(tmp_path))))
    assert script not in page
    assert "&lt;script&gt;" in page
