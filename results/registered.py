"""The registered test: runs that registered.md announced before they were made.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python results/registered.py 100 101

runs all kinds of the seeds 100 and 101, two at a time, seven minutes of one core each.
A kind that is done is skipped. The tables of what came out are made by tables.py.
"""

import copy
import dataclasses
import functools
import sys
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from resume import resume
from torch import Tensor, nn

from masktune_utils import (
    data,
    datasets,
    evaluation,
    models,
    selection,
    shortcuts,
    training,
)
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import REPOSITORY, Settings

FILE = REPOSITORY / "results" / "registered.csv"
KEY = ["dataset", "labels", "kind", "seed"]
LIMIT = 4000
ALWAYS = f"{dataclasses.replace(selection.CANDIDATES[0], rounds=1)}"


def square(images: Tensor, color: str, size: int, row: int, column: int) -> Tensor:
    """A square at one place."""
    return shortcuts.add_square(images, size, color, row, column)


def line(images: Tensor, color: str) -> Tensor:
    """A horizontal line, two pixels thick, near the lower edge."""
    images = images.clone()
    pixel = shortcuts.add_square(images[:1, :, :1, :1], 1, color)
    images[:, :, 24:26] = pixel
    return images


def letters(images: Tensor, color: str) -> Tensor:
    """The word `OK` in the top right corner, in the font of Pillow."""
    canvas = Image.new("L", (28, 28))
    ImageDraw.Draw(canvas).text((15, -1), "OK", fill=255, font_size=9)
    is_text = torch.from_numpy(np.asarray(canvas) > 100)
    pixel = shortcuts.add_square(images[:1, :, :1, :1], 1, color)
    return torch.where(is_text, pixel, images)


def texture(images: Tensor) -> Tensor:
    """A patch of 8×8 random grey pixels in the lower left corner, always the same."""
    images = images.clone()
    same = torch.Generator().manual_seed(0)
    images[:, :, 20:, :8] = torch.randint(256, (8, 8), generator=same).byte()
    return images


def of_package(
    images: Tensor, name: str, color: str, generator: torch.Generator
) -> Tensor:
    """One of the package's shortcuts."""
    return shortcuts.SHORTCUTS[name](images, color, 6, generator)


# kind → what is planted, and what is not the default of `Settings`.
KINDS = {
    "square 4": (partial(square, color="orange", size=4, row=0, column=24), {}),
    "square 6": (partial(square, color="blue", size=6, row=0, column=0), {}),
    "square 8": (partial(square, color="purple", size=8, row=20, column=0), {}),
    "square 10": (partial(square, color="green", size=10, row=18, column=18), {}),
    "square 12": (partial(square, color="deeppink", size=12, row=0, column=16), {}),
    "ordered": (
        partial(square, color="cyan", size=6, row=22, column=22),
        {"placement": "ordered"},
    ),
    "two squares": ("two_squares", {}),
    "square anywhere": ("square_anywhere", {}),
    "frame": ("frame", {}),
    "line": (partial(line, color="lime"), {}),
    "letters": (partial(letters, color="red"), {}),
    "texture": (texture, {}),
    "no exception": (
        partial(square, color="teal", size=6, row=22, column=0),
        {"conflicting_share": 0.0},
    ),
    "0.2 % exceptions": (
        partial(square, color="teal", size=6, row=22, column=0),
        {"conflicting_share": 0.002},
    ),
    "5 % exceptions": (
        partial(square, color="teal", size=6, row=22, column=0),
        {"conflicting_share": 0.05},
    ),
    "pixels": ("pixels", {}),
    "coloured digit": ("digit_color", {}),
    "tint": ("background", {}),
    "none": (None, {}),
}
TEN = ("square 6", "square 8", "letters", "none")  # kinds with ten classes
FASHION = ("square 6", "square 10", "frame", "line", "letters", "texture")
FASHION += ("no exception", "none")
PLAN = [
    *(("mnist", "halves", kind) for kind in KINDS),
    *(("mnist", "digits", kind) for kind in TEN),
    *(("fashion_mnist", "halves", kind) for kind in FASHION),
    *(("fashion_mnist", "digits", kind) for kind in TEN),
]
OUT_OF_REACH = ("pixels", "coloured digit", "tint", "none")  # no mask can hide these


