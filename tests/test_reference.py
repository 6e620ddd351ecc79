"""The numbers of README, results/README.md and notebook 06 against the results of the reference run."""

import ast
import re
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from masktune_utils import data, results
from masktune_utils.runner import grids
from masktune_utils.settings import REPOSITORY

ADAM = "_finetune_optimizer=adam_finetune_lr=0.001"
LINEAR = "_finetune_lr=0.02_finetune_schedule=linear"
RESULTS = pd.read_csv(REPOSITORY / "results" / "reference.csv")
SHARES = [name for name in RESULTS if name.startswith("hidden_")]
PICKED = RESULTS[RESULTS["chosen"].astype(str).eq("True")]  # what the choices ended with
ROWS = [RESULTS, PICKED.assign(configuration="chosen")]
KNOWN = evaluation.summarize(
    pd.concat(ROWS), ["experiment", "configuration"], [*evaluation.ACCURACIES, *SHARES]
)
STUDIES = {  # table of a study → what tells its rows apart
    "08_alternatives": ["dataset", "placement", "asks for", "method"],
    "09_selective": ["dataset", "labels", "placement", "rule"],
    "10_your_own": ["planted", "model"],
}
README, TABLES = (
    (REPOSITORY / path).read_text() for path in ("README.md", "results/README.md")
)


@pytest.mark.parametrize(
    ("name", "experiment", "configuration"),
    [
        ("ERM |", "mnist", "base"),
        ("one more epoch, nothing masked", "mnist", "threshold_1.0_finetune_lr=0.01"),
        ("one more epoch, random patches masked", "mnist", "random_0.1"),
        ("published: `top_k` 0.1 (", "mnist", "top_k_0.1"),
        ("published: the paper's rule", "mnist", "mean_std_2.0_finetune_lr=0.01"),
        ("ours: `mean_std` 4", "mnist", f"mean_std_4.0_dilation=4{LINEAR}"),
        ("**ours: chosen by ERM's mistakes**", "mnist", "chosen"),
        ("oracle", "mnist_shortcut=none_epochs=20", "base"),
    ],
)
def test_the_table_of_readme(name, experiment, configuration):
    start = f"| {name}"
    (row,) = [
        line for line in README.splitlines() if line.startswith(start) and line.count("|") == 5
    ]
    numbers = [cell.strip() for cell in row.strip("| ").split("|")][1:]
    assert numbers == KNOWN.loc[(experiment, configuration)].iloc[:3].tolist()


def study(stem: str) -> pd.DataFrame:
    """Every number of a study over its seeds, as text."""
    table, by = (
        pd.read_csv(REPOSITORY / "results" / f"reference_{stem}.csv"),
        STUDIES[stem],
    )
    numbers = table.select_dtypes(float).columns.difference([*by, "seconds", "gain"])
    return results.summarize(table, by, numbers)


@pytest.fixture(scope="module")
def published() -> pd.DataFrame:
    """The table of the published configurations: SGD, Adam, and the earlier reproduction."""
    lines = [
        line for line in TABLES.splitlines() if re.match(r"\| `\w+_0\.\d` \|.*±", line)
    ]
    rows = [
        [cell.strip(" `") for cell in line.strip("| ").split("|")] for line in lines
    ]
    numbers = [
        f"{how} {name}"
        for how in ("sgd", "adam")
        for name in ("raw", "biased", "worst")
    ]
    return pd.DataFrame(rows, columns=["name", *numbers, "raw", "biased"]).set_index(
        "name"
    )


def test_the_table_of_the_published_configurations(published):
    assert len(published) == 15
    for how, suffix in {"sgd": "", "adam": ADAM}.items():
        for name, row in published.iterrows():
            known = KNOWN.loc[("mnist", f"{name}{suffix}")]
            assert row[
                [f"{how} raw", f"{how} biased", f"{how} worst"]
            ].tolist() == list(known[:3])
            assert known["seeds"] == 5


def test_rank_correlations_are_those_of_the_table(published):
    for how in ("sgd", "adam"):
        ranks = []
        for test in ("raw", "biased"):
            means = published[f"{how} {test}"].str.split(" ± ").str[0].astype(float)
            ranks.append(means.corr(published[test].astype(float), method="spearman"))
        assert f"{ranks[0]:.2f} on raw and {ranks[1]:.2f} on biased" in TABLES


