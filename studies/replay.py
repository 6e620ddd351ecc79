"""What the choice takes on saved predictions, with other rules; HISTORY.md.

    python studies/replay.py        # in some minutes, without any training

Prints, for ranges of seeds: the mean and the largest regret where a mask can hide the
shortcut, the mean with ten classes of clothes; how many runs end more than a point
below ERM, and the largest such loss, in points of the worst group; and how many masks
are tried. (All masks were tried in these runs. They are masks of the rule of the time;
before seed 400, all networks of halves were trained in full.)
"""

import pandas as pd
import trials
from registered import decide
from tables import by_kind

from masktune_utils.choice import ERM, score

SEEDS = [200, 203, 300, 400, 500]  # the first of each range


def uncorrected(_held_out: object) -> float:
    """One-sided, 5 %, however many masks were tried."""
    return 1.645


RULES = {  # in words → what is another in `score`
    "as it is": {},
    "not corrected for the number of masks": {"sure": uncorrected},
    "any price": {"PRICE": 1.0},
    "clear: 0.6": {"CLEAR": 0.6},
    "clear: 0.8, from the fifth mask on, too": {"CLEAR_LATER": 0.8},
}


def outcome(name: str, saved: list[str]) -> dict:
    """A run, as it is judged now: by early networks, then by late ones."""
    dataset, labels, kind, seed = name.rsplit("_", 3)
    tried = 0
    known = []
    for stage in (name, f"late/{name}"):
        if stage not in saved:
            continue
        held_out, worst_groups = trials.read(stage)
        points = 100 * worst_groups.dropna()
        known.append(points.filter([*held_out.predictions]))
        verdict, count = decide(held_out)
        tried += count
        ends = points[verdict.chosen]
        if verdict.chosen != ERM:
            break
    return {
        "range": max(first for first in SEEDS if first <= int(seed)),
        "dataset": dataset,
        "labels": labels,
        "kind": kind.replace("-", " "),
        "regret": max(points.max() for points in known) - ends,
        "loss": known[0][ERM] - ends,
        "tried": tried,
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
    saved = trials.names()
    rows = [outcome(name, saved) for name in saved if "/" not in name]
    return pd.DataFrame(rows).groupby("range")[[*rows[0]]].apply(summary)


def main() -> None:
    """Each rule in turn."""
    for words, changes in RULES.items():
        before = {name: getattr(score, name) for name in changes}
        for name, value in changes.items():
            setattr(score, name, value)
        print(words, summaries().round(2).to_string(), "", sep="\n")
        for name, value in before.items():
            setattr(score, name, value)


if __name__ == "__main__":
    main()
