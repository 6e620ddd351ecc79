"""The numbers of the texts against the results of the reference run."""

import re

import nbformat
import pandas as pd
import pytest
import resume
import tables
import trials

from masktune_utils import results, selection, store
from masktune_utils.held_out import HeldOut
from masktune_utils.runner import grids
from masktune_utils.settings import REPOSITORY

PHOTOGRAPHS = tables.PHOTOGRAPHS[tables.PHOTOGRAPHS["model"] == "chosen"]
STUDIES = {  # table of a study → what tells its rows apart
    "09_limits": ["experiment", "model"],
    "10_methods": [
        "dataset",
        "placement",
        "conflicting_share",
        "referee",
        "needs",
        "method",
    ],
    "11_abstaining": ["dataset", "labels", "placement", "rule"],
}
MEASURED = re.compile(r"\d+\.\d\d ± \d+\.\d\d")
KEY = ["experiment", "configuration", "seed"]
OTHER_DIGITS = str.maketrans("0123456789", "1234567890")


@pytest.mark.parametrize("run", list(PHOTOGRAPHS.itertuples()))
def test_the_rule_chooses_on_the_photographs_what_their_table_says(run):
    name = f"{run.network}, {run.images}, {run.shortcut}, {run.seed}.npz"
    path = REPOSITORY / "results" / "photographs" / name
    verdict = selection.judge(HeldOut.from_arrays(store.read_arrays(path)))
    assert verdict.chosen == run.mask


@pytest.mark.parametrize("file", tables.FILES, ids=lambda file: file.parent.name)
def test_tables_are_those_of_the_csv_files(file):
    text = file.read_text()
    assert tables.with_tables(text) == text


def test_each_table_is_in_one_of_the_texts_and_another_number_is_noticed():
    lines = [row for file in tables.FILES for row in file.read_text().splitlines()]
    for make in tables.TABLES:
        header, ruler, first, *rest = make()
        assert lines.count(header) == 1
        damaged = [header, ruler, first.translate(OTHER_DIGITS), *rest]
        assert tables.with_tables("\n".join(damaged)).splitlines() == make()


@pytest.mark.slow
def test_the_rule_and_its_variants_do_on_the_trials_what_their_table_says():
    cases = trials.compare()
    made = trials.summarize(cases).round(1)
    expected = tables.RULES.set_index("rule")
    assert made.to_dict() == expected.to_dict()
    of_rule = cases[cases["rule"] == "the rule"]
    assert sorted(of_rule["group"].unique()) == sorted(trials.GROUPS)
    assert of_rule["file"].is_unique
    # by which the rule was made; those of the second registered test come later
    assert not of_rule["file"].str.contains(r" 2\d\d$").any()


def test_a_script_of_the_results_goes_on_where_it_stopped(tmp_path):
    file = tmp_path / "table.csv"

    def make(name: str, seed: int) -> list[dict]:
        return [{"name": name, "seed": seed, "file existed": file.exists()}]

    for runs in ([("null", 1)], [("null", 1), ("erm", 2)]):
        resume.resume(file, ["name", "seed"], runs, make)
    assert file.read_text().splitlines() == [
        "name,seed,file existed",
        "null,1,False",
        "erm,2,True",
    ]


def study(stem: str) -> pd.DataFrame:
    """Every number of a study over its seeds, as text."""
    table = pd.read_csv(REPOSITORY / "results" / f"reference_{stem}.csv")
    by = STUDIES[stem]
    numbers = table.select_dtypes(float).columns.difference([*by, "seconds", "gain"])
    return results.summarize(table, by, numbers)


def reference_numbers() -> set[str]:
    """Every mean ± standard deviation of the reference run, by configuration."""
    rows = pd.concat([tables.RUNS, tables.CHOSEN.assign(configuration="chosen")])
    summary = results.summarize(rows, KEY[:2])
    return set(summary.to_numpy().flat)


@pytest.mark.parametrize("stem", STUDIES)
def test_the_text_of_a_study_has_its_numbers(stem):
    notebook = nbformat.read(REPOSITORY / "notebooks" / f"{stem}.ipynb", as_version=4)
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    measured = set(MEASURED.findall("\n".join(texts)))
    summary = study(stem)
    assert len(measured) > 3
    numbers = set(summary.to_numpy().flat)
    if stem == "09_limits":  # which quotes the reference run as well
        numbers |= reference_numbers()
    assert measured <= numbers
    # the full MNIST has three; with no conflicting image, new rivals have one
    least_seeds = {"09_limits": 3, "10_methods": 1}.get(stem, 5)
    assert summary["seeds"].ge(least_seeds).all()


def keys_of(rows: pd.DataFrame, names: list[str]) -> set[tuple]:
    """Some columns of rows, as a set."""
    return set(rows[names].itertuples(index=False, name=None))


@pytest.mark.parametrize("stem", ["09_limits", "11_abstaining"])
def test_a_grid_makes_each_other_study_again(stem):
    file = REPOSITORY / "sweeps" / f"{stem[3:]}.yaml"
    notebook, grid = grids.read_grid(file, {})
    assert notebook == stem
    table = pd.read_csv(REPOSITORY / "results" / f"reference_{stem}.csv")
    keys = ["dataset", "shortcut", "labels", "placement", "square_size", "seed"]
    keys = [key for key in keys if key in table]
    rows = pd.DataFrame([settings.model_dump() for settings in grid])
    if stem == "09_limits":  # whose table has the square alone
        rows = rows[rows["shortcut"] == "square"]
    assert keys_of(table, keys) == keys_of(rows, keys)


def test_the_grids_of_the_reference_run_list_every_row():
    sweeps = REPOSITORY / "sweeps"
    _, grid = grids.read_grid(sweeps / "reference.yaml", {})
    _, choices = grids.read_grid(sweeps / "choices.yaml", {})
    _, developed = grids.read_grid(sweeps / "development.yaml", {})
    by_paper = {"method": ["mean_std"], "param": [2.0], "finetune_lr": [0.01]}
    _, paper = grids.read_grid(sweeps / "development.yaml", by_paper)
    made = set()
    for settings in [*grid, *developed, *paper]:
        for name in ("base", settings.configuration):
            made.add((settings.experiment, name, settings.seed))
    is_chosen = tables.RUNS.index.isin(tables.CHOSEN.index)
    assert keys_of(tables.RUNS[~is_chosen], KEY) <= made
    for chosen, listed in ((tables.CHOSEN, developed), (tables.ONE_TEST, choices)):
        bases = {(settings.experiment, settings.seed) for settings in listed}
        assert keys_of(chosen, ["experiment", "seed"]) <= bases
