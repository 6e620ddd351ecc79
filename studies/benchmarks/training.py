"""How long is an epoch? Against the plain loop.

That has a list of float tensors, a DataLoader, float32, and a loss read each step.
"""

import argparse
from unittest import mock

import pandas as pd
import plain
import torch
from common import alternate, bandwidth, gflops, machine, work

from masktune_utils import datasets, models, training
from masktune_utils.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--images",
        type=int,
        default=20_000,
        help="of the training set; the seconds are scaled to 60,000",
    )
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    split = datasets.load(Settings(dataset="mnist")).train[: arguments.images]
    images = plain.materialise(split)
    ours, plain_model = models.new_model(0), models.SmallCNN()

    def float32() -> None:
        with mock.patch.object(training, "has_bfloat16", lambda device: False):
            training.train(ours, split, epochs=1)

    functions = {
        "plain loop": lambda: plain.train(plain_model, images),
        "masktune_utils, float32": float32,
    }
    bfloat16 = training.has_bfloat16(torch.device("cpu"))
    if bfloat16:
        functions["masktune_utils, bfloat16"] = lambda: training.train(
            ours, split, epochs=1
        )
    seconds = alternate(functions, arguments.repeats) * 60_000 / len(split)
    print(machine())
    print(
        f"an epoch of 60,000 images, scaled from {len(split)}, median of {arguments.repeats}\n"
    )
    print(
        pd.DataFrame({"s/epoch": seconds, "× faster": seconds["plain loop"] / seconds})
        .round(2)
        .to_string()
    )
    operations, numbers = work(backward=True)
    for dtype, size in {torch.float32: 4, torch.bfloat16: 2}.items():
        compute = 60_000 * operations / gflops(dtype) / 1e9
        memory = (
            60_000 * 5 * size * numbers / bandwidth() / 1e9
        )  # each layer's output and its gradient: 3 reads, 2 writes
        print(
            f"floor, {dtype}: {compute:.1f} s of operations at measured peak, {memory:.1f} s of bytes"
        )


if __name__ == "__main__":
    main()
