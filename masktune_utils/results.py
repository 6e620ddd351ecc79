"""Results: how good a model is, saved as one JSON file each; and tables of them."""

import io
import json
import zipfile
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from masktune_utils import datasets, metrics, store
from masktune_utils.choice import HeldOut
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import REPOSITORY, BaseSettings, Settings, root

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
ACCURACIES = ["raw", "biased", "worst_group"]
CHOSEN = "chosen, without the test sets"
TRIALS = REPOSITORY / "results" / "trials.zip"


def evaluate(model: nn.Module, sets: datasets.BiasedSets) -> dict[str, float]:
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
            groups.setdefault(f"group {group}", accuracy)
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
    inside = split.shortcut.float()
    outside = 1 - inside
    ink = split.images.sum(1, dtype=torch.float32) * outside
    areas = {
        "shortcut": inside,
        "rest": outside,
        "digit": ink,
    }
    shares = {
        name: (hidden * area).sum((1, 2)) / area.sum((1, 2))
        for name, area in areas.items()
    }
    shares["shortcut_whole"] = (shares["shortcut"] > 0.99).float()
    # An image without any ink outside the shortcut has no share of it.
    return {name: values.nanmean().item() for name, values in shares.items()}


def read(path: Path) -> dict:
    """A saved result, see `experiment.record`.

    Raises:
        CheckpointError: the file is damaged, or no result.
    """
    with store.blame(path):
        row = json.loads(path.read_bytes())
        if not {*KEY, "base_sha256"} <= row.keys():
            raise ValueError("it is no result")
    settings = Settings() if "method" in row else BaseSettings()
    for name, default in settings.identity.items():
        row.setdefault(name, default)  # a setting that is newer than the file
    return row


def read_trial(name: str) -> tuple[HeldOut, pd.Series]:
    """A saved run of `trials.zip`: what models predict, and the worst group by model.

    Args:
        name: `{data set}_{classes}_{kind}_{seed}`; studies/trials.py lists all.
    """
    with zipfile.ZipFile(TRIALS) as archive:
        file = io.BytesIO(archive.read(f"{name}.pt"))
    content = torch.load(file, weights_only=True)
    worst_groups = content.pop("worst_groups")
    return HeldOut(**content), pd.Series(worst_groups)


def write_json(path: Path, row: dict) -> None:
    """Save a result; NaN, which is no JSON, as null."""
    text = json.dumps(row, indent=1)
    text = text.replace(": NaN", ": null")
    store.write_bytes(path, text.encode())


def collect(directory: str = "") -> pd.DataFrame:
    """Gather all saved results into a table.

    Left out are a result whose base model has been replaced since, and a copy: a file
    that is not where its experiment, configuration and seed belong.

    Args:
        directory: see `Settings.directory`.

    Returns:
        One row per result, sorted by `KEY`, base models first.

    Raises:
        CheckpointError: a JSON file there is damaged, or not a result.
    """
    folder = root(directory) / "results"
    rows = []
    for path in sorted(folder.glob("*/seed*/*.json")):
        row = read(path)
        place = "{experiment}/seed{seed}/{configuration}.json".format(**row)
        if path == folder / place:
            rows.append(row)
    if not rows:
        return pd.DataFrame(columns=KEY)
    table = pd.DataFrame(rows)
    bases = table[table["configuration"] == "base"]
    current = table.merge(bases[["experiment", "seed", "base_sha256"]])
    return current.sort_values(KEY, ignore_index=True)


def summarize(
    table: pd.DataFrame,
    by: str | list[str] = "configuration",
    shares: list[str] = ACCURACIES,
) -> pd.DataFrame:
    """Shares in %, one row per group of rows: mean ± sample standard deviation.

    Args:
        table: see `collect`.
        by: columns that tell the rows apart.
        shares: names of the columns that are summarized.

    Returns:
        The `shares`, as text, with blanks for underscores in their names, and `seeds`,
        their number.
    """
    groups = table.groupby(by, sort=False, dropna=False)
    summary = groups[shares].agg(_mean_and_std)
    summary["seeds"] = groups.size()
    return summary.rename(columns=lambda name: name.replace("_", " "))


def _mean_and_std(shares: pd.Series) -> str:
    """In %; the standard deviation only of several values."""
    text = f"{100 * shares.mean():.2f} ± {100 * shares.std():.2f}"
    return text.removesuffix(" ± nan").removeprefix("nan")


def with_model_names(table: pd.DataFrame) -> pd.DataFrame:
    """A table with the column `model`: in words, or the configuration if need be.

    Args:
        table: see `collect`.
    """
    configuration = table["configuration"]
    rule = table["rule"].mask(configuration == "chosen", CHOSEN)
    counts = configuration.groupby(rule).transform("nunique")
    model = rule.where(counts == 1, configuration)
    return table.assign(model=model)


def accuracy_table(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies of each model of each experiment, the best one last, as text.

    Args:
        table: see `collect`.
    """
    table = with_model_names(table)
    by = ["model"]
    if table["experiment"].nunique() > 1:
        by = ["experiment", "model"]
    means = table.groupby(by)["worst_group"].mean()
    order = means.sort_values().index
    return summarize(table, by).loc[order]


def save_table(table: pd.DataFrame, path: Path) -> None:
    """Save a table as CSV."""
    text = table.to_csv(index=False)
    store.write_bytes(path, text.encode())
