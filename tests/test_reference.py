"""The numbers of README.md against the results of the reference run."""

import ast
import re

import nbformat
import pandas as pd
import pytest

from masktune_utils import evaluation, experiment

COLUMNS = ("raw", "biased", "worst_group")
ADAM = "_finetune_optimizer=adam_finetune_lr=0.001"
RESULTS = pd.read_csv(experiment.REPOSITORY / "results" / "reference.csv")
README = (experiment.REPOSITORY / "README.md").read_text()
SECTION = README.split("## What came out\n")[1].split("\n## ")[0]


def summary(adam: bool = False) -> pd.DataFrame:
    """Mean ± standard deviation of each configuration, as text, in the reference settings."""
    rows = RESULTS[RESULTS["experiment"] == "mnist"]
    if adam:
        rows = rows[rows["configuration"].str.endswith(ADAM)]
        rows = rows.assign(configuration=rows["configuration"].str.removesuffix(ADAM))
    return evaluation.summarize(rows, ["configuration"])


@pytest.fixture(scope="module")
def main_table() -> pd.DataFrame:
    """README's table of the published configurations: SGD, Adam, and the earlier reproduction's run."""
    rows = [line.strip("| ").split("|") for line in SECTION.splitlines() if re.match(r"\| `\w+_0\.\d` \|.*±", line)]
    columns = [*(f"{how} {name}" for how in ("sgd", "adam") for name in COLUMNS), "published raw", "published biased"]
    table = pd.DataFrame([[cell.strip() for cell in row] for row in rows], columns=["name", *columns])
    return table.set_index(table.pop("name").str.strip("`"))


def test_the_main_table_is_that_of_the_reference_results(main_table):
    assert len(main_table) == 15
    for how in ("sgd", "adam"):
        known = summary(adam=how == "adam").loc[main_table.index]
        assert (known["seeds"] == 5).all()
        for name in COLUMNS:
            assert main_table[f"{how} {name}"].tolist() == known[name.replace("_", " ")].tolist()


def test_the_published_numbers_are_those_of_notebook_5(main_table):
    cells = nbformat.read(experiment.REPOSITORY / "notebooks" / "05_plots.ipynb", as_version=4).cells
    source = next(cell.source for cell in cells if cell.source.startswith("runs = {"))
    runs = ast.literal_eval(ast.parse(source).body[0].value)
    for method, pairs in runs.items():
        rows = main_table[main_table.index.str.match(rf"{method}_0\.\d")].astype(str).sort_index()
        published = zip(rows["published raw"], rows["published biased"], strict=True)
        assert [(float(raw), float(biased)) for raw, biased in published] == pairs


def test_rank_correlations_are_those_of_the_main_table(main_table):
    for how in ("sgd", "adam"):
        ranks = []
        for test in ("raw", "biased"):
            means = main_table[f"{how} {test}"].str.split(" ± ").str[0].astype(float)
            ranks.append(means.corr(main_table[f"published {test}"].astype(float), method="spearman"))
        assert f"{ranks[0]:.2f} on raw and {ranks[1]:.2f} on biased" in SECTION


@pytest.fixture(scope="module")
def choices() -> dict[str, tuple[pd.DataFrame, list[str]]]:
    """README's table of choices: for each rule the results of what it chose, seed by seed, and the numbers beside it."""
    held_out = RESULTS[RESULTS["experiment"] == "mnist_holdout=0.1_epochs=20"].set_index(["seed", "configuration"])
    table = {}
    for line in SECTION.splitlines():
        rule, _, chosen, *numbers = line.strip("| ").split(" | ") if line.count(" | ") == 5 else ("", "", "")
        if names := re.findall("`(.*?)`", chosen):
            keys = [(seed, f"{name}_finetune_lr=0.01") for seed, name in enumerate(names)]
            table[rule] = held_out.loc[keys].reset_index(), numbers
    return table


def test_choices_and_their_numbers_are_those_of_the_reference_results(choices):
    assert len(choices) == 3
    for chosen, numbers in choices.values():
        assert evaluation.summarize(chosen.assign(all=0), ["all"]).iloc[0].tolist() == [*numbers, 5]
    held_out = RESULTS[RESULTS["validation_worst_class"].notna() & RESULTS["method"].notna()]
    for rule, column in {
        "the worse class": "validation_worst_class",
        "the worst group (optimistic)": "validation_worst_group",
    }.items():
        best = held_out.loc[held_out.groupby("seed")[column].idxmax(), "configuration"]
        assert choices[rule][0]["configuration"].tolist() == best.tolist()


def test_every_measured_number_is_in_the_reference_results(choices):
    shares = [name for name in RESULTS if name.startswith("hidden_")]
    known = evaluation.summarize(RESULTS, ["experiment", "configuration"], [*COLUMNS, *shares])
    measured = re.findall(r"\d+\.\d\d ± \d+\.\d\d", SECTION)
    assert len(measured) > 100
    assert set(measured) <= {*known.to_numpy().flat, *(number for _, numbers in choices.values() for number in numbers)}
