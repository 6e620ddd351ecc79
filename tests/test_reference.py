"""The tables of results: which grids make them, and scripts that go on."""

import pandas as pd
import pytest
import resume

from masktune_utils.runner import grids
from masktune_utils.settings import REPOSITORY

KEY = ["experiment", "configuration", "seed"]
OF_STUDIES = [
    "dataset",
    "shortcut",
    "labels",
    "placement",
    "square_size",
    "seed",
]
RESULTS = REPOSITORY / "results"
SWEEPS = REPOSITORY / "studies" / "sweeps"


def test_a_script_of_the_results_goes_on_where_it_stopped(tmp_path):
    file = tmp_path / "table.csv"

    def make(name, seed):
        return [{"name": name, "seed": seed, "file existed": file.exists()}]

    for runs in ([("null", 1)], [("null", 1), ("erm", 2)]):
        resume.resume(file, ["name", "seed"], runs, make)
    assert file.read_text().splitlines() == [
        "name,seed,file existed",
        "null,1,False",
        "erm,2,True",
    ]


def keys_of(rows, names):
    """Some columns of rows, as a set."""
    return set(rows[names].itertuples(index=False, name=None))


@pytest.mark.parametrize("stem", ["09_limits", "11_abstaining"])
def test_a_grid_makes_each_other_study_again(stem):
    notebook, grid = grids.read_grid(SWEEPS / f"{stem[3:]}.yaml", {})
    assert notebook == stem
    table = pd.read_csv(RESULTS / f"reference_{stem}.csv")
    keys = [key for key in OF_STUDIES if key in table]
    rows = pd.DataFrame([settings.model_dump() for settings in grid])
    if stem == "09_limits":  # whose table has the square alone
        rows = rows[rows["shortcut"] == "square"]
    assert keys_of(table, keys) == keys_of(rows, keys)


def grid_of(stem, **options):
    _, grid = grids.read_grid(SWEEPS / f"{stem}.yaml", options)
    return grid


def test_the_grids_of_the_reference_run_list_every_row():
    made = set()
    by_paper = {"method": ["mean_std"], "param": [2.0], "finetune_lr": [0.01]}
    grid = grid_of("reference") + grid_of("development")
    for settings in grid + grid_of("development", **by_paper):
        for name in ("base", settings.configuration):
            made.add((settings.experiment, name, settings.seed))
    assert keys_of(pd.read_csv(RESULTS / "reference.csv"), KEY) <= made


def test_the_grid_of_the_choices_lists_every_row():
    made = set()
    for settings in grid_of("choices"):
        made.add((settings.experiment, settings.seed))
    choices = pd.read_csv(RESULTS / "reference_choices.csv")
    assert keys_of(choices, ["experiment", "seed"]) == made
