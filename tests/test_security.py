"""Nothing in data, checkpoints or results is ever executed, and no shell is given a string."""

import ast
import json
import re
from pathlib import Path

import nbformat
import pytest

from masktune_utils import results, store
from masktune_utils.settings import REPOSITORY

FOLDERS = ("masktune_utils/*.py", "benchmarks/*.py", "notebooks/*.ipynb")
SOURCES = [path for folder in FOLDERS for path in sorted(REPOSITORY.glob(folder))]
FUNCTIONS = {"eval", "exec", "compile", "__import__"}
METHODS = {"system", "popen", "getoutput", "getstatusoutput", "run_cell", "read_pickle"}
METHODS |= {"to_pickle", "load_state_dict_from_url", "unsafe_load", "full_load"}
LOADERS = {"torch.load": "weights_only=True", "np.load": "allow_pickle=False"}
MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "code"}


def tree(path: Path) -> ast.Module:
    source = path.read_text()
    if path.suffix == ".ipynb":
        cells = nbformat.reads(source, as_version=4).cells
        source = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    return ast.parse(source)  # a magic or a shell command is no Python


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_nothing_is_executed_from_a_string_or_a_file(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            assert not {alias.name.partition(".")[0] for alias in node.names} & MODULES
        elif isinstance(
            node, ast.ImportFrom
        ):  # their functions would have no name to look for
            module = (node.module or "").partition(".")[0]
            assert module not in MODULES | {"yaml"}
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            options = {
                f"{option.arg}={ast.unparse(option.value)}" for option in node.keywords
            }
            is_function = isinstance(
                node.func, ast.Name
            )  # a model's own eval() is none
            assert name.rpartition(".")[2] not in (
                FUNCTIONS if is_function else METHODS
            ), name
            assert LOADERS.get(name) in {None, *options}, name
            assert not name.startswith("yaml.") or name == "yaml.safe_load"
            assert (
                name not in ("joblib.load", "pd.eval") and "shell=True" not in options
            )
            if name.startswith(("subprocess.", "psutil.Popen")):
                assert isinstance(node.args[0], ast.List | ast.Name), name


def test_no_jupyterlab_is_started_without_a_token():
    files = [
        REPOSITORY / ".ci" / "run",
        *REPOSITORY.glob("*.md"),
        *REPOSITORY.glob("*/*.md"),
    ]
    files += [path for path in REPOSITORY.glob("*/*.py") if path != Path(__file__)]
    bad = (
        r"""token\s*=\s*(''|""|None|$)|\.token=["'\s]|disable_check_xsrf|allow_origin"""
    )
    for path in files:
        assert not re.search(bad, path.read_text(), re.MULTILINE), path


def test_a_result_is_shown_as_text_and_never_as_a_page(tmp_path):
    """A configuration's name with a script in it, in a file that someone else wrote."""
    script = "<script>alert(1)</script>"
    result = dict.fromkeys(store.RESULT, 0.0) | {
        "experiment": "mnist",
        "configuration": script,
    }
    for name in ("base", "script"):
        path = tmp_path / "results" / "mnist" / "seed0" / f"{name}.json"
        store.write_bytes(path, json.dumps(result).encode())
    page = results.summarize(results.collect(str(tmp_path)))._repr_html_()
    assert script not in page and "&lt;script&gt;" in page
