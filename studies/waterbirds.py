"""Waterbirds (Sagawa et al., 2020): birds on land or water, from the published files.

    python studies/waterbirds.py FOLDER --seeds 0 1 2 --network resnet50 --weights

makes the rows that are missing in `results/waterbirds.csv`, two runs at a time. FOLDER
is the unpacked `waterbird_complete95_forest2water2` of
https://github.com/kohpangwei/group_DRO. **It has not been run on these files:** they
cannot be had where this was written. It was tried on small folders of their layout.

A row for each model: ERM; `nothing masked`, fine-tuned like the next two on the images
as they are; `place hidden`, if the audit of validation images finds a place; `chosen`,
what `choose` makes of training images (ERM, if it takes no mask); JTT (Liu et al.,
2021). ERM is trained as in photographs.py, with one setting for all models, none of
which is picked by validation images: the published numbers are no comparison.

Groups are for reports only. But both places are equally frequent among the validation
and test images of a class, and they are not among those of training: an audit is told
more mistakes than by images that are held out from training. And the shortcut is all
around the bird: it may be no place.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from PIL import Image
from resume import resume
from torch import Tensor, nn
from torchvision.models import get_model
from torchvision.transforms.v2 import CenterCrop, Compose, Normalize, Resize
from torchvision.transforms.v2.functional import pil_to_tensor

from masktune_utils import metrics, models, progress, training
from masktune_utils.choice import ERM, NULL, audit, choose
from masktune_utils.choice.exchange import name_ninth
from masktune_utils.data import Split

KEY = ["network", "weights", "size", "epochs", "seed"]
CLASSES = ("landbird", "waterbird")
GROUPS = tuple(f"{bird}, {place}" for bird in CLASSES for place in ("land", "water"))
VALUES = {"y": [0, 1], "place": [0, 1], "split": [0, 1, 2]}  # each of them occurs
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
# Of JTT on Waterbirds: 60 of 300 epochs, and 100 times.
SHORT = 0.2
FACTOR = 100


class Waterbirds(NamedTuple):
    """The three sets of images."""

    train: Split
    validation: Split
    test: Split


def read_table(folder: str | Path) -> pd.DataFrame:
    """The table of all images, `metadata.csv`.

    Raises:
        FileNotFoundError: it is not in the folder, or one of its images is not.
        ValueError: a column is missing, or does not have the values of `VALUES`.
    """
    folder = Path(folder).expanduser()
    path = folder / "metadata.csv"
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no {path}; allowed: the unpacked folder of Waterbirds, with "
            "metadata.csv and the images that it names."
        )
    table = pd.read_csv(path)
    needed = ["img_filename", *VALUES]
    missing = [name for name in needed if name not in table]
    if missing:
        raise ValueError(f"{path} has no {missing}; allowed: the columns {needed}.")
    for name, allowed in VALUES.items():
        values = sorted(table[name].unique().tolist())
        if values != allowed:
            raise ValueError(
                f"{name} is {values} in {path}; allowed: all of {allowed}."
            )
    missing = [name for name in table["img_filename"] if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(table)} images are not in {folder}, as "
            f"{missing[:3]}; allowed: all that metadata.csv names."
        )
    return table


def load(folder: str | Path, size: int) -> Waterbirds:
    """All images, in the order of the table.

    As in the published code without augmentation, an image is resized to a square,
    whatever its shape, of 256/224 of the size, of which the centre is kept.

    Args:
        folder: with `metadata.csv`.
        size: pixels of a side.

    Raises:
        FileNotFoundError: see `read_table`.
        ValueError: see `read_table`.
    """
    table = read_table(folder)
    larger = int(size * 256 / 224)
    fit_in = Compose([Resize((larger, larger)), CenterCrop(size)])

    def read(name: str) -> Tensor:
        with Image.open(Path(folder).expanduser() / name) as image:
            return pil_to_tensor(fit_in(image.convert("RGB")))

    splits = []
    for number in VALUES["split"]:
        rows = table[table["split"] == number]
        names = progress.bar(rows["img_filename"].tolist(), desc="reading images")
        images = torch.stack([read(name) for name in names])
        labels, places = torch.tensor(rows[["y", "place"]].to_numpy()).T.contiguous()
        groups = 2 * labels + places
        split = Split(images, labels, groups, group_names=GROUPS, class_names=CLASSES)
        splits.append(split)
    return Waterbirds(*splits)


def new_network(name: str, weights: bool, seed: int) -> nn.Module:
    """A ResNet of torchvision for two classes, with weights of ImageNet or without."""
    torch.manual_seed(seed)
    network = get_model(name, weights="DEFAULT" if weights else None)
    network.fc = nn.Linear(network.fc.in_features, 2)
    return nn.Sequential(NORMALIZE, network)


def upweighted(train: Split, is_mistake: Tensor) -> Split:
    """The images, and mistakes `FACTOR` times, as JTT repeats them."""
    times = 1 + (FACTOR - 1) * is_mistake.long()
    return train[torch.arange(len(train)).repeat_interleave(times)]


def accuracies(model: nn.Module, test: Split) -> dict[str, float]:
    """Of the worst group, and of all test images."""
    logits = metrics.predict(model, test)
    return {
        "worst_group": min(metrics.group_accuracy(logits, test).values()),
        "mean": metrics.is_right(logits, test.labels).double().mean().item(),
    }


def compare(sets: Waterbirds, fit: Callable[..., nn.Module], seed: int) -> list[dict]:
    """A row for each model.

    Args:
        sets: test images with groups.
        fit: ERM, as `choose` takes it; it may start with pretrained weights.
        seed: of random choices.
    """
    train = sets.train
    erm = fit(train)
    found = audit(erm, sets.validation, seed)
    choice = choose(train, fit, seed=seed, early=0)  # it may be pretrained
    short = fit(train, SHORT)
    is_mistake = ~metrics.is_right(metrics.predict(short, train), train.labels)
    nothing = choice.held_out.masked[NULL]
    made = {ERM: erm, "nothing masked": choice.schedule(copy.deepcopy(erm), nothing)}
    if found.found_by:
        made["place hidden"] = found.hide(train, seed=seed).finetune(erm)
    made["chosen"] = choice.finetune(erm)
    made["JTT"] = fit(upweighted(train, is_mistake))

    outcome = {"found_by": found.found_by, "place": "", "region": 0, "estimate": ""}
    if found.found_by:
        outcome["place"] = name_ninth(found.region)
        outcome["region"] = found.region.float().mean().item()
        outcome["estimate"] = found.class_swaps.worst
    outcome["chosen"] = choice.verdict.chosen
    outcome["jtt_mistakes"] = int(is_mistake.sum())
    return [
        {"model": name, **accuracies(model, sets.test), **outcome}
        for name, model in made.items()
    ]


def run(
    folder: str | Path, network: str, weights: bool, size: int, epochs: int, seed: int
) -> list[dict]:
    """A row for each model."""

    def fit(images: Split, share: float = 1.0) -> nn.Module:
        model = new_network(network, weights, seed).to(models.resolve_device())
        count = max(1, round(share * epochs))
        training.train(model, images, epochs=count, batch_size=32, seed=seed)
        return model

    return compare(load(folder, size), fit, seed)


if __name__ == "__main__":
    import waterbirds  # its functions have this name in the other processes, too

    parser = argparse.ArgumentParser()
    parser.add_argument("folder", help="with metadata.csv")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--network", default="resnet18", help="a ResNet of torchvision")
    parser.add_argument("--weights", action="store_true", help="of ImageNet")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--size", type=int, default=96, help="pixels of a side")
    given = parser.parse_args()
    setting = (given.network, given.weights, given.size, given.epochs)
    runs = [(*setting, seed) for seed in given.seeds]
    resume("waterbirds.csv", KEY, runs, partial(waterbirds.run, given.folder))
