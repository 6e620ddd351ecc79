"""What the choice takes on saved predictions, with other values of `CLEAR`; HISTORY.md.

    python studies/replay.py        # in three minutes, without any training

Prints, for ranges of seeds: the mean and the largest regret where a mask can hide the
shortcut, the mean with ten classes of clothes; how many runs end more than a point
below ERM, and the largest such loss, in points of the worst group; and how many masks
are tried. (All masks were tried in these runs. They are masks of the rule of the time.)
"""

import pandas as pd
import trials
from registered import number_tried
from tables import by_kind

from masktune_utils import results
from masktune_utils.choice import ERM, HeldOut, score

SEEDS = [200, 203, 300, 400]  # the first of each range
CLEAR = [score.CLEAR, 0.5, 0.7, 0.8, 0.9, 9.0]  # with 9, no mask is taken at once


def outcome(name: str, held_out: HeldOut, worst_groups: pd.Series) -> dict:
    """A run, as it is judged now."""
    dataset, labels, kind, seed = name.rsplit("_", 3)
    points = 100 * worst_groups.dropna()
    in_hindsight = points.filter([*held_out.predictions]).max()
    verdict = score.judge(held_out)
    return {
        "range": max(first for first in SEEDS if first <= int(seed)),
        "dataset": dataset,
        "labels": labels,
        "kind": kind.replace("-", " "),
        "regret": in_hindsight - points[verdict.chosen],
        "loss": points[ERM] - points[verdict.chosen],
        "tried": number_tried(held_out, verdict),
    }


def summary(runs: pd.DataFrame) -> pd.Series:
    """What is printed of runs."""
    hidden, _, _ = by_kind(runs).values()
    clothes = hidden.query("dataset == 'fashion_mnist' and labels == 'digits'")
    return pd.Series(
        {
            "runs": len(runs),
            "regret": hidden["regret"].mean(),
            "largest": hidden["regret"].max(),
            "ten clothes": clothes["regret"].mean(),
            "harmed": (runs["loss"] > 1).sum(),
            "most": runs["loss"].max(),
            "tried": runs["tried"].mean(),
        }
    )


def summaries() -> pd.DataFrame:
    """Of each range of seeds."""
    rows = []
    for name in trials.names():
        if "/" not in name:
            rows.append(outcome(name, *results.read_trial(name)))
    return pd.DataFrame(rows).groupby("range")[[*rows[0]]].apply(summary)


def main() -> None:
    for clear in CLEAR:
        score.CLEAR = clear
        print(f"CLEAR = {clear:g}", summaries().round(2).to_string(), "", sep="\n")


if __name__ == "__main__":
    main()
