"""Results: one JSON file per model, gathered into a table; and tables of tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from masktune_utils.settings import root
from masktune_utils.store import write_bytes

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
ACCURACIES = ["raw", "biased", "worst_group"]
RESULT_KEYS = {*KEY, "rule", "sha256", "base_sha256", "seconds"}
RESULT_KEYS |= {"worst_group", "metrics"}
CHOSEN = "chosen, without the test sets"


def read(path: Path) -> dict[str, Any]:
    """A saved result, see `experiment.record`.

    Raises:
        ValueError: the file is damaged, or no result.
    """
    try:
        content = json.loads(path.read_bytes())
        missing = RESULT_KEYS - set(content)
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged or not a result ({error}). Delete it."
        ) from error
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Save a result; NaN, which is no JSON, as null."""
    strict = json.loads(json.dumps(content), parse_constant=lambda _name: None)
    write_bytes(path, json.dumps(strict, indent=1).encode())


def collect(directory: str = "") -> pd.DataFrame:
    """Gather all saved results into a table.

    A result whose base model has been replaced since is left out.

    Args:
        directory: see `Settings.directory`.

    Returns:
        One row per result, sorted by `KEY`, base models first; without `metrics`, what
        `experiment.record` returns.

    Raises:
        ValueError: a JSON file there is damaged, or not a result.
    """
    rows = []
    for folder in sorted((root(directory) / "results").glob("*/seed*")):
        saved = {path.stem: read(path) for path in folder.glob("*.json")}
        sha256 = saved["base"]["sha256"] if "base" in saved else None
        rows += [row for row in saved.values() if row["base_sha256"] == sha256]
    if not rows:
        return pd.DataFrame(columns=KEY)
    table = pd.DataFrame(rows).drop(columns="metrics")
    return table.sort_values(
        KEY, key=lambda column: column.replace("base", ""), ignore_index=True
    )


def finished(directory: str) -> set[tuple]:
    """All saved results: experiment, configuration, seed."""
    return set(collect(directory)[KEY].itertuples(index=False, name=None))


def summarize(
    table: pd.DataFrame,
    by: Sequence[str] = ("configuration",),
    shares: Sequence[str] = ACCURACIES,
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
    groups = table.groupby(list(by), sort=False, dropna=False)
    summary = groups[columns].agg(_mean_and_std).assign(seeds=groups.size())
    return summary.rename(columns=lambda name: name.replace("_", " "))


def _mean_and_std(shares: pd.Series) -> str:
    """In %; the standard deviation only of several values."""
    known = shares.dropna()
    text = f"{100 * known.mean():.2f}" if len(known) else ""
    return f"{text} ± {100 * known.std():.2f}" if len(known) > 1 else text


def named(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the column `model`: in words, or the configuration if need be.

    Args:
        table: see `collect`.
    """
    rule = table["rule"].mask(table["configuration"] == "chosen", CHOSEN)
    configurations = table.groupby(["experiment", rule])["configuration"]
    is_unique = configurations.transform("nunique") == 1
    return table.assign(model=rule.where(is_unique, table["configuration"]))


def worth(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of each model of each experiment, the best one last, as text.

    Args:
        table: see `named`.
    """
    by = ["experiment", "model"] if table["experiment"].nunique() > 1 else ["model"]
    means = table.groupby(by)["worst_group"].transform("mean")
    return summarize(table.loc[means.sort_values(kind="stable").index], by)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Save a table as CSV."""
    write_bytes(path, table.to_csv(index=False).encode())


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
