"""Checks of the rule's last steps, on kinds that no mask can hide, and on others.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/registered_third.py 203 204 205

Announced in README.md before they were run, with all candidates of `choose`. Rows go to
`registered_third.csv`; four minutes of one core each.
"""

import sys

import registered
from resume import resume

from masktune_utils import selection
from masktune_utils.settings import REPOSITORY

FILE = REPOSITORY / "results" / "registered_third.csv"
PLAN = [
    *(("mnist", "halves", kind) for kind in registered.OUT_OF_REACH),
    ("mnist", "digits", "none"),
    ("fashion_mnist", "halves", "none"),
    ("fashion_mnist", "digits", "none"),
    # Announced later: these can be hidden.
    ("mnist", "halves", "square 6"),
    ("mnist", "halves", "square 12"),
    ("mnist", "halves", "frame"),
    ("mnist", "halves", "letters"),
    ("mnist", "halves", "no exception"),
    ("mnist", "digits", "square 8"),
    ("fashion_mnist", "halves", "square 10"),
    ("fashion_mnist", "halves", "letters"),
    ("fashion_mnist", "digits", "square 8"),
]
LATER = [  # with seeds 204 and 205
    ("mnist", "digits", "letters"),
    ("fashion_mnist", "halves", "no exception"),
    ("fashion_mnist", "digits", "square 6"),
    ("fashion_mnist", "digits", "letters"),
]
CANDIDATES = (*selection.CANDIDATES, selection.BY_EXCHANGE)


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """All rows of one kind and seed."""
    return registered.run(dataset, labels, kind, seed, CANDIDATES)


if __name__ == "__main__":
    import registered_third  # its function has this name in the other processes, too

    runs = []
    for seed in map(int, sys.argv[1:]):
        kinds = PLAN if seed == 203 else [*LATER, *PLAN]
        runs += [(*kind, seed) for kind in kinds]
    resume(FILE, registered.KEY, runs, registered_third.run)
