"""How long should the networks of halves be trained? A choice by each length.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/lengths.py

makes the rows that are missing in `results/lengths.csv`, two runs at a time, five
minutes of one core each: kinds of registered.py, a development seed, masks of first
rounds alone. `is_conflicting` is looked at here; a choice does not know it. (The rows
that are there were made when a mask was clear from four fifths of what is left.)
"""

import copy
from functools import partial

import registered
import torch
from resume import resume
from torch import Tensor

from masktune_utils import results, shortcuts
from masktune_utils.choice import ERM, score
from masktune_utils.choice.chosen import CANDIDATES
from masktune_utils.choice.held_out import try_masks
from masktune_utils.data import Split
from masktune_utils.settings import REPOSITORY

FILE = REPOSITORY / "results" / "lengths.csv"
KEY = ["dataset", "labels", "kind", "seed"]
LENGTHS = [2, 4, 8, 50]  # epochs
SEED = 207
KINDS = [
    ("mnist", "halves", "square 6"),
    ("mnist", "halves", "square anywhere"),
    ("mnist", "halves", "two squares"),
    ("mnist", "halves", "none"),
    ("mnist", "digits", "letters"),
    ("mnist", "digits", "none"),
    ("fashion_mnist", "halves", "line"),
    ("fashion_mnist", "digits", "square 8"),
]


def is_conflicting(train: Split, kind: str) -> Tensor:
    """N, bool: does the image go against the shortcut?"""
    if kind == "none":
        return torch.zeros_like(train.has_shortcut)
    return train.has_shortcut != (shortcuts.halves(train.labels) == 0)


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """A row for each length."""
    torch.set_num_threads(1)
    sets = registered.load(dataset, labels, kind, seed)
    erm = registered.fit(sets.train, seed)
    conflicting = is_conflicting(sets.train, kind)
    rules = [rule.each_round[0] for rule in CANDIDATES]
    rows = []
    for epochs in LENGTHS:
        fit = partial(registered.fit, seed=seed, epochs=epochs)
        stages = try_masks(sets.train, fit, registered.fine_tune, rules, seed=seed)
        for held_out in stages:
            verdict = score.judge(held_out)
            if verdict.is_final:
                break
        network = erm
        if verdict.chosen != ERM:
            masked = held_out.masked[verdict.chosen]
            network = registered.fine_tune(copy.deepcopy(erm), masked)
        is_mistake = held_out.is_mistake
        rows.append(
            {
                **dict(zip(KEY, (dataset, labels, kind, seed), strict=True)),
                "epochs": epochs,
                "mistakes": is_mistake.sum().item(),
                "conflicting_mistakes": (is_mistake & conflicting).sum().item(),
                "conflicting": conflicting.sum().item(),
                "chosen": verdict.chosen,
                "erm": results.evaluate(erm, sets)["worst_group"],
                "worst_group": results.evaluate(network, sets)["worst_group"],
            }
        )
    return rows


if __name__ == "__main__":
    import lengths  # its functions have this name in the other processes, too

    resume(FILE, KEY, [(*kind, SEED) for kind in KINDS], lengths.run)
