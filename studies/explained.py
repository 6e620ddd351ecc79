"""Ten swaps of each mistake, kept one by one: what should count as explained?

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/explained.py 206 207 208 209
    python studies/rules.py

The first line runs kinds that are hard for a choice, of development seeds, two at a
time, two minutes of one core each; files go to `results/swaps` and its archive. They
hold what `registered.py` keeps, and for each mistake, mask and swap: is the image right
with the part of its partner (`leaves`), and is the partner mistaken for the same with
the part of the image (`comes`)? A worst group is the mean of those of the models of
both folds, on every third test image.
"""

import io
import sys
from functools import partial

import numpy as np
import registered
import torch
import trials
from resume import in_parallel
from torch import Tensor, nn

from masktune_utils.choice import score
from masktune_utils.choice.exchange import class_partners
from masktune_utils.choice.held_out import Folds
from masktune_utils.masking import MaskedDataset
from masktune_utils.metrics import predict
from masktune_utils.settings import REPOSITORY
from masktune_utils.store import write_bytes

FOLDER = REPOSITORY / "results" / "swaps"
SWAPS = 10
KINDS = [
    *(("mnist", "halves", kind) for kind in registered.OUT_OF_REACH),
    ("mnist", "halves", "square 6"),
    ("mnist", "halves", "square 12"),
    ("mnist", "halves", "frame"),
    ("mnist", "halves", "letters"),
    ("mnist", "halves", "no exception"),
    *(("mnist", "digits", kind) for kind in ("square 8", "letters", "none")),
    ("fashion_mnist", "halves", "square 10"),
    ("fashion_mnist", "halves", "letters"),
    ("fashion_mnist", "halves", "no exception"),
    ("fashion_mnist", "halves", "none"),
    *(("fashion_mnist", "digits", kind) for kind in registered.TEN),
]


def swap(
    judge: nn.Module, masked: MaskedDataset, predicted: Tensor, seed: int
) -> tuple[Tensor, Tensor]:
    """Of the mistakes of a judge: do they leave, and do they come? Each M×10."""
    labels = masked.labels
    generator = torch.Generator().manual_seed(seed)
    mistakes = (predicted != labels).nonzero()[:, 0]
    leaves = []
    comes = []
    for _ in range(SWAPS):
        partners = class_partners(labels, generator)[mistakes]
        swapped = predict(judge, masked.pairs(mistakes, partners))
        cut_out, pasted = swapped.argmax(1).chunk(2)
        leaves.append(cut_out == labels[mistakes])
        comes.append(pasted == predicted[mistakes])
    return torch.stack(leaves, 1), torch.stack(comes, 1)


def run(dataset: str, labels: str, kind: str, seed: int) -> None:
    """Save a run, unless it is there."""
    name = "_".join((dataset, labels, kind.replace(" ", "-"), str(seed)))
    path = FOLDER / f"{name}.npz"
    if path.exists():
        return
    torch.set_num_threads(1)
    sets = registered.load(dataset, labels, kind, seed)
    few = sets._replace(raw=sets.raw[::3], biased=sets.biased[::3])
    fit = partial(registered.fit, seed=seed)
    folds = Folds(sets.train, fit, registered.fine_tune, seed=seed)
    *_, held_out = folds.try_masks(score.CANDIDATES)
    worst_groups = []
    for pair in folds.tuned.values():
        shares = [registered.worst_group(network, few) for network in pair]
        worst_groups.append(sum(shares) / 2)
    leaves = []
    comes = []
    for mask in held_out.tried:
        swaps = [
            swap(judge, masked, predicted, seed)
            for judge, masked, predicted in zip(
                folds.judges, folds.masked[mask], folds.predicted, strict=True
            )
        ]
        leaves.append(torch.cat([of_fold[0] for of_fold in swaps]))
        comes.append(torch.cat([of_fold[1] for of_fold in swaps]))
    is_mistake = torch.cat(folds.predicted) != torch.cat(
        [part.labels for part in folds.parts]
    )
    buffer = io.BytesIO()
    np.savez_compressed(
        buffer,
        models=np.array([*folds.tuned]),
        labels=held_out.labels.numpy(),
        predictions=torch.stack([*held_out.predictions.values()], 1).numpy(),
        mistakes=folds.order.argsort()[is_mistake].numpy(),
        leaves=torch.stack(leaves, 1).numpy(),
        comes=torch.stack(comes, 1).numpy(),
        worst_groups=np.array(worst_groups),
    )
    write_bytes(path, buffer.getvalue())


if __name__ == "__main__":
    import explained  # its functions have this name in the other processes, too

    runs = [(*kind, seed) for seed in map(int, sys.argv[1:]) for kind in KINDS]
    for _ in in_parallel(explained.run, runs):
        pass
    trials.pack(FOLDER)
