"""Texts: their length, the words they do without, and where their numbers are from.

A word is what `str.split` gives; code does not count.
"""

import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import tables

from masktune_utils import results
from masktune_utils.settings import REPOSITORY

MOST_WORDS = {
    "README.md": 600,
    "HISTORY.md": 1200,
    "CONTRIBUTING.md": 450,
    "results/README.md": 900,
    "benchmarks/README.md": 700,
    "tests/README.md": 500,
    "07_your_own": 900,
    "10_methods": 700,
}
MOST_WORDS_OF_A_CLOSING = 150
NOTEBOOKS = sorted(path.stem for path in REPOSITORY.glob("notebooks/*.ipynb"))
OF_TODAY = {*MOST_WORDS, *NOTEBOOKS, "figures/LICENSES.md"} - {"HISTORY.md"}
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
    "reference_10_methods": [
        "dataset",
        "placement",
        "conflicting_share",
        "referee",
        "needs",
        "method",
    ],
    "reference_11_abstaining": ["dataset", "labels", "placement", "rule"],
}
_SMALL = "mnist5k"
_LARGE = "mnist5k_square_size=12"
PROSE = {  # number in results/README.md → its table and row
    "96.72 ± 0.61": ("reference_09_limits", (_SMALL, "by ERM's maps, zero")),
    "18.96 ± 8.72": ("reference_09_limits", (_SMALL, "random patches, zero")),
    "30.56 ± 9.34": ("reference_09_limits", (_SMALL, "nothing, zero")),
    "18.00 ± 9.82": ("reference_09_limits", (_LARGE, "by ERM's maps, zero")),
    "25.24 ± 6.97": ("reference_09_limits", (_LARGE, "nothing, zero")),
    "96.92 ± 0.81": ("reference_09_limits", (_SMALL, "by ERM's maps, resample")),
    "96.28 ± 0.54": (
        "reference_09_limits",
        (_SMALL, "those of other images, resample"),
    ),
    "0.00 ± 0.00": (
        "reference",
        ("mnist5k_conflicting_share=0.0", "mean_std_2.0_finetune_lr=0.01"),
    ),
}
STUDIES = ("09_limits", "10_methods", "11_abstaining")


def page(name):
    """A page, or the text of a notebook."""
    if name not in NOTEBOOKS:
        return (REPOSITORY / name).read_text()
    cells = nbformat.read(REPOSITORY / "notebooks" / f"{name}.ipynb", 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def count_words(text):
    """Without blocks of code."""
    blocks = re.compile("^```.*?^```$", re.MULTILINE | re.DOTALL)
    return len(blocks.sub("", text).split())


@pytest.mark.parametrize("name", MOST_WORDS)
def test_a_text_is_short(name):
    assert 0 < count_words(page(name)) <= MOST_WORDS[name]


@pytest.mark.parametrize("notebook", NOTEBOOKS)
def test_a_notebook_closes_in_few_words(notebook):
    _, closing = page(notebook).split("## What we saw")
    closing, *_ = closing.split("\n## ")
    assert 0 < count_words(closing) <= MOST_WORDS_OF_A_CLOSING


@pytest.mark.parametrize("name", sorted(OF_TODAY))
def test_a_text_says_what_is(name):
    assert not OF_A_DIARY.search(page(name))


@pytest.fixture(params=tables.FILES, ids=lambda file: file.parent.name)
def file(request) -> Path:
    """A text with tables."""
    return request.param


def test_each_table_is_in_one_of_the_texts():
    rows = [row for file in tables.FILES for row in file.read_text().splitlines()]
    for header in tables.TABLES:
        assert rows.count(header) == 1


def test_tables_are_those_of_the_csv_files(file):
    text = file.read_text()
    assert tables.with_tables(text) == text


def summary(table):
    """Every number of a table over its seeds, as text."""
    runs = pd.read_csv(REPOSITORY / "results" / f"{table}.csv")
    numbers = runs.select_dtypes(float).columns.difference([*BY[table], "seconds"])
    return results.summarize(runs, BY[table], numbers)


def test_measured_numbers_outside_the_tables_are_recomputed(file):
    rows = file.read_text().splitlines()
    prose = "\n".join(row for row in rows if not row.startswith("|"))
    is_of_results = file.parent.name == "results"
    assert set(MEASURED.findall(prose)) == (set(PROSE) if is_of_results else set())


@pytest.mark.parametrize("number", PROSE)
def test_a_number_of_the_prose_is_that_of_its_table(number):
    table, row = PROSE[number]
    assert summary(table).loc[row, "worst group"] == number


def test_the_differences_from_the_authors_code_are_those_of_their_table():
    runs = pd.read_csv(REPOSITORY / "results" / "reference_paper_setting.csv")
    points = 100 * runs.pivot(index="seed", columns="model", values="worst_group")
    lower = points["the authors' code"] - points["both, momentum from zero"]
    first, second, third = lower.map("{:.2f}".format)
    assert f"by {first}, {second} and {third} points" in page("results/README.md")


def test_the_regret_in_the_texts_is_that_of_the_registered_test():
    runs = tables.registered()
    regret = runs[tables.can_hide(runs)]["regret"]
    largest = regret.nlargest(3)
    text = page("results/README.md")
    for points in largest:
        assert f"{points:.1f}" in text
    assert f"{largest.sum() / regret.sum():.0%} of it" in text
    readme = page("README.md")
    assert f"{regret.mean():.1f} points behind" in readme
    assert f"of {len(regret)} runs" in readme


@pytest.mark.parametrize("stem", STUDIES)
def test_the_text_of_a_study_has_its_numbers(stem):
    measured = set(MEASURED.findall(page(stem)))
    assert len(measured) > 3
    known = {*summary(f"reference_{stem}").to_numpy().flat}
    if stem == "09_limits":  # which quotes the reference run as well
        known.update(summary("reference").to_numpy().flat)
    assert measured <= known
