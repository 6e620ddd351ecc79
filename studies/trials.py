"""Rules compared on what models of both folds predict, which was collected once.

    python studies/trials.py        # → reference_rules.csv, in seconds

A file of results/trials holds a `HeldOut` of one base model and its candidates, and,
for looking only, `worst_groups`: the accuracy in the worst group of the test sets, of
each model. `earlier` is what was chosen by the rule until November 28, 2026, as of
commit `96b6ed8`. `registered.py` makes such files; in those that are older, the worst
group is the mean of the models of both folds (in the others, the models are fine-tuned
on all images), and what is hidden where is not saved.
"""

from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd

from masktune_utils import selection
from masktune_utils.held_out import ERM, NULL, HeldOut
from masktune_utils.selection import Verdict
from masktune_utils.settings import REPOSITORY

FILES = REPOSITORY / "results" / "trials"
GROUPS = {  # when and on what they were collected → the beginning of their names
    "mnist5k, seed 0": ["mnist5k "],
    "November 28": ["2026-11-28 "],
    "seeds 100 to 102": ["mnist t", "fashion mnist t", "solar cells"],
    "seeds 103, 105": ["mnist h", "mnist d", "fashion_mnist h", "fashion_mnist d"],
}
environments = selection.environments
judge = selection.judge
strike_out = selection.strike_out


def without_mistakes(held_out: HeldOut) -> tuple[pd.DataFrame, pd.DataFrame]:
    """No environments but the resampled images."""
    accuracy, errors = environments(held_out)
    rows = held_out.resampled.index
    return accuracy.loc[rows], errors.loc[rows]


def counted_one_by_one(held_out: HeldOut) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each mistake counts the same, whatever its kind."""
    accuracy, errors = environments(held_out)
    if "mistakes" in accuracy.index:
        is_mistake = held_out.is_mistake
        share = held_out.is_right[is_mistake].mean()
        accuracy.loc["mistakes"] = share
        variances = share * (1 - share)
        errors.loc["mistakes"] = (variances / is_mistake.sum()) ** 0.5
    return accuracy, errors


def null_competes(held_out: HeldOut) -> Verdict:
    """Nothing masked is a candidate that hides nothing, and stands for ERM."""
    verdict = judge(held_out)
    _, errors = selection.environments(held_out)
    hidden = pd.concat([pd.Series({NULL: 0.0}), held_out.hidden])
    behind = verdict.distances[verdict.left]
    chosen = selection.propose(behind, errors, hidden)
    return selection.replace(verdict, chosen=chosen.replace(NULL, ERM))


VARIANTS = {  # names in `selection` that are changed
    "the rule": {"COST": selection.COST},
    "nothing masked competes": {"judge": null_competes},
    "mistakes counted one by one": {"environments": counted_one_by_one},
    "without ERM's mistakes": {"environments": without_mistakes},
    "mistakes do not decide first": {
        "strike_out": lambda accuracy, errors, before: strike_out(
            accuracy, errors + 1, before
        )
    },
    "mistakes decide first, whatever their error": {
        "strike_out": lambda accuracy, errors, before: strike_out(
            accuracy, 0 * errors, before
        )
    },
    "whether ERM relies on it or not": {"relies_on": lambda *_: True},
    "whether it helps or not": {"helps": lambda *_: True},
    "a loss counts 1.5 times": {"COST": 1.5},
    "a loss counts six times": {"COST": 6},
    "5 points behind": {"BEHIND": 0.05},
    "15 points behind": {"BEHIND": 0.15},
}


def read(file: Path) -> tuple[HeldOut, pd.Series, str]:
    """What a file holds, the worst group of each model, and the earlier choice."""
    with np.load(file) as arrays:
        saved = dict(arrays)
    worst_groups = pd.Series(saved["worst_groups"], saved["models"])
    return HeldOut.from_arrays(saved), worst_groups, f"{saved.get('earlier', '')}"


def outcome(worst_groups: pd.Series, chosen: str) -> dict[str, float]:
    """Points behind the best model, and behind ERM."""
    points = 100 * worst_groups
    return {
        "regret": points.max() - points[chosen],
        "harm": max(0.0, points[ERM] - points[chosen]),
        "kept": chosen == ERM,
    }


def compare() -> pd.DataFrame:
    """Regret and harm of the rule and of variants, over the files of each group."""
    rows = []
    for group, beginnings in GROUPS.items():
        for file in sorted(FILES.glob("*.npz")):
            is_registered = file.stem.split()[-1].startswith("20")
            if is_registered or not file.name.startswith(tuple(beginnings)):
                continue
            held_out, worst_groups, earlier = read(file)
            chosen = {"until November 28": earlier} if earlier else {}
            for name, changes in VARIANTS.items():
                with patch.multiple(selection, **changes):
                    chosen[name] = selection.judge(held_out).chosen
            for name, model in chosen.items():
                row = {"rule": name, "group": group, "file": file.stem}
                rows.append(row | outcome(worst_groups, model))
    return pd.DataFrame(rows)


def summarize(cases: pd.DataFrame) -> pd.DataFrame:
    """A row for each rule."""
    by_rule = cases.groupby("rule", sort=False)
    regret = cases.pivot_table("regret", "rule", "group", sort=False)
    return regret.assign(
        largest_regret=by_rule["regret"].max(),
        largest_harm=by_rule["harm"].max(),
        harmed=by_rule["harm"].agg(lambda points: (points > 1).sum()),
        kept=by_rule["kept"].sum(),
    )


if __name__ == "__main__":
    table = summarize(compare()).round(1)
    table.to_csv(FILES.with_name("reference_rules.csv"))
    print(table.to_string())
