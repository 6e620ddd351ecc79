"""Rules compared on saved predictions of development seeds, without any training.

    python studies/rules.py        # → results/rules.csv, in a minute

Regret: points in the worst group behind the best model, where a mask can hide the
shortcut; harm: behind ERM; *harmed*: by more than a point. `saved`: seeds 200 to 205 in
`trials.zip`, where a mistake counts as explained if it leaves with the hidden part in
three exchanges of three. `swaps`: seeds 206 to 209 in `swaps.zip`, kinds that are
hard.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch
import trials

from masktune_utils.choice import ERM, HeldOut, score
from masktune_utils.settings import REPOSITORY

RESULTS = REPOSITORY / "results"
OUT_OF_REACH = ("none", "pixels", "coloured-digit", "tint")  # no mask can hide these
NEVER = 9.0
Swaps = np.ndarray  # mistakes × masks × 10, bool
# What counts as explained, by how often a mistake leaves and comes.
EXPLAINED: dict[str, Callable[[Swaps, Swaps], np.ndarray]] = {
    "share of five swaps (the rule)": lambda out, to: (out & to)[..., :5].mean(2),
    "share of ten swaps": lambda out, to: (out & to).mean(2),
    "leaves in three of three": lambda out, _: out[..., :3].all(2),
    "leaves in five of five": lambda out, _: out[..., :5].all(2),
    "leaves in ten of ten": lambda out, _: out.all(2),
    "leaves in eight of ten": lambda out, _: out.sum(2) >= 8,
    "share in which it leaves": lambda out, _: out.mean(2),
    "leaves in eight, comes in eight": lambda out, to: (
        (out.sum(2) >= 8) & (to.sum(2) >= 8)
    ),
    "product of both shares": lambda out, to: out.mean(2) * to.mean(2),
    "all mistakes": lambda out, _: np.ones(out.shape[:2]),
}
# Names in `score` that are changed.
CONSTANTS = {
    "as it is": {"CLEAR": score.CLEAR},
    "no mask is taken at once": {"CLEAR": NEVER},
    "taken at once from 60 points": {"CLEAR": 0.6},
    "gains of 5 points are enough": {"ENOUGH": 0.05},
    "gains of 15 points": {"ENOUGH": 0.15},
    "two standard errors": {"SURE": 2.0},
}


def of_saved() -> Iterator[tuple[str, HeldOut, pd.Series]]:
    """Runs that were kept before any swap was tried."""
    for name in trials.names():
        held_out, worst_groups = trials.read(name)
        seed = name.rpartition("_")[2]
        if "/" not in name and int(seed) < 300:
            yield name, held_out, worst_groups


def of_swaps(explained: Callable) -> Iterator[tuple[str, HeldOut, pd.Series]]:
    """Runs of which each swap is known."""
    with zipfile.ZipFile(RESULTS / "swaps.zip") as archive:
        files = {name: archive.read(name) for name in sorted(archive.namelist())}
    for name, content in files.items():
        with np.load(io.BytesIO(content)) as arrays:
            saved = dict(arrays)
        models = saved["models"].tolist()
        masks = models[2:]
        labels = torch.from_numpy(saved["labels"]).long()
        shares = torch.zeros(len(labels), len(masks))
        of_mistakes = explained(saved["leaves"], saved["comes"])
        shares[saved["mistakes"]] = torch.from_numpy(of_mistakes).float()
        predictions = torch.from_numpy(saved["predictions"]).long()
        held_out = HeldOut(
            labels=labels,
            mistake_map=torch.zeros(1, 1),
            predictions=dict(zip(models, predictions.T, strict=True)),
            explained=dict(zip(masks, shares.T, strict=True)),
            mean_masks=dict.fromkeys(masks, torch.zeros(1, 1)),
        )
        yield name, held_out, pd.Series(saved["worst_groups"], models)


def one_by_one(held_out: HeldOut) -> HeldOut:
    """Each mistake is a kind of its own: no class has two of the same prediction."""
    predictions = held_out.predictions[ERM].clone()
    mistakes = held_out.is_mistake.nonzero()[:, 0]
    predictions[mistakes] = 1000 + torch.arange(len(mistakes))
    models = {**held_out.predictions, ERM: predictions}
    return HeldOut(**{**vars(held_out), "predictions": models})


def outcome(
    name: str, held_out: HeldOut, worst_groups: pd.Series
) -> dict[str, str | float]:
    """What the choice costs, and how many masks it tries."""
    tried = len(held_out.tried)
    verdict = score.judge(held_out)
    if verdict.is_final and verdict.chosen != ERM:
        tried = 1 + held_out.tried.index(verdict.chosen)
    points = 100 * worst_groups
    can_hide = not any(kind in name for kind in OUT_OF_REACH)
    return {
        "regret": points.max() - points[verdict.chosen] if can_hide else np.nan,
        "harm": max(0.0, points[ERM] - points[verdict.chosen]),
        "tried": tried,
    }


def summary(
    runs: Iterator[tuple[str, HeldOut, pd.Series]],
    change: dict = CONSTANTS["as it is"],
) -> dict[str, float]:
    """Means over runs; those with fewer than five mistakes are left out."""
    with patch.multiple(score, **change):
        rows = [outcome(*run) for run in runs if run[1].is_mistake.sum() >= score.FEW]
    table = pd.DataFrame(rows)
    return {
        "runs": len(table),
        "regret": table["regret"].mean(),
        "largest_regret": table["regret"].max(),
        "harmed": (table["harm"] > 1).sum(),
        "largest_harm": table["harm"].max(),
        "masks_tried": table["tried"].mean(),
    }


def main() -> None:
    """Write the table."""
    rows = []
    for name, change in CONSTANTS.items():
        rows.append({"on": "saved", "rule": name, **summary(of_saved(), change)})
    single = ((name, one_by_one(known), worst) for name, known, worst in of_saved())
    rows.append({"on": "saved", "rule": "one by one", **summary(single)})
    rule = next(iter(EXPLAINED.values()))
    for name, explained in EXPLAINED.items():
        rows.append({"on": "swaps", "rule": name, **summary(of_swaps(explained))})
        single = (
            (run, one_by_one(known), worst) for run, known, worst in of_swaps(explained)
        )
        name = f"{name}, one by one"
        rows.append({"on": "swaps", "rule": name, **summary(single)})
    for name, change in CONSTANTS.items():
        if name != "as it is":
            rows.append(
                {"on": "swaps", "rule": name, **summary(of_swaps(rule), change)}
            )
    table = pd.DataFrame(rows).round(2)
    table.to_csv(RESULTS / "rules.csv", index=False)
    print(table.to_string())


if __name__ == "__main__":
    main()
