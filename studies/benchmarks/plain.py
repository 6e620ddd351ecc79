"""MaskTune as a one-file reproduction writes it.

One image at a time, all images in memory as floats, float32.
Run as a script it does one configuration from a base model, and prints the seconds of
each part.
"""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchcam.methods import XGradCAM

from masktune_utils import data, datasets, models
from masktune_utils.settings import Settings


def materialise(split: data.Split) -> list[tuple[torch.Tensor, int]]:
    """Every image as a float tensor of its own, with its label."""
    return [
        (image.contiguous() / 255, int(label))
        for image, label in zip(split.images, split.labels, strict=True)
    ]


def train(model: nn.Module, images: list, lr: float = 0.01) -> float:
    """One epoch by SGD; returns the mean loss."""
    model.train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4
    )
    total = 0.0
    for batch, labels in DataLoader(images, batch_size=128, shuffle=True):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        optimizer.step()
        total += loss.item() * len(labels)
    return total / len(images)


def saliency(model: nn.Module, images: list) -> list[torch.Tensor]:
    """The map, 8×8, of each image."""
    model.eval()
    maps = []
    with XGradCAM(model, model.get_grad_cam_target_layer()) as extractor:
        for image, label in images:
            scores = model(image.unsqueeze(0))
            maps.append(extractor(label, scores)[0].squeeze(0))
    return maps


def mask(images: list, maps: list[torch.Tensor], method: str, param: float) -> list:
    """Every image multiplied by 1 − mask."""
    masked = []
    for (image, label), saliency_map in zip(images, maps, strict=True):
        if method == "threshold":
            limit = param
        elif method == "top_k":
            limit = torch.quantile(saliency_map, 1 - param)
        else:
            limit = param * saliency_map.mean()
        hidden = F.interpolate(
            (saliency_map > limit).float()[None, None], size=(28, 28), mode="bilinear"
        )
        masked.append((image * (1 - hidden[0]), label))
    return masked


@torch.no_grad()
def accuracy(model: nn.Module, images: list) -> float:
    """Share of the images that are recognised."""
    model.eval()
    correct = 0
    for image, label in images:
        correct += int(model(image.unsqueeze(0)).argmax(1).item() == label)
    return correct / len(images)


def configuration(
    checkpoint: str, splits: datasets.BiasedSets, method: str, param: float
) -> dict[str, float]:
    """Mask, fine-tune and test; returns the seconds of each part."""
    seconds, started = {}, time.perf_counter()

    def lap(name: str) -> None:
        seconds[name] = time.perf_counter() - started - sum(seconds.values())

    model = models.SmallCNN()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    images = materialise(splits.train)
    lap("images")
    maps = saliency(model, images)
    lap("saliency")
    masked = mask(images, maps, method, param)
    lap("masks")
    train(model, masked, lr=0.0025)
    lap("one epoch")
    for split in (splits.raw, splits.biased):
        accuracy(model, materialise(split))
    lap("test")
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--limit", type=int, help="images to train on, a multiple of 10"
    )
    parser.add_argument("--method", default="top_k")
    parser.add_argument("--param", type=float, default=0.1)
    arguments = parser.parse_args()
    splits = datasets.load(Settings(dataset="mnist", limit=arguments.limit))
    checkpoint = Settings(dataset="mnist").checkpoint_path("base")
    for part, seconds in configuration(
        checkpoint, splits, arguments.method, arguments.param
    ).items():
        print(f"{part:12}{seconds:8.2f} s")
