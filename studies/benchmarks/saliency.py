"""How fast are saliency maps? Against torchcam, and a bare forward pass."""

import argparse

import pandas as pd
import torch
from common import alternate, base_model_alone, gflops, machine, work
from torchcam.methods import XGradCAM

from masktune_utils import datasets, experiment, metrics, saliency
from masktune_utils.settings import Settings


def torchcam_batches(model, split, batch_size):
    """Torchcam in batches, otherwise as its documentation shows."""
    with XGradCAM(model, model.get_grad_cam_target_layer()) as extractor:
        for index in torch.arange(len(split)).split(batch_size):
            images, labels = split.batch(index)
            extractor(labels.tolist(), model(images))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6000, help="of the training set")
    parser.add_argument(
        "--batch-size",
        type=int,
        default=200,
        help="of everything but torchcam one at a time",
    )
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    size = arguments.batch_size
    with base_model_alone() as directory:
        path = Settings(dataset="mnist", directory=directory).checkpoint_path("base")
        model = experiment.with_weights(path)
    split = datasets.load(Settings(dataset="mnist")).train[: arguments.images]
    seconds = alternate(
        {
            "forward pass": lambda: metrics.predict(model, split, size),
            "masktune_utils": lambda: saliency.saliency_maps(
                model, split.images, split.labels, batch_size=size
            ),
            f"torchcam, batches of {size}": lambda: torchcam_batches(
                model, split, size
            ),
            "torchcam, one at a time": lambda: torchcam_batches(model, split, 1),
        },
        arguments.repeats,
    )
    print(machine())
    print(
        f"{len(split)} images of the MNIST training set, median of {arguments.repeats}\n"
    )
    table = pd.DataFrame(
        {
            "images/s": len(split) / seconds,
            "× forward": seconds / seconds["forward pass"],
        }
    )
    table["× slower than ours"] = seconds / seconds["masktune_utils"]
    print(table.round(2).to_string())
    floor = work(backward=False)[0] * len(split) / gflops(torch.float32) / 1e9
    print(
        f"\nfloor of the forward pass, operations over measured float32 peak: {len(split) / floor:.0f} images/s"
    )


if __name__ == "__main__":
    main()
