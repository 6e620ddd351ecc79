"""Results: one JSON file per model, gathered into a table; and tables of tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masktune_utils.masking import Rule
from masktune_utils.settings import RULE, Settings, root
from masktune_utils.store import write_bytes

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
ACCURACIES = ["raw", "biased", "worst_group"]
RESULT_KEYS = {*KEY, "sha256", "base_sha256", "seconds", "worst_group", "metrics"}
CHOICE_KEYS = {
    "configuration",
    "reason",
    "images",
    "mistakes",
    "candidates",
    "base_sha256",
}
BEST = "best of the others, by the test sets"
CHOSEN = "chosen, without the test sets"


def read_result(path: Path) -> dict[str, Any]:
    """A saved result, see `experiment.record`.

    Raises:
        ValueError: the file is damaged, or not a result.
    """
    return _read_json(path, RESULT_KEYS)


def read_choice(path: Path) -> dict[str, Any]:
    """A saved choice, see `experiment.choose`.

    Raises:
        ValueError: the file is damaged, or not a choice.
    """
    return _read_json(path, CHOICE_KEYS)


def current_choice(base: Settings, sha256: str) -> dict[str, Any] | None:
    """The saved choice of an experiment; None if there is none for this base model.

    Nor is one of an older version returned, which has no table of accuracies.

    Args:
        base: the settings of the base model.
        sha256: of its weights.

    Raises:
        ValueError: see `read_choice`.
    """
    path = base.folder("results") / "chosen.json"
    if not path.exists():
        return None
    choice = read_choice(path)
    is_current = choice["base_sha256"] == sha256
    return choice if is_current and "chosen" in choice else None


def _read_json(path: Path, keys: set[str]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
        missing = keys - set(content)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a result or a choice ({error}). Delete it."
        ) from error
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save a result or a choice."""
    text = json.dumps(content, indent=1)
    strict = json.loads(
        text, parse_constant=lambda _name: None
    )  # NaN, which is no JSON
    write_bytes(path, json.dumps(strict, indent=1).encode())


def collect(directory: str = "") -> pd.DataFrame:
    """Gather all saved results into a table.

    A result whose base model has been replaced since, or was tested on other images, is
    left out.

    Args:
        directory: see `Settings.directory`.

    Returns:
        One row per result, sorted by `KEY`, base models first; without `metrics`, what
        `experiment.record` returns. Also `chosen`: whether `experiment.choose` chose
        it; None if there was no choice.

    Raises:
        ValueError: a JSON file there is damaged, or not a result.
    """
    results = {}
    choices = {}
    for path in sorted((root(directory) / "results").glob("*/seed*/*.json")):
        if path.name == "chosen.json":
            choices[path.parent] = read_choice(path)
        else:
            results[path] = read_result(path)
    bases = {path.parent: row for path, row in results.items() if path.stem == "base"}
    rows = []
    for path, row in results.items():
        base = bases.get(path.parent, {})
        if row["base_sha256"] != base.get("sha256"):
            continue
        if row.get("test_folder") != base.get("test_folder"):
            continue
        row["chosen"] = None
        choice = choices.get(path.parent)
        if choice and choice["base_sha256"] == row["base_sha256"]:
            row["chosen"] = row["configuration"] == choice["configuration"]
        rows.append(row)
    if not rows:
        return pd.DataFrame(columns=[*KEY, "chosen"])
    table = pd.DataFrame(rows).drop(columns="metrics")
    return table.sort_values(
        KEY, key=lambda column: column.replace("base", ""), ignore_index=True
    )


def finished(directory: str) -> set[tuple]:
    """All saved results: experiment, configuration, seed, test folder."""
    table = collect(directory).reindex(columns=[*KEY, "test_folder"])
    return set(table.itertuples(index=False, name=None))


