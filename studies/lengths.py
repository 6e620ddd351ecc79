"""How should the networks of halves be trained? Ways to choose by them, compared.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/lengths.py

makes the rows that are missing in `results/lengths.csv`, two runs at a time, twelve
minutes of one core each: kinds of registered.py, a development seed, masks of first
rounds alone. Which images conflict is looked at here; a choice does not know it.
"""

from dataclasses import dataclass, replace
from functools import partial

import registered
import torch
from resume import resume
from torch import nn

from masktune_utils import data, results, shortcuts
from masktune_utils.choice import NULL, Choice, HeldOut, audit, score
from masktune_utils.choice.chosen import CANDIDATES
from masktune_utils.choice.held_out import try_masks
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset

LENGTHS = [1, 2, 4, 8, 50]  # epochs
EARLY = 4
LATE = 50
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


@dataclass(frozen=True)
class Ready:
    """A candidate whose masks are there: those of another record."""

    masked: MaskedDataset
    rounds: int = 1
    exchange: bool = True

    def __str__(self) -> str:
        return f"{self.masked.rule}"

    def mask(self, *_: object) -> MaskedDataset:
        """The masks."""
        return self.masked


def audited(halves: list[nn.Module], train: Split, seed: int) -> dict[str, int]:
    """How many mistakes move with the region of each half's audit, and elsewhere."""
    counts = {"move": 0, "move_elsewhere": 0}
    folds = data.folds(train.labels, seed)
    for network, others in zip(halves, reversed(folds), strict=True):
        found = audit(network, train[others], seed)
        counts["move"] += len(found.swaps.moving)
        counts["move_elsewhere"] += max(found.elsewhere)
    return counts


def try_ways(train: Split, seed: int) -> tuple[dict[str, HeldOut], dict[str, dict]]:
    """By way: what held-out images say; and by length, what audits of halves say."""
    train = replace(train, groups=torch.arange(len(train)))  # an image knows its number
    by_rule = [replace(rule, rounds=1) for rule in CANDIDATES]
    networks = []
    records = {}
    audits = {}

    def fit(half, epochs=LATE):
        networks.append(registered.fit(half, seed, epochs))
        return networks[-1]

    def fit_rest(half):
        """On what the other half's network predicts correctly."""
        is_mistake = records[f"{LATE}"].is_mistake[half.groups]
        return fit(half[~is_mistake])

    def try_way(way, fit, candidates):
        stages = try_masks(train, fit, registered.fine_tune, candidates, seed=seed)
        *_, records[way] = stages

    for epochs in LENGTHS:
        way = f"{epochs}"
        try_way(way, partial(fit, epochs=epochs), by_rule)
        audits[way] = audited(networks[-2:], train, seed)
    early = records[f"{EARLY}"].masked
    ready = [Ready(masked) for name, masked in early.items() if name != NULL]
    try_way("early masks", fit, ready)
    try_way("without mistakes", fit_rest, by_rule)
    return records, audits


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """A row for each way."""
    sets = registered.load(dataset, labels, kind, seed)
    train = sets.train
    erm = registered.fit(train, seed)
    conflicting = train.has_shortcut == shortcuts.halves(train.labels).bool()
    if kind == "none":
        conflicting[:] = False
    records, audits = try_ways(train, seed)
    rows = []
    for way, held_out in records.items():
        verdict = score.judge(held_out)
        network = Choice(held_out, registered.fine_tune, verdict).finetune(erm)
        is_mistake = held_out.is_mistake
        rows.append(
            {
                "way": way,
                "mistakes": is_mistake.sum().item(),
                "conflicting_mistakes": (is_mistake & conflicting).sum().item(),
                "conflicting": conflicting.sum().item(),
                **audits.get(way, {}),
                "chosen": verdict.chosen,
                "gain": score.scores(held_out).loc[verdict.best, "gain"],
                "erm": results.evaluate(erm, sets)["worst_group"],
                "worst_group": results.evaluate(network, sets)["worst_group"],
            }
        )
    return rows


if __name__ == "__main__":
    import lengths  # its functions have this name in the other processes, too

    runs = [(*kind, SEED) for kind in KINDS]
    resume("lengths.csv", registered.KEY, runs, lengths.run)
