"""The registered test of the choice: runs that are announced before they are made.

    pip install --no-deps animal-mnist
    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/registered.py 500 501 502

runs all kinds of the seeds 500 to 502, two at a time, three minutes of one core each,
as results/registered.md says. A run that is done is skipped. Rows go to
`results/registered.csv`, what the models of both folds predict to `results/trials`.
"""

import copy
import functools
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.resources import files

import numpy as np
import pandas as pd
import torch
import trials
from PIL import Image, ImageDraw
from resume import resume
from torch import Generator, Tensor, nn

from masktune_utils import datasets, models, results, shortcuts, training
from masktune_utils.choice import ERM, HeldOut, chosen, score
from masktune_utils.choice.chosen import CANDIDATES, EARLY
from masktune_utils.choice.exchange import FEW
from masktune_utils.choice.held_out import try_masks
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import REPOSITORY, BaseSettings

KEY = ["dataset", "labels", "kind", "seed"]
LIMIT = 4000
ORACLE = "oracle"
OTHERS = 1000  # images to audit by
SHARES = {"early": EARLY, "late": 1.0}  # of the training of halves


def square(size: int, color: str, row: int, column: int) -> Callable:
    """A square at one place."""
    return lambda images, _: shortcuts.add_square(images, size, color, row, column)


def of_package(name: str) -> Callable:
    """One of the package's shortcuts."""
    return lambda images, rng: shortcuts.SHORTCUTS[name](images, "gold", 6, rng)


def line(images: Tensor, _generator: Generator) -> Tensor:
    """A horizontal line, two pixels thick, near the lower edge."""
    images[:, :, 24:26] = shortcuts.pixel("lime")
    return images


def letters(images: Tensor, _generator: Generator) -> Tensor:
    """The word `OK` in the top right corner, in the font of Pillow."""
    canvas = Image.new("L", (28, 28))
    ImageDraw.Draw(canvas).text((15, -1), "OK", fill=255, font_size=9)
    is_text = torch.from_numpy(np.asarray(canvas) > 100)
    return torch.where(is_text, shortcuts.pixel("red"), images)


def texture(images: Tensor, _generator: Generator) -> Tensor:
    """A patch of 8×8 random grey pixels in the lower left corner, always the same."""
    same = Generator().manual_seed(0)
    images[:, :, 20:, :8] = torch.randint(256, (8, 8), generator=same).byte()
    return images


def bars(images: Tensor, _generator: Generator) -> Tensor:
    """Black and white bars along the right edge, four pixels wide."""
    rows = torch.arange(28) // 2 % 2
    images[..., 24:] = (255 * rows).byte()[:, None]
    return images


def cross(images: Tensor, generator: Generator) -> Tensor:
    """A cross of seven pixels in one of the four corners, at random."""
    corners = torch.randint(2, (len(images), 2), generator=generator)
    for image, (bottom, right) in zip(images, corners.tolist(), strict=True):
        corner = image[:, 21 * bottom :, 21 * right :]
        corner[:, 2:5, :7] = shortcuts.pixel("gold")
        corner[:, :7, 2:5] = shortcuts.pixel("gold")
    return images


TEAL = square(6, "teal", 22, 0)
PLANTED = {  # kind → what is planted in (a copy of images, generator)
    "square 4": square(4, "orange", 0, 24),
    "square 6": square(6, "blue", 0, 0),
    "square 8": square(8, "purple", 20, 0),
    "square 10": square(10, "green", 18, 18),
    "square 12": square(12, "deeppink", 0, 16),
    "ordered": square(6, "cyan", 22, 22),
    "two squares": of_package("two_squares"),
    "square anywhere": of_package("square_anywhere"),
    "frame": of_package("frame"),
    "line": line,
    "letters": letters,
    "texture": texture,
    "bars": bars,
    "cross in a corner": cross,
    "no exception": TEAL,
    "0.2 % exceptions": TEAL,
    "5 % exceptions": TEAL,
    "pixels": of_package("pixels"),
    "coloured digit": of_package("digit_color"),
    "tint": of_package("background"),
    "none": square(6, "blue", 0, 0),  # in test images alone
}
CHANGES = {  # kind → what is not the default of `Settings`
    "ordered": {"placement": "ordered"},
    "no exception": {"conflicting_share": 0.0},
    "0.2 % exceptions": {"conflicting_share": 0.002},
    "5 % exceptions": {"conflicting_share": 0.05},
    "none": {"shortcut": "none"},
}
TEN = ("square 6", "square 8", "letters", "none")  # kinds with ten classes
KINDS = {  # data set, labels → kinds
    ("mnist", "halves"): PLANTED,
    ("mnist", "digits"): TEN,
    ("fashion_mnist", "halves"): (
        "square 6",
        "square 10",
        "frame",
        "line",
        "letters",
        "texture",
        "no exception",
        "none",
    ),
    ("fashion_mnist", "digits"): TEN,
    ("animals", "halves"): ("square 6", "square 10", "letters", "none"),
    ("animals", "digits"): TEN,
}
PLAN = [(*images, kind) for images, kinds in KINDS.items() for kind in kinds]
OUT_OF_REACH = ("pixels", "coloured digit", "tint")  # no mask can hide these


