"""How well the model of an experiment does on its test sets."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from masktune_utils import datasets, metrics, store
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import Settings


def evaluate(model: nn.Module, sets: BiasedSets) -> dict[str, Any]:
    """All metrics on the test sets.

    Returns:
        `raw` and `biased`: see `metrics.report`; `groups`: see
        `metrics.group_accuracy`, over both test sets together, whose low digits are
        the same; and `worst_group`, the smallest of these.
    """
    report = {}
    groups = {}
    for name, split in sets.tests.items():
        logits = metrics.predict(model, split)
        report[name] = metrics.report(logits, split.labels)
        groups.update(metrics.group_accuracy(logits, split))
    report["groups"] = groups
    report["worst_group"] = min(groups.values())
    return report


def evaluate_checkpoint(
    path: str | Path, dataset: str = "auto", device: str = "auto"
) -> dict:
    """Metrics of a saved model on the test sets of its images.

    Args:
        path: a checkpoint of this project, or a plain state dict of a SmallCNN.
        dataset: the images to test on; `auto`: those that the checkpoint names. The
            shortcut is the checkpoint's own, else a blue 6×6 square.
        device: see `store.resolve_device`.

    Returns:
        See `evaluate`.

    Raises:
        CheckpointError: the file is damaged, foreign, or made from other images.
        FileNotFoundError: no such file, or no such images.
        ValueError: an unknown data set or device.
    """
    checkpoint = store.load_checkpoint(path, device=store.resolve_device(device))
    source = checkpoint.settings.get("dataset", dataset)
    if dataset not in ("auto", source):
        raise store.CheckpointError(
            f"{path} was trained on {source!r}; use dataset={source!r}."
        )
    is_of_two = checkpoint.model.linear[-1].out_features == 2
    values = {"labels": "halves" if is_of_two else "digits", **checkpoint.settings}
    values.update(dataset=source, device=device)
    values.pop("base_sha256", None)  # of a fine-tuned model
    return evaluate(checkpoint.model, datasets.load(Settings(**values)))


def hidden_shares(dataset: MaskedDataset) -> dict[str, float]:
    """How much of the shortcut and of the rest is hidden, in images that have one.

    Args:
        dataset: the masked images.

    Returns:
        `shortcut`: mean share of the shortcut's area that is hidden; `shortcut_whole`:
        share of the images whose shortcut is hidden to more than 99 %; `rest`: mean
        share of the area outside; `digit`: mean share of the digit's ink (grey value
        outside the shortcut). All are NaN if no image has a shortcut. With `resample`,
        what is hidden is the union with the mask of the partner in the first epoch.
    """
    index = dataset.split.has_shortcut.nonzero()[:, 0]
    split = dataset.split[index]
    hidden = dataset.masks(index)
    inside = split.shortcut.float().expand_as(hidden)
    ink = split.images.sum(1, dtype=torch.float32) * (1 - inside)
    shares = {}
    for name, area in {"shortcut": inside, "rest": 1 - inside, "digit": ink}.items():
        shares[name] = (hidden * area).sum((1, 2)) / area.sum((1, 2))
    shares["shortcut_whole"] = (shares["shortcut"] > 0.99).float()
    # An image without any ink outside the shortcut has no share of it.
    return {name: values.nanmean().item() for name, values in shares.items()}
