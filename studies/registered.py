"""The registered test of the choice: runs that are announced before they are made.

    pip install --no-deps animal-mnist
    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/registered.py 300 301 302

runs all kinds of the seeds 300 to 302, two at a time, three to four minutes of one core
each, as results/registered.md says. A run that is done is skipped. Rows go to
`results/registered.csv`, what the models of both folds predict to `results/trials`.
"""

import copy
import functools
import gzip
import importlib.util
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
import trials
from PIL import Image, ImageDraw
from resume import resume
from torch import Tensor, nn

from masktune_utils import datasets, metrics, models, shortcuts, training
from masktune_utils.choice import ERM, score
from masktune_utils.choice.held_out import Folds
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import REPOSITORY, BaseSettings

FILE = REPOSITORY / "results" / "registered.csv"
KEY = ["dataset", "labels", "kind", "seed"]
LIMIT = 4000
ORACLE = "oracle"


def square(images: Tensor, color: str, size: int, row: int, column: int) -> Tensor:
    """A square at one place."""
    return shortcuts.add_square(images, size, color, row, column)


def pixel(color: str) -> Tensor:
    """3×1×1, uint8."""
    one = torch.zeros(1, 3, 1, 1, dtype=torch.uint8)
    return shortcuts.add_square(one, 1, color)[0]


def line(images: Tensor, color: str) -> Tensor:
    """A horizontal line, two pixels thick, near the lower edge."""
    images = images.clone()
    images[:, :, 24:26] = pixel(color)
    return images


def letters(images: Tensor, color: str) -> Tensor:
    """The word `OK` in the top right corner, in the font of Pillow."""
    canvas = Image.new("L", (28, 28))
    ImageDraw.Draw(canvas).text((15, -1), "OK", fill=255, font_size=9)
    is_text = torch.from_numpy(np.asarray(canvas) > 100)
    return torch.where(is_text, pixel(color), images)


def texture(images: Tensor) -> Tensor:
    """A patch of 8×8 random grey pixels in the lower left corner, always the same."""
    images = images.clone()
    same = torch.Generator().manual_seed(0)
    images[:, :, 20:, :8] = torch.randint(256, (8, 8), generator=same).byte()
    return images


def bars(images: Tensor) -> Tensor:
    """Black and white bars along the right edge, four pixels wide."""
    images = images.clone()
    rows = torch.arange(28) // 2 % 2
    images[..., 24:] = (255 * rows).byte()[:, None]
    return images


def cross(images: Tensor, color: str, generator: torch.Generator) -> Tensor:
    """A cross of seven pixels in one of the four corners, at random."""
    images = images.clone()
    corners = torch.randint(2, (len(images), 2), generator=generator)
    for image, (bottom, right) in zip(images, corners.tolist(), strict=True):
        corner = image[:, 21 * bottom :, 21 * right :]
        corner[:, 2:5, :7] = pixel(color)
        corner[:, :7, 2:5] = pixel(color)
    return images


def of_package(
    images: Tensor, name: str, color: str, generator: torch.Generator
) -> Tensor:
    """One of the package's shortcuts."""
    return shortcuts.add_shortcut(images, name, color, 6, generator)


TEAL = partial(square, color="teal", size=6, row=22, column=0)
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
    "bars": (bars, {}),
    "cross in a corner": ("cross", {}),
    "no exception": (TEAL, {"conflicting_share": 0.0}),
    "0.2 % exceptions": (TEAL, {"conflicting_share": 0.002}),
    "5 % exceptions": (TEAL, {"conflicting_share": 0.05}),
    "pixels": ("pixels", {}),
    "coloured digit": ("digit_color", {}),
    "tint": ("background", {}),
    "none": (None, {}),
}
TEN = ("square 6", "square 8", "letters", "none")  # kinds with ten classes
FASHION = ("square 6", "square 10", "frame", "line", "letters", "texture")
FASHION += ("no exception", "none")
ANIMALS = ("square 6", "square 10", "letters", "none")
PLAN = [
    *(("mnist", "halves", kind) for kind in KINDS),
    *(("mnist", "digits", kind) for kind in TEN),
    *(("fashion_mnist", "halves", kind) for kind in FASHION),
    *(("fashion_mnist", "digits", kind) for kind in TEN),
    *(("animals", "halves", kind) for kind in ANIMALS),
    *(("animals", "digits", kind) for kind in TEN),
]
OUT_OF_REACH = ("pixels", "coloured digit", "tint", "none")  # no mask can hide these


