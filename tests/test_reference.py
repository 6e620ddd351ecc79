"""The tables of results: which grids make them, and scripts that go on."""

import pandas as pd
import pytest
import resume

from masktune_utils.runner import grids
from masktune_utils.settings import REPOSITORY

KEY = ["experiment", "configuration", "seed"]
RESULTS = REPOSITORY / "results"
SWEEPS = REPOSITORY / "sweeps"
# Full MNIST has three seeds; with no conflicting image, some methods have one.
LEAST_SEEDS = {"09_limits": 3, "10_methods": 1, "11_abstaining": 5}


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


@pytest.mark.parametrize("stem", LEAST_SEEDS)
def test_a_study_has_its_seeds(stem):
    table = pd.read_csv(RESULTS / f"reference_{stem}.csv")
    names = ["dataset", "experiment", "labels", "placement", "conflicting_share"]
    names += ["referee", "method", "model", "rule"]
    by = [name for name in names if name in table]
    seeds = table.groupby(by, dropna=False)["seed"].nunique()
    assert seeds.ge(LEAST_SEEDS[stem]).all()


def keys_of(rows: pd.DataFrame, names: list[str]) -> set[tuple]:
    """Some columns of rows, as a set."""
    return set(rows[names].itertuples(index=False, name=None))


@pytest.mark.parametrize("stem", ["09_limits", "11_abstaining"])
def test_a_grid_makes_each_other_study_again(stem):
    file = SWEEPS / f"{stem[3:]}.yaml"
    notebook, grid = grids.read_grid(file, {})
    assert notebook == stem
    table = pd.read_csv(RESULTS / f"reference_{stem}.csv")
    keys = ["dataset", "shortcut", "labels", "placement", "square_size", "seed"]
    keys = [key for key in keys if key in table]
    rows = pd.DataFrame([settings.model_dump() for settings in grid])
    if stem == "09_limits":  # whose table has the square alone
        rows = rows[rows["shortcut"] == "square"]
    assert keys_of(table, keys) == keys_of(rows, keys)


def test_the_grids_of_the_reference_run_list_every_row():
    made = set()
    by_paper = {"method": ["mean_std"], "param": [2.0], "finetune_lr": [0.01]}
    for stem, options in (
        ("reference", {}),
        ("development", {}),
        ("development", by_paper),
    ):
        _, grid = grids.read_grid(SWEEPS / f"{stem}.yaml", options)
        for settings in grid:
            for name in ("base", settings.configuration):
                made.add((settings.experiment, name, settings.seed))
    assert keys_of(pd.read_csv(RESULTS / "reference.csv"), KEY) <= made


def test_the_grid_of_the_choices_lists_every_row():
    _, grid = grids.read_grid(SWEEPS / "choices.yaml", {})
    made = {(settings.experiment, settings.seed) for settings in grid}
    choices = pd.read_csv(RESULTS / "reference_choices.csv")
    assert keys_of(choices, ["experiment", "seed"]) == made
