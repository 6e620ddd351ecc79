"""The package as a whole: the order of its modules, and its size."""

import ast
import io
import sys
import tokenize

import pytest

from masktune_utils.settings import REPOSITORY

PACKAGE = REPOSITORY / "masktune_utils"
# A module imports only from those before it. The core knows no settings; of files, it
# knows how one is kept.
CORE = [
    "progress",
    "store",
    "data",
    "models",
    "shortcuts",
    "training",
    "saliency",
    "masking",
    "metrics",
]
CHOICE = [
    "choice.exchange",
    "choice.held_out",
    "choice.score",
    "choice.chosen",
    "choice.audit",
    "choice",
]
SHELL = ["settings", "datasets", "results", "experiment", "plotting", "panels"]
RUNNER = ["runner.grids", "runner.kernels", "runner.jobs", "runner.command"]
ORDER = [*CORE, *CHOICE, *SHELL, *RUNNER]


def name_of(path):
    """Name of a module in the package, such as `runner.jobs`."""
    name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported(path):
    """Names of the modules of the package that a module imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert "masktune_utils" not in ast.unparse(node)  # from … import is used
        elif isinstance(node, ast.ImportFrom) and "masktune_utils" in node.module:
            _, _, module = node.module.partition(".")
            for alias in node.names:
                inside = f"{module}.{alias.name}".strip(".")
                names.add(inside if inside in ORDER else module)
    return names


def test_the_order_of_the_modules_lists_them_all():
    without_code = {"__init__", "runner"}
    assert MODULES.keys() == {*ORDER, *without_code}


@pytest.mark.parametrize("name", ORDER)
def test_no_module_imports_one_that_comes_after_it(name):
    assert imported(MODULES[name]) <= {*ORDER[: ORDER.index(name)]}


def count_tokens(name):
    """Of a module, without comments and docstrings."""
    tree = ast.parse(MODULES[name].read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node):
            del node.body[0]
    source = io.StringIO(ast.unparse(tree))
    tokens = tokenize.generate_tokens(source.readline)
    return sum(bool(token.string.strip()) for token in tokens)


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="counts f-strings by parts")
def test_the_package_is_small():
    assert sum(map(count_tokens, ORDER)) <= 24_000
