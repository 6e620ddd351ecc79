"""How well the model of an experiment does on its test sets."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masktune_utils import datasets, metrics, store
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import DataSettings


def evaluate(model: nn.Module, sets: BiasedSets) -> dict[str, Any]:
    """All metrics on the test sets, and on what is held out of training, if anything.

    Returns:
        `raw` and `biased`, or `test`, and `validation`: see `metrics.report`; also
        their `worst_class`; their `groups`, see `metrics.group_accuracy`; and
        `worst_group`, the smallest of these. Besides, `groups` and `worst_group` over
        both test sets together, whose images of class 0 are the same.
    """
    raw_logits = metrics.predict(model, sets.raw)
    report = {}
    groups = {}
    for name, split in sets.tests.items():
        logits = raw_logits
        if name == "biased":  # only some images of class 1 differ from the raw ones
            is_changed = (sets.biased.images != sets.raw.images).flatten(1).any(1)
            logits = raw_logits.clone()
            logits[is_changed.cpu()] = metrics.predict(model, sets.biased[is_changed])
        report[name] = _of_split(logits, split)
        groups.update(report[name]["groups"])
    if len(sets.validation):
        logits = metrics.predict(model, sets.validation)
        report["validation"] = _of_split(logits, sets.validation)
    report["groups"] = groups
    report["worst_group"] = min(groups.values())
    return report


def _of_split(logits: Tensor, split: Split) -> dict[str, Any]:
    groups = metrics.group_accuracy(logits, split)
    report = metrics.report(logits, split.labels)
    report["worst_class"] = metrics.worst_class(logits, split.labels)
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
        CheckpointError: the file is damaged, foreign, or made from other images or for
            another number of classes.
        FileNotFoundError: no such file, or no such images.
        ValueError: an unknown data set or device.
    """
    checkpoint = store.load_checkpoint(path, device=store.resolve_device(device))
    source = checkpoint.settings.get("dataset") or datasets.resolve_dataset(dataset)
    if dataset not in ("auto", source):
        raise store.CheckpointError(
            f"{path} was trained on {source!r}; use dataset={source!r}."
        )
    values = {"dataset": source, "device": device}
    of_images = DataSettings.model_fields.keys() - {"limit", "validation_share", "fold"}
    for name in of_images & checkpoint.settings.keys():
        values[name] = checkpoint.settings[name]
    sets = datasets.load(DataSettings(**values))
    outputs = metrics.predict(checkpoint.model, sets.raw[:1]).shape[1]
    num_classes = len(sets.raw.labels.unique())
    if outputs != num_classes:
        raise store.CheckpointError(
            f"{path} tells {outputs} classes apart; the images have {num_classes}."
        )
    return evaluate(checkpoint.model, sets)


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
    shares = {"shortcut": [], "rest": [], "digit": []}
    with_shortcut = dataset.split.has_shortcut.nonzero()[:, 0]
    for index in with_shortcut.split(1000):
        split = dataset.split[index]
        hidden = dataset.masks(index)
        inside = split.shortcut.float().expand_as(hidden)
        ink = split.images.sum(1, dtype=torch.float32) * (1 - inside)
        areas = {"shortcut": inside, "rest": 1 - inside, "digit": ink}
        for name, area in areas.items():
            hidden_area = (hidden * area).sum((1, 2))
            share = hidden_area / area.sum((1, 2))
            shares[name] += share.tolist()
    shares["shortcut_whole"] = [float(share > 0.99) for share in shares["shortcut"]]
    # An image without any ink outside the shortcut has no share of it.
    return {
        name: torch.tensor(values).nanmean().item() for name, values in shares.items()
    }
