"""Photographs: reading them, training against a bare loop, and what a choice costs."""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import alternate, machine
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18

from masktune_utils import training
from masktune_utils.choice import choose
from masktune_utils.data import Split

COUNT = 3000
SIDE = 96
EPOCHS = 5  # of ERM


def write_pictures(folder: Path) -> None:
    """PNG files of blocks and noise, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(COUNT):
        colors = rng.integers(0, 247, (8, 8, 3))
        blocks = np.kron(colors, np.ones((SIDE // 8, SIDE // 8, 1)))
        noise = rng.integers(0, 9, (SIDE, SIDE, 3))
        path = folder / f"{number % 2}" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray((blocks + noise).astype(np.uint8)).save(path)


def bare_epoch(model: torch.nn.Module, split: Split) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True
    )
    bfloat16 = training.has_bfloat16(split.labels.device)
    model.train()
    for index in torch.randperm(len(split)).split(64):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(split.images[index] / 255)
        loss = F.cross_entropy(logits.float(), split.labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def fit(images: Split, _share: float = 1.0) -> torch.nn.Module:
    """Three small convolutions."""
    blocks = []
    for channels, wider, stride in ((3, 32, 2), (32, 64, 2), (64, 128, 2)):
        blocks.append(torch.nn.Conv2d(channels, wider, 3, stride, 1))
        blocks += [torch.nn.BatchNorm2d(wider), torch.nn.ReLU()]
    pool = torch.nn.AdaptiveAvgPool2d(1)
    head = (pool, torch.nn.Flatten(), torch.nn.Linear(128, 2))
    network = torch.nn.Sequential(*blocks, *head)
    network.to(memory_format=torch.channels_last)
    training.train(network, images, epochs=EPOCHS, batch_size=32)
    return network


def cost(count: int) -> dict[str, float]:
    """Of ERM and of a choice, with a white square on 95 % of one class."""
    torch.manual_seed(0)
    images = torch.randint(0, 256, (count, 3, SIDE, SIDE), dtype=torch.uint8)
    labels = torch.arange(count) % 2
    is_exception = torch.rand(count) < 0.05
    images[(labels == 0) ^ is_exception, :, :12, :12] = 255
    split = Split(images, labels)
    began = time.perf_counter()
    fit(split)
    trained = time.perf_counter()
    choose(split, fit, early=0)
    chosen = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kB, on Linux
    times = {"ERM, s": trained - began, "choice, s": chosen - trained}
    return times | {"peak, GB": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        write_pictures(Path(folder))
        began = time.perf_counter()
        split = Split.from_dataset(ImageFolder(folder))
        seconds = time.perf_counter() - began
    print(f"reading {COUNT:,} PNG files of {SIDE}×{SIDE}: {seconds:.2f} s")
    few = split[:640]
    model = resnet18(num_classes=2)
    functions = {
        "bare loop": lambda: bare_epoch(model, few),
        "masktune_utils": lambda: training.train(model, few, epochs=1, batch_size=64),
    }
    seconds = alternate(functions, arguments.repeats)
    rows = {"images/s": len(few) / seconds, "share": seconds["bare loop"] / seconds}
    print(f"\nResNet-18 at {SIDE}×{SIDE}\n\n{pd.DataFrame(rows).round(2).to_string()}")
    costs = {count: cost(count) for count in (1000, 10_000)}
    print(
        f"\nthree convolutions at {SIDE}×{SIDE}\n\n{pd.DataFrame(costs).round(2).to_string()}"
    )


if __name__ == "__main__":
    main()
