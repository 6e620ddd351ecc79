"""Texts: their length, the words they do without, and where their numbers are from.

A word is what `str.split` gives; code does not count.
"""

import re

import nbformat
import pandas as pd
import pytest
import tables

from masktune_utils import results
from masktune_utils.settings import REPOSITORY

MOST_WORDS = {
    "README.md": 530,
    "results/HISTORY.md": 1700,
    ".github/CONTRIBUTING.md": 450,
    "results/README.md": 1200,
    "studies/benchmarks/README.md": 700,
    "tests/README.md": 500,
    "06_choice": 900,
    "07_your_own": 900,
    "10_methods": 700,
}
MOST_WORDS_OF_A_CLOSING = 150
NOTEBOOKS = sorted(path.stem for path in REPOSITORY.glob("notebooks/*.ipynb"))
OF_TODAY = {*MOST_WORDS, *NOTEBOOKS, "figures/LICENSES.md"} - {"results/HISTORY.md"}
OF_A_DIARY = re.compile(
    r"\b(since then|at first|in sight|earlier rule|older|so far"
    r"|20\d\d-\d\d-\d\d|(Jan|Febr)uary|April|June|July|August|(Septem|Octo|Novem|Decem)ber"
    r"|struck out|strike-outs?|one test|three tests"
    r"|eighth candidate|registered_(second|third)|reference_rules)\b"
    r"|`[0-9a-f]{7,40}`",
    re.IGNORECASE,
)
MEASURED = re.compile(
    r"\d+\.\d\d ± \d+\.\d\d"  # mean ± standard deviation
    r"|\d+ \(\d+–\d+\)"  # mean (lowest–highest)
    r"|-?\d+\.\d\d \(-?\d+\.\d\d to -?\d+\.\d\d\)"  # mean (95% interval)
)
OF_MODELS = ["experiment", "configuration"]
BY = {  # table → what tells its rows apart, but for the seed
    "reference": OF_MODELS,
    "reference_choices": OF_MODELS,
    "reference_paper_setting": ["model"],
    "reference_09_limits": ["experiment", "model"],
    "reference_10_methods": ["shortcut", "method"],
    "reference_11_abstaining": ["dataset", "labels", "placement", "rule"],
}


def page(name):
    """A page, or the text of a notebook."""
    if name not in NOTEBOOKS:
        return (REPOSITORY / name).read_text()
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def without_code(text):
    """A text without its blocks of code, and without tables."""
    text = re.sub("^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^\|.*$", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("name", MOST_WORDS)
def test_a_text_is_short(name):
    assert 0 < len(without_code(page(name)).split()) <= MOST_WORDS[name]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_closes_in_few_words(notebook):
    _, closing = page(notebook).split("## What we saw")
    closing, *_ = closing.split("\n## ")
    assert 0 < len(closing.split()) <= MOST_WORDS_OF_A_CLOSING


@pytest.mark.parametrize("name", sorted(OF_TODAY))
def test_a_text_says_what_is(name):
    assert not OF_A_DIARY.search(page(name))


def test_each_table_is_in_one_of_the_texts():
    rows = [row for file in tables.FILES for row in file.read_text().splitlines()]
    for header in tables.TABLES:
        assert rows.count(header) == 1


@pytest.mark.parametrize("file", tables.FILES, ids=lambda file: file.parent.name)
def test_tables_are_those_of_the_csv_files(file):
    text = file.read_text()
    assert tables.with_tables(text) == text


def summary(table):
    """Every number of a table over its seeds, as text."""
    runs = pd.read_csv(REPOSITORY / "results" / f"{table}.csv")
    numbers = runs.select_dtypes(float).columns.difference([*BY[table], "seconds"])
    return results.summarize(runs, BY[table], numbers)


@pytest.mark.parametrize("stem", ["09_limits", "10_methods", "11_abstaining"])
def test_the_text_of_a_study_has_its_numbers(stem):
    measured = set(MEASURED.findall(page(stem)))
    assert len(measured) > 3
    known = {*summary(f"reference_{stem}").to_numpy().flat}
    if stem == "09_limits":  # which quotes the reference run as well
        known.update(summary("reference").to_numpy().flat)
    assert measured <= known