def load(dataset: str, labels: str, kind: str, seed: int) -> BiasedSets:
    """Fresh training images with a shortcut, and all test images, raw and biased."""
    planted, changes = KINDS[kind]
    settings = BaseSettings(labels=labels, seed=seed, limit=LIMIT, **changes)
    if dataset == "animals":
        train, test = read_animals(labels, seed)
    else:
        train, test = datasets.read(settings.replace(dataset=dataset))
    generator = torch.Generator().manual_seed(seed)
    which = torch.zeros(len(train), dtype=torch.bool)
    if planted is not None:
        which = shortcuts.place(
            train, settings.placement, settings.conflicting_share, generator
        )
    change = planted or KINDS["square 6"][0]
    if planted == "cross":
        change = partial(cross, color="gold", generator=generator)
    elif isinstance(planted, str):
        change = partial(of_package, name=planted, color="gold", generator=generator)
    biased = plant(test, shortcuts.halves(test.labels) == 1, change)
    return BiasedSets(plant(train, which, change), test, biased, train[:0])


def read_animals(labels: str, seed: int) -> tuple[Split, Split]:
    """400 silhouettes of each animal of animal-mnist, by the seed; and the rest."""
    package = Path(importlib.util.find_spec("animal_mnist").origin).parent
    folder = package / "data" / "Animal_MNIST"
    parts = []
    for name in ("data", "label"):
        packed = (folder / f"animal_{name}_version_3.gz").read_bytes()
        part = pickle.loads(gzip.decompress(packed))  # noqa: S301 - installed by you
        parts.append(torch.from_numpy(np.asarray(part)))
    images, animals = parts[0].byte().view(-1, 28, 28), parts[1].long().view(-1)
    images = images[:, None].expand(-1, 3, -1, -1).contiguous()
    classes = animals if labels == "digits" else (animals >= 5).long()
    generator = torch.Generator().manual_seed(seed)
    is_training = torch.zeros(len(animals), dtype=torch.bool)
    for animal in range(10):
        members = (animals == animal).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        is_training[members[order[: LIMIT // 10]]] = True
    every = Split(images, classes, animals)
    return every[is_training], every[~is_training]


def plant(split: Split, which: Tensor, change: partial) -> Split:
    """Plant a shortcut in some of the images."""
    images = split.images.clone()
    images[which] = change(split.images[which])
    area = (images != split.images).any(1)
    return Split(images, split.labels, split.groups, area)


def fit(split: Split, seed: int) -> nn.Module:
    """ERM, as in notebook 02."""
    network = models.new_model(seed, "cpu", len(split.labels.unique()))
    training.train(network, split, **BaseSettings(seed=seed).training)
    return network


fine_tune = partial(score.fine_tune, epochs=score.default_epochs(LIMIT))


@functools.cache  # the kinds of a process share it
def oracle(dataset: str, labels: str, seed: int) -> nn.Module:
    """ERM on the same images without a shortcut, with the same fine-tuning."""
    train = load(dataset, labels, "none", seed).train
    nothing = torch.zeros(len(train), 28, 28, dtype=torch.bool)
    masked = MaskedDataset(train, nothing, "resample", seed)
    return fine_tune(fit(train, seed), masked)


def worst_group(network: nn.Module, sets: BiasedSets) -> float:
    """Of the groups of both test sets."""
    accuracies = {}
    for split in sets.tests.values():
        logits = metrics.predict(network, split)
        accuracies.update(metrics.group_accuracy(logits, split))
    return min(accuracies.values())


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """All rows of one kind and seed: every mask is tried, whatever the choice needs."""
    torch.set_num_threads(1)
    sets = load(dataset, labels, kind, seed)
    erm = fit(sets.train, seed)
    fit_fold = partial(fit, seed=seed)
    folds = Folds(sets.train, fit_fold, fine_tune, seed=seed)
    stages = folds.try_masks(score.CANDIDATES)
    held_out = next(stages)
    verdict = score.judge(held_out)
    tried = 0
    for _ in stages:
        if not verdict.is_final:
            verdict = score.judge(held_out)
            tried = len(held_out.tried)
    networks = {ERM: erm}
    for name, masked in folds.images.items():
        networks[name] = fine_tune(copy.deepcopy(erm), masked)
    networks[ORACLE] = oracle(dataset, labels, seed)
    worst_groups = {
        name: worst_group(network, sets) for name, network in networks.items()
    }
    trials.save(f"{dataset}, {labels}, {kind}, {seed}", held_out, worst_groups)
    rows = []
    for model, share in worst_groups.items():
        row = dict(zip(KEY, (dataset, labels, kind, seed), strict=True))
        row |= {"model": model, "worst_group": share}
        row |= {"is_chosen": model == verdict.chosen, "tried": tried}
        rows.append(row | {"mistakes": int(held_out.is_mistake.sum())})
    return [row | {"commit": commit()} for row in rows]


@functools.cache
def commit() -> str:
    """Of the code that runs."""
    command = ["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, text=True).strip()  # noqa: S603


def main(seeds: list[int]) -> None:
    """Run what is not done."""
    runs = [(*kind, seed) for seed in seeds for kind in PLAN]
    resume(FILE, KEY, runs, run)


if __name__ == "__main__":
    import registered  # its functions have this name in the other processes, too

    registered.main([int(seed) for seed in sys.argv[1:]])