def summarize(
    table: pd.DataFrame,
    by: Sequence[str] = ("configuration",),
    shares: Sequence = ("test", *ACCURACIES),
) -> pd.DataFrame:
    """Shares in %, one row per group of rows: mean ± sample standard deviation.

    Args:
        table: see `collect`.
        by: columns that tell the rows apart.
        shares: names of the columns that are summarized, where there is anything in
            them.

    Returns:
        The `shares`, as text, with blanks for underscores in their names, and `seeds`,
        their number.
    """
    columns = [name for name in shares if name in table and table[name].notna().any()]
    groups = table.groupby(list(by), sort=False, dropna=False)[columns]
    mean = 100 * groups.mean()
    std = 100 * groups.std()
    text = mean.map("{:.2f}".format).where(mean.notna(), "")
    text += std.map(" ± {:.2f}".format).where(std.notna(), "")
    return text.assign(seeds=groups.size()).rename(
        columns=lambda name: name.replace("_", " ")
    )


def compare(table: pd.DataFrame, experiment: str) -> pd.DataFrame:
    """Rows of the table of results that tell what the choice is worth.

    Args:
        table: see `collect`.
        experiment: see `Settings.experiment`.

    Returns:
        The rows of ERM; of the best of the other configurations by the test sets, if
        there are any; and of what was chosen, which may be ERM; `model` tells them
        apart.
    """
    of_experiment = table[table["experiment"] == experiment]
    is_base = of_experiment["configuration"] == "base"
    is_chosen = of_experiment["chosen"].eq(True)
    others = of_experiment[~is_base & ~is_chosen]
    rows = {
        "ERM": of_experiment[is_base],
        BEST: others.loc[others.groupby("seed")["worst_group"].idxmax()],
        CHOSEN: of_experiment[is_chosen],
    }
    return pd.concat([rows[name].assign(model=name) for name in rows])


def names(table: pd.DataFrame) -> pd.Series:
    """The configuration of each row in words, or `ERM`."""
    described = {}
    for index, row in table.reindex(columns=RULE).iterrows():
        known = row.dropna()  # an older result lacks younger settings
        described[index] = f"{Rule(**known)}" if "method" in known else "ERM"
    return pd.Series(described, dtype=object)


def conclude(bases: Sequence[Settings]) -> str:
    """For each experiment what was chosen, why, and what it is worth, as text.

    Args:
        bases: the settings of the base models.
    """
    table = collect(bases[0].directory)
    text = ""
    for experiment in dict.fromkeys(base.experiment for base in bases):
        seeds = [base for base in bases if base.experiment == experiment]
        text += f"\n{experiment}\n\n"
        for base in seeds:
            path = base.folder("results") / "base.json"
            sha256 = read_result(path)["sha256"] if path.exists() else ""
            choice = current_choice(base, sha256)
            if choice:
                text += f"seed {base.seed}: {choice['reason']}\n"
        of_seeds = table[table["seed"].isin([base.seed for base in seeds])]
        rows = compare(of_seeds, experiment)
        shares = ("test", *ACCURACIES)
        groups = [name for name in rows if name.startswith("group ")]
        summary = summarize(rows, ["model"], [*shares, *groups])
        text += f"\nAccuracy in %\n\n{summary.T.to_string()}\n"
    return text


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Save a table as CSV."""
    write_bytes(path, table.to_csv(index=False).encode())


def save_study(table: pd.DataFrame, settings: Settings, name: str) -> None:
    """Save what a study found for one experiment, as `results/…/{name}.csv`.

    Args:
        table: see the notebook.
        settings: the experiment.
        name: of the notebook.
    """
    save_table(table, settings.folder("results") / f"{name}.csv")


def gather_study(directory: str, name: str) -> None:
    """Join what a study has saved for each experiment into `results/{name}.csv`.

    Args:
        directory: see `Settings.directory`.
        name: of the notebook.
    """
    folder = root(directory) / "results"
    parts = [pd.read_csv(path) for path in sorted(folder.glob(f"*/seed*/{name}.csv"))]
    if parts:
        save_table(pd.concat(parts), folder / f"{name}.csv")