def test_the_published_numbers_are_those_of_notebook_6(published):
    cells = nbformat.read(
        REPOSITORY / "notebooks" / "06_study.ipynb", as_version=4
    ).cells
    source = next(cell.source for cell in cells if cell.source.startswith("theirs = {"))
    for method, pairs in ast.literal_eval(ast.parse(source).body[0].value).items():
        rows = published[published.index.str.match(rf"{method}_0")].astype(
            {"raw": float}
        )
        assert (
            list(zip(rows["raw"], rows["biased"].astype(float), strict=True)) == pairs
        )


@pytest.mark.parametrize(
    ("rule", "score"),
    [
        ("the worse class", "validation_worst_class"),
        ("the worst group (optimistic)", "validation_worst_group"),
    ],
)
def test_the_choices_and_their_numbers(rule, score):
    (row,) = [line for line in TABLES.splitlines() if line.startswith(f"| {rule} |")]
    _, _, names, *numbers = [cell.strip() for cell in row.strip("| ").split("|")]
    candidates = RESULTS[
        RESULTS["validation_worst_class"].notna() & RESULTS["method"].notna()
    ]
    chosen = candidates.loc[candidates.groupby("seed")[score].idxmax()]
    short = chosen["configuration"].str.removesuffix("_finetune_lr=0.01")
    assert re.findall("`(.*?)`", names) == short.tolist()
    assert results.summarize(chosen.assign(all=0), ["all"]).iloc[0].tolist() == [
        *numbers,
        5,
    ]


def test_the_table_of_masks_and_schedules():
    found = re.findall(r"\| `(\w+)` ([\d.]+)(?: dilated by (\d))? \|(.*± .*)\|", TABLES)
    assert len(found) == 5
    for method, param, dilation, cells in found:
        name = f"{method}_{float(param)}" + (
            f"_dilation={dilation}" if dilation else ""
        )
        constant, linear = (
            KNOWN.loc[("mnist", f"{name}{suffix}")]
            for suffix in ("_finetune_lr=0.01", LINEAR)
        )
        expected = [
            *constant.iloc[:3],
            *linear.iloc[:3],
            constant["hidden shortcut whole"],
        ]
        assert [cell.strip() for cell in cells.split("|")] == expected
        assert constant["seeds"] == linear["seeds"] == 5


def choices(experiment: str) -> list[str]:
    """Worst group of ERM, the paper's rule, what was chosen and the oracle; ERM kept; the seeds."""
    picked = PICKED[PICKED["experiment"] == experiment]
    seeds = sorted(picked["seed"])
    same_seeds = RESULTS[RESULTS["seed"].isin(seeds)]
    oracle = "mnist5k_shortcut=none" if "mnist5k" in experiment else "mnist_shortcut=none_epochs=20"
    columns = []
    for name, configuration in (
        (experiment, "base"),
        (experiment, "mean_std_2.0_finetune_lr=0.01"),
        (experiment, None),
        (oracle, "base"),
    ):
        rows = picked
        if configuration:
            of_name = same_seeds[same_seeds["experiment"] == name]
            rows = of_name[of_name["configuration"] == configuration]
        summary = evaluation.summarize(rows.assign(all=0), ["all"], ["worst_group"])
        columns.append(summary["worst group"].iloc[0] if len(rows) else "")
    kept = picked["configuration"].eq("base").sum()
    span = f"{seeds[0]}–{seeds[-1]}" if len(seeds) > 1 else f"{seeds[0]}"
    return [*columns, f"{kept} of {len(picked)}", span]


def test_the_table_of_choices():
    found = re.findall(r"^\| `(mnist\S*)` \|(.*\d of \d.*)\|$", TABLES, re.MULTILINE)
    assert {name for name, _ in found} == {*PICKED["experiment"]}
    for name, cells in found:
        assert [cell.strip() for cell in cells.split("|")] == choices(name)