def load(dataset: str, labels: str, kind: str, seed: int) -> BiasedSets:
    """Fresh training images with a shortcut, and all test images, raw and biased."""
    planted, changes = KINDS[kind]
    settings = Settings(
        dataset=dataset, labels=labels, seed=seed, limit=LIMIT, **changes
    )
    train, test = datasets.read(settings)
    generator = torch.Generator().manual_seed(seed)
    which = torch.zeros(len(train), dtype=torch.bool)
    if planted is not None:
        which = shortcuts.place(
            train, settings.placement, settings.conflicting_share, generator
        )
    change = planted or KINDS["square 6"][0]
    if isinstance(planted, str):
        change = partial(of_package, name=planted, color="gold", generator=generator)
    biased = plant(test, shortcuts.halves(test.labels) == 1, change)
    return BiasedSets(plant(train, which, change), test, biased, train[:0])


def plant(split: Split, which: Tensor, change: partial) -> Split:
    """Plant a shortcut in some of the images."""
    images = split.images.clone()
    images[which] = change(split.images[which])
    area = (images != split.images).any(1)
    return Split(images, split.labels, split.groups, area)


def fit(split: Split, seed: int) -> nn.Module:
    """ERM, as in notebook 02."""
    network = models.new_model(seed, "cpu", len(split.labels.unique()))
    training.train(network, split, **Settings(seed=seed).training)
    return network


def fine_tune(network: nn.Module, masked: MaskedDataset) -> nn.Module:
    """The schedule of the choice, the same for all models."""
    schedule = selection.default_schedule(LIMIT, is_coarse=False)
    return selection.fine_tune(copy.deepcopy(network), masked, **schedule)


@functools.cache  # the kinds of a process share it
def oracle(dataset: str, labels: str, seed: int) -> nn.Module:
    """ERM on the same images without a shortcut, with the same fine-tuning."""
    train = load(dataset, labels, "none", seed).train
    nothing = torch.zeros(len(train), 28, 28, dtype=torch.bool)
    masked = MaskedDataset(train, nothing, "resample", seed)
    return fine_tune(fit(train, seed), masked)


def choose(train: Split, seed: int) -> tuple[selection.Choice, dict[str, Tensor]]:
    """The choice; and the masks of every candidate, and of nothing masked."""
    masks_of = {}  # rule, fold → masks of the images of the fold

    def fit_fold(fold: Split) -> nn.Module:
        return fit(fold, seed)

    def watched(network: nn.Module, masked: MaskedDataset) -> nn.Module:
        masks_of[masked.rule, masked.split.fold] = masked.own_masks
        return fine_tune(network, masked)

    choice = selection.choose(train, fit_fold, watched, seed=seed)
    order = torch.cat(data.folds(train.labels, seed)).argsort()
    masks = {}
    for candidate in (selection.NOTHING, *selection.CANDIDATES):
        latest = [None, None]  # a fold may end before the other
        for rounds in range(1, candidate.rounds + 1):
            rule = dataclasses.replace(candidate, rounds=rounds)
            latest = [masks_of.get((rule, fold), latest[fold]) for fold in (0, 1)]
            name = "null" if candidate is selection.NOTHING else f"{rule}"
            if name == "null" or name in choice.verdict.accuracy:
                masks[name] = torch.cat(latest)[order]
    return choice, masks


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """All rows of one kind and seed."""
    torch.set_num_threads(1)
    sets = load(dataset, labels, kind, seed)
    erm = fit(sets.train, seed)
    choice, masks = choose(sets.train, seed)
    chosen = choice.verdict.chosen.replace(selection.ERM, "erm")
    worst_groups = {"erm": evaluation.evaluate(erm, sets)["worst_group"]}
    for name, own_masks in masks.items():
        masked = MaskedDataset(sets.train, own_masks, "resample", seed)
        network = fine_tune(erm, masked)
        worst_groups[name] = evaluation.evaluate(network, sets)["worst_group"]

    candidates = [name for name in masks if name != "null"]
    drawn = np.random.default_rng(seed).choice(candidates)
    fitted_oracle = oracle(dataset, labels, seed)
    worst_groups["always"] = worst_groups[ALWAYS]
    worst_groups["random"] = worst_groups[drawn]
    worst_groups["oracle"] = evaluation.evaluate(fitted_oracle, sets)["worst_group"]
    rows = []
    for name, worst_group in worst_groups.items():
        row = dict(zip(KEY, (dataset, labels, kind, seed), strict=True))
        row |= {"model": name, "worst_group": worst_group, "is_chosen": name == chosen}
        rows.append(row)
    return rows


def main(seeds: list[int]) -> None:
    """Run what is not done."""
    runs = [(*kind, seed) for seed in seeds for kind in PLAN]
    resume(FILE, KEY, runs, run)


if __name__ == "__main__":
    import registered  # its functions have this name in the other processes, too

    registered.main([int(seed) for seed in sys.argv[1:]])
