"""How fast are saliency maps? Against torchcam, grad-cam, and a bare forward pass."""

import argparse

import pandas as pd
import torch
from common import alternate, base_model_alone, gflops, machine, work
from pytorch_grad_cam import XGradCAM as GradCamXGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torchcam.methods import XGradCAM

from masktune_utils import datasets, metrics, saliency, store
from masktune_utils.settings import Settings


def torchcam_batches(model, split, batch_size):
    """Torchcam in batches, otherwise as its documentation shows."""
    with XGradCAM(model, model.get_grad_cam_target_layer()) as extractor:
        for index in torch.arange(len(split)).split(batch_size):
            images, labels = split.batch(index)
            extractor(labels.tolist(), model(images))


def grad_cam_batches(model, split, batch_size):
    """Grad-cam in batches; it gives maps of the images' size."""
    with GradCamXGradCAM(
        model=model, target_layers=[model.get_grad_cam_target_layer()]
    ) as extractor:
        for index in torch.arange(len(split)).split(batch_size):
            images, labels = split.batch(index)
            extractor(
                input_tensor=images,
                targets=[ClassifierOutputTarget(label) for label in labels.tolist()],
            )


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
        model = store.load_checkpoint(path).model
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
            f"grad-cam, batches of {size}": lambda: grad_cam_batches(
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
