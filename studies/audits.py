"""Does an audit find the shortcut? Kinds and seeds of registered.py.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/audits.py 400 401 402

makes the rows that are missing in `results/audits.csv`, two runs at a time, one minute
of one core each: ERM of 4,000 images is audited by 1,000 and by 300 other training
images, drawn like the former (their seed is 1,000 higher).
"""

import sys

import registered
import torch
from resume import resume
from torch import nn

from masktune_utils.choice import audit
from masktune_utils.data import Split

COUNTS = [1000, 300]


def measure(network: nn.Module, images: Split, seed: int) -> dict:
    """What an audit finds, and how much of the shortcut its region covers."""
    found = audit(network, images, seed)
    area = images.shortcut.float().mean(0)
    covered = (area * found.region).sum() / area.sum()
    return {
        "images": len(images),
        "mistakes": len(found.swaps.mistakes),
        "move": len(found.swaps.moving),
        "move_elsewhere": max(found.elsewhere),
        "stands_out": found.stands_out,
        "region": found.region.float().mean().item(),
        "shortcut_covered": covered.item(),
    }


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """A row for each number of images."""
    train = registered.load(dataset, labels, kind, seed).train
    network = registered.fit(train, seed)
    others = registered.load(dataset, labels, kind, seed + 1000).train
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    return [measure(network, others[order[:count]], seed) for count in COUNTS]


if __name__ == "__main__":
    import audits  # its functions have this name in the other processes, too

    runs = [(*kind, int(seed)) for seed in sys.argv[1:] for kind in registered.PLAN]
    resume("audits.csv", registered.KEY, runs, audits.run)