def test_the_table_of_shortcuts_in_readme():
    names = {"square of 6 pixels": "mnist5k", "two squares": "mnist5k_shortcut=two_squares"}
    names |= {f"square of {k} pixels": f"mnist5k_square_size={k}" for k in (8, 10, 12)}
    names |= {"square anywhere": "mnist5k_shortcut=square_anywhere"}
    names |= {"frame": "mnist5k_shortcut=frame", "no shortcut": "mnist5k_shortcut=none"}
    names |= {"square without any exception": "mnist5k_conflicting_share=0.0"}
    names |= {"coloured digit": "mnist5k_shortcut=digit_color"}
    names |= {"tinted background": "mnist5k_shortcut=background"}
    names |= {"scattered pixels": "mnist5k_shortcut=pixels"}
    rows = [line.strip("| ").split(" | ") for line in README.splitlines() if " of " in line]
    found = {row[0]: row[1:] for row in rows if row[0] in names}
    assert found.keys() == names.keys()
    for name, cells in found.items():
        erm, _, chosen, _, kept, _ = choices(names[name])
        assert cells == [erm, chosen, kept]


@pytest.mark.parametrize("text", [README, TABLES])
def test_every_measured_number_is_in_the_reference_results(text):
    lines = [line for line in text.splitlines() if not line.startswith("| the wor")]
    measured = set(re.findall(r"\d+\.\d\d ± \d+\.\d\d", "\n".join(lines)))
    assert len(measured) > 15
    studies = [number for stem in STUDIES for number in study(stem).to_numpy().flat]
    assert measured <= {*KNOWN.to_numpy().flat, *studies}


@pytest.mark.parametrize("stem", STUDIES)
def test_the_text_of_a_study_has_its_numbers(stem):
    cells = nbformat.read(
        REPOSITORY / "notebooks" / f"{stem}.ipynb", as_version=4
    ).cells
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    measured, found = set(re.findall(r"\d+\.\d\d ± \d+\.\d\d", text)), study(stem)
    assert len(measured) > 3 and measured <= {*found.to_numpy().flat}
    assert found["seeds"].ge(5).all()


@pytest.mark.parametrize("stem", STUDIES)
def test_a_grid_makes_each_study_again(stem, monkeypatch, tmp_path):
    monkeypatch.setattr(
        data, "load", lambda settings: None
    )  # the full MNIST may be absent
    monkeypatch.setattr("masktune_utils.settings.REPOSITORY", tmp_path)
    for planted in ("watermark", "tint"):
        for part in ("train", "test"):
            (tmp_path / "data" / "textures" / planted / part).mkdir(parents=True)
    name, grid = grids.read_grid(REPOSITORY / "sweeps" / f"{stem[3:]}.yaml", {})
    table = pd.read_csv(REPOSITORY / "results" / f"reference_{stem}.csv")
    keys = ["dataset", "shortcut", "labels", "placement", "planted", "seed"]
    keys = [key for key in keys if key in table]
    made = pd.DataFrame(
        vars(one) | {"planted": Path(one.train_folder).parent.name} for one in grid
    )
    assert name == stem
    assert {*table[keys].itertuples(index=False, name=None)} == {
        *made[keys].itertuples(index=False, name=None)
    }


def test_the_grids_of_the_reference_run_list_every_row(monkeypatch):
    monkeypatch.setattr(data, "load", lambda settings: None)  # the full MNIST may be absent
    files = [REPOSITORY / "sweeps" / f"{name}.yaml" for name in ("reference", "choices")]
    grid = [one for file in files for one in sweep.read_grid(file, {})[1]]
    options = {"method": ["mean_std"], "param": [2.0], "finetune_lr": [0.01]}
    grid += sweep.read_grid(REPOSITORY / "sweeps" / "choices.yaml", options)[1]
    made = {
        (one.experiment, name, one.seed)
        for one in grid
        for name in ("base", one.configuration)
    }
    others = RESULTS[~RESULTS.index.isin(PICKED.index)]
    rows = others[["experiment", "configuration", "seed"]].itertuples(index=False, name=None)
    assert set(rows) <= made
    bases = {(experiment, seed) for experiment, name, seed in made if name == "base"}
    assert set(PICKED[["experiment", "seed"]].itertuples(index=False, name=None)) <= bases


def test_readme_is_short():
    assert len(README.encode()) <= 8192
