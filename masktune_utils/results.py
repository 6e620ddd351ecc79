"""Results: how good a model is, saved as one JSON file each; and tables of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from masktune_utils import metrics, store
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import root

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
ACCURACIES = ["raw", "biased", "worst_group"]
COLUMNS = {*KEY, *ACCURACIES, "rule", "sha256", "base_sha256"}  # of every result
CHOSEN = "chosen, without the test sets"


def evaluate(model: nn.Module, sets: BiasedSets) -> dict[str, float]:
    """Accuracies on the test sets, in [0, 1].

    Returns:
        `raw`, `biased`; `group {name}`, see `metrics.group_accuracy`, over both test
        sets together, whose low digits are the same; and `worst_group`, the smallest
        of these.
    """
    accuracies = {}
    groups = {}
    for name, split in sets.tests.items():
        logits = metrics.predict(model, split)
        is_right = metrics.is_right(logits, split.labels)
        accuracies[name] = is_right.double().mean().item()
        for group, accuracy in metrics.group_accuracy(logits, split).items():
            groups[f"group {group}"] = accuracy
    return {
        **accuracies,
        "worst_group": min(groups.values()),
        **groups,
    }


def hidden_shares(masked: MaskedDataset) -> dict[str, float]:
    """How much of the shortcut and of the rest is hidden, in images that have one.

    Args:
        masked: the masked images.

    Returns:
        `shortcut`: mean share of the shortcut's area that is hidden; `shortcut_whole`:
        share of the images whose shortcut is hidden to more than 99 %; `rest`: mean
        share of the area outside; `digit`: mean share of the digit's ink (grey value
        outside the shortcut). All are NaN if no image has a shortcut. With `resample`,
        what is hidden is the union with the mask of the partner in the first epoch.
    """
    index = masked.split.has_shortcut.nonzero()[:, 0]
    split = masked.split[index]
    hidden = masked.masks(index)
    inside = split.shortcut.float().expand_as(hidden)
    outside = 1 - inside
    ink = split.images.sum(1, dtype=torch.float32) * outside
    shares = {}
    areas = {"shortcut": inside, "rest": outside, "digit": ink}
    for name, area in areas.items():
        hidden_area = (hidden * area).sum((1, 2))
        shares[name] = hidden_area / area.sum((1, 2))
    shares["shortcut_whole"] = (shares["shortcut"] > 0.99).float()
    # An image without any ink outside the shortcut has no share of it.
    means = {}
    for name, values in shares.items():
        means[name] = values.nanmean().item()
    return means


def read(path: Path) -> dict[str, Any]:
    """A saved result, see `experiment.record`.

    Raises:
        CheckpointError: the file is damaged, or no result.
    """
    content = path.read_bytes()
    with store.reading(path):
        row = json.loads(content)
        missing = COLUMNS - {*row}
        if missing:
            raise ValueError(f"it has no {missing}")
    return row


def write_json(path: Path, row: dict[str, Any]) -> None:
    """Save a result; NaN, which is no JSON, as null."""
    strict = json.loads(
        json.dumps(row),
        parse_constant=lambda _name: None,
    )
    text = json.dumps(strict, indent=1)
    store.write_bytes(path, text.encode())


def collect(directory: str = "") -> pd.DataFrame:
    """Gather all saved results into a table.

    A result whose base model has been replaced since is left out.

    Args:
        directory: see `Settings.directory`.

    Returns:
        One row per result, sorted by `KEY`, base models first.

    Raises:
        CheckpointError: a JSON file there is damaged, or not a result.
    """
    rows = []
    folders = (root(directory) / "results").glob("*/seed*")
    for folder in sorted(folders):
        saved = {path.stem: read(path) for path in folder.glob("*.json")}
        base = saved.get("base", {})
        for row in saved.values():
            if row["base_sha256"] == base.get("sha256"):
                rows.append(row)
    if not rows:
        return pd.DataFrame(columns=KEY)
    return pd.DataFrame(rows).sort_values(
        KEY,
        key=lambda column: column.replace("base", ""),
        ignore_index=True,
    )


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
    known = table.dropna(axis=1, how="all").columns
    columns = [name for name in shares if name in known]
    groups = table.groupby(list(by), sort=False, dropna=False)
    summary = groups[columns].agg(_mean_and_std)
    summary["seeds"] = groups.size()
    return summary.rename(columns=lambda name: name.replace("_", " "))


def _mean_and_std(shares: pd.Series) -> str:
    """In %; the standard deviation only of several values."""
    known = shares.dropna()
    if known.empty:
        return ""
    text = f"{100 * known.mean():.2f}"
    if len(known) > 1:
        text += f" ± {100 * known.std():.2f}"
    return text


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
        table: see `collect`.
    """
    table = named(table)
    by = ["experiment", "model"]
    if table["experiment"].nunique() == 1:
        by = ["model"]
    means = table.groupby(by)["worst_group"].transform("mean")
    order = means.sort_values(kind="stable").index
    return summarize(table.loc[order], by)


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Save a table as CSV."""
    text = table.to_csv(index=False)
    store.write_bytes(path, text.encode())
