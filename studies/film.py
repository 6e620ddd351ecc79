"""The film of README: eight test images over the steps of fine-tuning.

    MASKTUNE_DATA=… python studies/film.py

writes `figures/film.gif` and its first and last pictures, `figures/film.png`, in two
minutes, from the saved base model and choice of the full MNIST, seed 0. The steps are
those of `chosen.fine_tune` (one epoch, batches of 32, a rate that falls from 0.02 to
0) in float32, so the weights are not those of the saved model.
"""

import copy
import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR

from masktune_utils import datasets, experiment, plotting, results
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.settings import REPOSITORY, Settings

SHOWN = [0, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1200]
FIGURES = REPOSITORY / "figures"


def frame(
    network: nn.Module,
    sets: BiasedSets,
    eight: Split,
    words: str,
) -> Image:
    """What the network predicts for the eight images, and its worst group below."""
    worst_group = 100 * results.evaluate(network, sets)["worst_group"]
    print(words, f"{worst_group:.2f}")
    figure = plotting.predictions({"": network}, eight)
    figure.set_size_inches(9, 2.0)
    figure.set_layout_engine("constrained", rect=(0, 0.2, 1, 0.8))
    ax = figure.add_axes((0.3, 0.07, 0.4, 0.07))
    ax.barh(0, worst_group, color="#0072B2")
    ax.set(xlim=(0, 100), xticks=[], yticks=[])
    options = {
        "transform": ax.transAxes,
        "va": "center",
        "fontsize": 10,
    }
    ax.text(-0.02, 0.5, words, ha="right", **options)
    ax.text(1.02, 0.5, f"worst group {worst_group:.0f}%", ha="left", **options)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


def main() -> None:
    settings = Settings(dataset="mnist")
    sets = datasets.load(settings)
    eight = datasets.eight(settings)
    base = experiment.base_model(settings, sets.train)
    masked = experiment.choose_mask(base).masked
    network = copy.deepcopy(base.model).train()
    sgd = SGD(network.parameters(), 0.02, 0.9, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(settings.seed)
    batches = torch.randperm(len(masked), generator=rng).split(32)
    scheduler = LinearLR(sgd, 1, 0, len(batches))
    frames = []
    for step, index in enumerate(batches):
        if step in SHOWN:
            words = f"step {step:,}" if step else "before (ERM)"
            frames.append(frame(network, sets, eight, words))
        images, labels = masked.batch(index)
        loss = F.cross_entropy(network(images), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        scheduler.step()
    frames.append(frame(network, sets, eight, f"after {len(batches):,} steps"))
    still = Image.fromarray(np.vstack([frames[0], frames[-1]]))
    still.save(FIGURES / "film.png", optimize=True)
    first, *others = [picture.quantize(200) for picture in frames]
    first.save(
        FIGURES / "film.gif",
        save_all=True,
        append_images=others,
        duration=[2500, *[350] * (len(others) - 1), 4000],
        loop=0,
    )


if __name__ == "__main__":
    main()
