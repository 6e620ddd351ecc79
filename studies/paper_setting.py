"""MaskTune in the setting of the authors' code, and how much each difference matters.

    python studies/paper_setting.py --seed 0 1 2

Their script (bash_files/mnist_masktune.sh of aliasgharkhani/Masktune) puts a red square
of 4 pixels in ordered placement, holds out 12,000 of the 60,000 training images, and
trains for 100 epochs at a constant rate. The masks come from the checkpoint with the
best accuracy on the held-out images, by maps for the class that it predicts. The last
checkpoint is fine-tuned, and SGD keeps its momentum. About 40 minutes a seed on one
core. Each seed adds its rows to reference_paper_setting.csv; one that is there is
skipped.
"""

import argparse
import copy

import pandas as pd
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from masktune_utils import (
    datasets,
    masking,
    metrics,
    models,
    results,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import REPOSITORY, Settings

EPOCHS = 100
FILE = REPOSITORY / "results" / "reference_paper_setting.csv"


def train_epoch(model: nn.Module, sgd: SGD, images: Split | MaskedDataset, rng) -> None:
    """One pass over the images in batches of 128."""
    model.train()
    for index in torch.randperm(len(images), generator=rng).split(128):
        batch, labels = images.batch(index)
        loss = F.cross_entropy(model(batch), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def predicted(model: nn.Module, images: Split) -> torch.Tensor:
    """The class that is predicted for each image."""
    return metrics.predict(model, images).argmax(1)


def run(seed: int) -> list[dict]:
    """The base models and the fine-tuned ones of a seed, a row each."""
    settings = Settings(
        dataset="mnist",
        seed=seed,
        square_size=4,
        square_color="red",
        placement="ordered",
        validation_share=0.2,
    )
    sets = datasets.load(settings)
    rows = []

    def add(name: str, model: nn.Module, hidden: float | None = None) -> None:
        report = results.evaluate(model, sets)
        row = {"model": name, "seed": seed}
        for accuracy in ("worst_group", "raw", "biased"):
            row[accuracy] = report[accuracy]
        rows.append(row | {"hidden_shortcut_whole": hidden})

    last = models.new_model(seed)
    sgd = SGD(last.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    rng = torch.Generator().manual_seed(seed)
    best_accuracy = 0.0
    for epoch in range(1, EPOCHS + 1):
        train_epoch(last, sgd, sets.train, rng)
        is_right = predicted(last, sets.validation) == sets.validation.labels
        accuracy = is_right.double().mean().item()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best = copy.deepcopy(last)
            best_epoch = epoch
        if epoch == 20:
            add("ERM, epoch 20", last)
    print(f"seed {seed}: the best checkpoint is that of epoch {best_epoch}", flush=True)
    add("ERM, best checkpoint", best)
    add("ERM, last checkpoint", last)

    def finetune(name: str, explained: nn.Module, labels: torch.Tensor, start) -> None:
        model, optimizer = copy.deepcopy(start)
        maps = saliency_maps(explained, sets.train.images, labels)
        masked = masking.mask_dataset(sets.train, maps, "mean_std", 2.0)
        order = torch.Generator().manual_seed(EPOCHS + seed)
        train_epoch(model, optimizer, masked, order)
        add(name, model, results.hidden_shares(masked)["shortcut_whole"])

    labels = sets.train.labels
    start = (last, sgd)
    new_sgd = SGD(last.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    finetune("the authors' code", best, predicted(best, sets.train), start)
    finetune("maps for the image's own class", best, labels, start)
    finetune("maps of the last checkpoint", last, predicted(last, sets.train), start)
    finetune("both", last, labels, start)
    finetune("both, momentum from zero", last, labels, (last, new_sgd))
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    for seed in parser.parse_args().seed:
        tables = [pd.read_csv(FILE)] if FILE.exists() else []
        if not any(seed in table["seed"].tolist() for table in tables):
            tables.append(pd.DataFrame(run(seed)))
            results.save_table(pd.concat(tables).round(6), FILE)
