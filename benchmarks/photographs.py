"""Photographs: decoding, training against a bare loop, and the growth of the memory."""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from common import alternate, machine
from PIL import Image

from masktune_utils import data, images, models, training


def generate(folder: Path, count: int, side: int) -> list[str]:
    """PNG files of blocks and noise."""
    rng, paths = (
        np.random.default_rng(0),
        [folder / f"{side}_{k}.png" for k in range(count)],
    )
    for path in paths:
        blocks = np.kron(
            rng.integers(0, 247, (8, 8, 3)), np.ones((side // 8, side // 8, 1))
        )
        noise = rng.integers(0, 9, (side, side, 3))
        Image.fromarray((blocks + noise).astype(np.uint8)).save(path)
    return [str(path) for path in paths]


def bare_epoch(
    model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor
) -> None:
    optimizer = torch.optim.SGD(
        model.parameters(), 0.01, 0.9, weight_decay=1e-4, fused=True
    )
    bfloat16 = training.has_bfloat16(labels.device)
    model.train()
    for index in torch.randperm(len(images)).split(64):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            logits = model(images[index] / 255)
        loss = F.cross_entropy(logits.float(), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def anonymous() -> float:
    """Memory of this process that is in no file, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = generate(folder, 3000, 96)
        began = time.perf_counter()
        pixels = images.decode(paths, 96, folder / "decoded")
        print(f"decoding 3,000 PNG files of 96×96: {time.perf_counter() - began:.2f} s")
        few, labels = pixels[:640], torch.arange(640) % 2
        model = models.new_model(0, name="resnet18")
        functions = {
            "bare loop": lambda: bare_epoch(model, few, labels),
            "masktune_utils": lambda: training.train(
                model, data.Split(few, labels), epochs=1, batch_size=64
            ),
        }
        seconds = alternate(functions, arguments.repeats)
        rows = {"images/s": len(few) / seconds, "share": seconds["bare loop"] / seconds}
        print(f"\nResNet-18 at 96×96\n\n{pd.DataFrame(rows).round(2).to_string()}\n")
        images.IN_MEMORY = data.IN_MEMORY = 0
        for count in (500, 1000, 2000):
            paths = generate(folder, count, 224)
            before = anonymous()
            split = data.Split(
                images.decode(paths, 224, folder / "decoded"), torch.arange(count)
            )
            for index in torch.arange(count).split(100):
                split.batch(index)
            grown = anonymous() - before
            print(
                f"{count} images of 224×224, {split.images.nbytes / 1e6:.0f} MB in a file:",
                end=" ",
            )
            print(f"{grown:.0f} MB of memory more")


if __name__ == "__main__":
    main()
