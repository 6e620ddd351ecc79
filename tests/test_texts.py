"""Texts are short: README, the course, the studies, and the page of results."""

import re
from collections.abc import Iterable

import nbformat
import pytest

from masktune_utils.settings import REPOSITORY

COURSE = ("01", "02", "03", "04", "05")
STUDIES = ("07", "08", "09", "10", "11")


def words(text: str) -> int:
    """How many of the words have a letter: no rulers, signs or numbers."""
    return sum(bool(re.search(r"[^\W\d_]", word)) for word in text.split())


def cells(numbers: Iterable[str], kind: str) -> list[str]:
    """The cells of one kind of the notebooks with these numbers."""
    sources = []
    for number in numbers:
        (path,) = REPOSITORY.glob(f"notebooks/{number}_*.ipynb")
        notebook = nbformat.read(path, as_version=4)
        sources += [cell.source for cell in notebook.cells if cell.cell_type == kind]
    return sources


@pytest.mark.parametrize(
    ("numbers", "most"), [(COURSE, 4500), (STUDIES, 6000), (["09"], 1200)]
)
def test_notebooks_have_few_words(numbers, most):
    assert 0 < words("\n".join(cells(numbers, "markdown"))) <= most


def test_the_course_has_few_lines_of_code():
    lines = "\n".join(cells(COURSE, "code")).splitlines()
    assert 0 < sum(bool(line.strip()) for line in lines) <= 500


def test_pages_are_short():
    readme = REPOSITORY / "README.md"
    assert words(readme.read_text()) <= 700
    assert readme.stat().st_size <= 6144
    assert words((REPOSITORY / "results" / "README.md").read_text()) <= 3000