def load(dataset: str, labels: str, kind: str, seed: int) -> BiasedSets:
    """Fresh training images with a shortcut, and all test images, raw and biased.

    The validation images are `OTHERS`, drawn like the training images.
    """
    settings = BaseSettings(labels=labels, **CHANGES.get(kind, {}))
    generator = seeded(seed)
    if dataset == "animals":
        every = read_animals(labels)
    else:
        every, test = datasets.read(settings.replace(dataset=dataset))
    drawn = draw(every.groups, LIMIT + OTHERS, seed)
    train = every[drawn[:, : LIMIT // 10].flatten()]
    others = every[drawn[:, LIMIT // 10 :].flatten()]
    if dataset == "animals":
        is_rest = torch.ones(len(every), dtype=torch.bool)
        is_rest[drawn] = False
        test = every[is_rest]
    is_upper = shortcuts.halves(test.labels).bool()

    def with_shortcut(split: Split) -> Split:
        which = split.has_shortcut  # of none, so far
        if settings.shortcut != "none":
            which = shortcuts.choose_images(
                split, settings.placement, settings.conflicting_share, generator
            )
        return plant(split, which, kind, generator)

    return BiasedSets(
        train=with_shortcut(train),
        raw=test,
        biased=plant(test, is_upper, kind, generator),
        validation=with_shortcut(others),
    )


def seeded(seed: int) -> Generator:
    """A source of random choices."""
    return Generator().manual_seed(seed)


def draw(groups: Tensor, count: int, seed: int) -> Tensor:
    """The index of images at random, equally many of each of ten groups, 10×…"""
    generator = seeded(seed)
    drawn = []
    for group in range(10):
        members = (groups == group).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        drawn.append(members[order[: count // 10]])
    return torch.stack(drawn)


@functools.cache
def read_animals(labels: str) -> Split:
    """All silhouettes of animal-mnist, 1,000 of each of ten animals."""
    folder = files("animal_mnist") / "data" / "Animal_MNIST"
    grey, animals = [
        torch.from_numpy(pd.read_pickle(folder / f"animal_{name}_version_3.gz"))  # noqa: S301
        for name in ("data", "label")
    ]
    images = grey[:, None].repeat(1, 3, 1, 1)
    classes = animals if labels == "digits" else shortcuts.halves(animals)
    return Split(images, classes, animals)


def plant(split: Split, which: Tensor, kind: str, generator: Generator) -> Split:
    """Plant a shortcut in some of the images."""
    images = split.images.clone()
    images[which] = PLANTED[kind](split.images[which], generator)
    area = (images != split.images).any(1)
    return Split(images, split.labels, split.groups, area)


def fit(split: Split, share: float = 1.0, seed: int = 0) -> nn.Module:
    """ERM, as in notebook 02, for a share of its 50 epochs."""
    network = models.new_model(seed, "cpu", len(split.labels.unique()))
    training.train(network, split, epochs=round(50 * share), seed=seed)
    return network


fine_tune = partial(chosen.fine_tune, epochs=chosen.default_epochs(LIMIT))


@functools.cache  # the kinds of a process share it
def oracle(dataset: str, labels: str, seed: int) -> nn.Module:
    """ERM on the same images without a shortcut, with the same fine-tuning."""
    train = load(dataset, labels, "none", seed).train
    nothing = torch.zeros(len(train), 28, 28)
    masked = MaskedDataset(train, nothing, "resample", seed)
    return fine_tune(fit(train, seed=seed), masked)


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """All rows of one kind and seed: every mask is tried, whatever the choice needs.

    By late halves only if early ones choose no mask.
    """
    sets = load(dataset, labels, kind, seed)
    erm = fit(sets.train, seed=seed)
    known = {ERM: erm, ORACLE: oracle(dataset, labels, seed)}
    worst_groups = {}
    for name, network in known.items():
        worst_groups["", name] = results.evaluate(network, sets)["worst_group"]
    tried = 0
    fit_half = partial(fit, seed=seed)
    for halves, share in SHARES.items():
        *_, held_out = try_masks(
            sets.train, fit_half, fine_tune, CANDIDATES, seed, share
        )
        for name, masked in held_out.masked.items():
            tuned = fine_tune(copy.deepcopy(erm), masked)
            worst_group = results.evaluate(tuned, sets)["worst_group"]
            worst_groups[halves, name] = worst_group
        of_models = {name: share for (_, name), share in worst_groups.items()}
        folder = "" if halves == "early" else f"{halves}/"
        run_name = f"{folder}{dataset}, {labels}, {kind}, {seed}"
        trials.save(run_name, held_out, of_models)
        verdict, count = decide(held_out)
        tried += count
        mistakes = held_out.is_mistake.sum().item()
        chosen_model = ("", ERM)
        if verdict.chosen != ERM:
            chosen_model = (halves, verdict.chosen)
            break
    return [
        {
            "halves": halves,
            "model": model,
            "worst_group": share,
            "is_chosen": (halves, model) == chosen_model,
            "tried": tried,
            "mistakes": mistakes,
            "commit": commit(),
        }
        for (halves, model), share in worst_groups.items()
    ]


def decide(held_out: HeldOut) -> tuple[score.Verdict, int]:
    """The verdict of a choice, which stops at a clear mask; and how many it tries."""
    tried = held_out.tried
    for count in range(1, len(tried) + 1):
        predictions = {
            model: classes
            for model, classes in held_out.predictions.items()
            if model not in tried[count:]
        }
        verdict = score.decide(replace(held_out, predictions=predictions))
        if verdict.is_final and held_out.is_mistake.sum() >= FEW:
            return verdict, count
    return score.decide(held_out), len(tried)


@functools.cache
def commit() -> str:
    """Of the code that runs."""
    command = ["git", "-C", REPOSITORY, "rev-parse", "--short", "HEAD"]
    return subprocess.check_output(command, text=True).strip()  # noqa: S603


if __name__ == "__main__":
    import registered  # its functions have this name in the other processes, too

    runs = [(*kind, int(seed)) for seed in sys.argv[1:] for kind in PLAN]
    resume("registered.csv", KEY, runs, registered.run)
