"""What the choice takes on the saved predictions of development seeds; HISTORY.md.

    python studies/replay.py        # in a minute, without any training

Prints the mean and the largest regret where a mask can hide the shortcut, how many runs
end more than a point below ERM and the largest such loss, in points of the worst group;
and which choices of the registered test differ.
"""

from dataclasses import replace

import pandas as pd
import trials

from masktune_utils.choice import ERM, NULL, HeldOut
from masktune_utils.choice.score import Verdict, judge
from masktune_utils.settings import REPOSITORY

OUT_OF_REACH = "pixels|coloured-digit|tint|none"  # kinds that no mask can hide
ORACLE = "oracle"


def choose(held_out: HeldOut) -> Verdict:
    """Judge after each mask, in the order in which they were tried."""
    known = {name: held_out.predictions[name] for name in (ERM, NULL)}
    verdict = judge(replace(held_out, predictions=known))
    for mask in held_out.tried:
        if verdict.is_final:
            break
        known[mask] = held_out.predictions[mask]
        verdict = judge(replace(held_out, predictions=known))
    return verdict


def other_choices() -> pd.DataFrame:
    """The runs of the registered test that choose something else than they did.

    Returns:
        Data set, classes, kind, seed and the model that they chose; the worst group, in
        %, as it `was` with it, and with what they choose `now`.
    """
    rows = pd.read_csv(REPOSITORY / "results" / "registered.csv")
    others = []
    for run in rows[rows["is_chosen"]].to_dict("records"):
        name = "{dataset}, {labels}, {kind}, {seed}".format(**run)
        held_out, shares = trials.read(trials.file_name(name))
        chosen = choose(held_out).chosen
        if chosen != run["model"]:
            was, now = 100 * shares[[run["model"], chosen]]
            others.append({**run, "chosen": chosen, "was": was, "now": now})
    return pd.DataFrame(others)


def main() -> None:
    rows = []
    for name in trials.names():
        if name.startswith("photographs"):
            continue
        held_out, shares = trials.read(name)
        points = 100 * shares.dropna()
        chosen = choose(held_out).chosen
        best = points.drop([NULL, ORACLE], errors="ignore").max()
        rows.append(
            {
                "name": name,
                "seed": int(name.rsplit("_", 1)[1]),
                "regret": best - points[chosen],
                "loss": points[ERM] - points[chosen],
            }
        )
    runs = pd.DataFrame(rows)
    is_within_reach = ~runs["name"].str.contains(OUT_OF_REACH)
    has_ten_clothes = runs["name"].str.startswith("fashion_mnist_digits")
    table = {}
    for title, seeds in {"200 to 202": (200, 202), "203 to 205": (203, 205)}.items():
        is_of_seeds = runs["seed"].between(*seeds)
        within_reach = runs[is_of_seeds & is_within_reach]
        clothes = runs[is_of_seeds & is_within_reach & has_ten_clothes]
        losses = runs.loc[is_of_seeds, "loss"]
        table[title] = {
            "regret": within_reach["regret"].mean(),
            "largest": within_reach["regret"].max(),
            "ten classes of clothes": clothes["regret"].mean(),
            "harmed": (losses > 1).sum(),
            "largest loss": losses.max(),
        }
    print(pd.DataFrame(table).round(1).to_string())
    print("Choices of the registered test that differ:")
    print(other_choices().to_string())


if __name__ == "__main__":
    main()
