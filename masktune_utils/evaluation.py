"""How well a model does: predictions, and their metrics by class and by group."""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktune_utils import data, models, shortcuts, store
from masktune_utils.settings import DataSettings


@torch.no_grad()
def predict(model: nn.Module, dataset: data.ImageSet, batch_size: int = 100) -> Tensor:
    """Logits in evaluation mode, N×classes, float32 on the CPU.

    Args:
        model: its mode is restored.
        dataset: a `data.Split` or a `masking.MaskedDataset`, on the model's device.
        batch_size: images at a time; it changes nothing but the speed.
    """
    was_training = model.training
    model.eval()
    try:
        logits = []
        for index in torch.arange(len(dataset)).split(batch_size):
            images, _ = dataset.batch(index)
            logits.append(model(images))
    finally:
        model.train(was_training)
    return torch.cat(logits).cpu()


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of predictions on one test set, as plain numbers.

    Args:
        logits: N×classes, N > 0.
        labels: N.

    Returns:
        `loss` (mean cross-entropy), `accuracy`, `class_accuracy` (one per class; NaN
        for a class without images), `confusion_matrix` (rows: true class, columns:
        predicted class), and macro-averaged `precision`, `recall` and `f1` as in
        scikit-learn (0 where undefined).
    """
    from sklearn.metrics import (  # slow
        confusion_matrix,
        precision_recall_fscore_support,
    )

    classes = range(logits.shape[1])
    labels = labels.cpu()
    true = labels.numpy()
    predicted = logits.argmax(1).numpy()
    precision, recall, f1, _ = precision_recall_fscore_support(
        true, predicted, labels=classes, average="macro", zero_division=0
    )
    confusion = torch.from_numpy(confusion_matrix(true, predicted, labels=classes))
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": confusion.trace().item() / len(labels),
        "class_accuracy": (confusion.diagonal().double() / confusion.sum(1)).tolist(),
        "confusion_matrix": confusion.tolist(),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """N, bool, on the CPU: whether the predicted class is that of the image.

    Args:
        logits: N×classes, see `predict`.
        labels: N, on any device.
    """
    return logits.argmax(1) == labels.cpu()


def accuracy(logits: Tensor, labels: Tensor) -> float:
    """Accuracy of predictions, in [0, 1]; see `is_right`."""
    return is_right(logits, labels).double().mean().item()


def worst_class(logits: Tensor, labels: Tensor) -> float:
    """The smallest accuracy of a class that has images, in [0, 1]; see `is_right`."""
    labels = labels.cpu()
    right = is_right(logits, labels).double()
    return min(right[labels == label].mean().item() for label in labels.unique())


def group_accuracy(logits: Tensor, split: data.Split) -> dict[str, float]:
    """Accuracy of each group that has images, see `shortcuts.groups`.

    Args:
        logits: N×classes.
        split: the images.
    """
    right = is_right(logits, split.labels).double()
    members = shortcuts.groups(split)
    return {name: right[index].mean().item() for name, index in members.items()}


def evaluate(model: nn.Module, sets: shortcuts.BiasedSets) -> dict[str, Any]:
    """All metrics on the test sets, and on what is held out of training, if anything.

    Returns:
        `raw` and `biased`, or `test`, and `validation`: see `metrics`; also their
        `worst_class`; their `groups`, see `group_accuracy`; and `worst_group`, the
        smallest of these.
        Besides, `groups` and `worst_group` over both test sets together, whose images
        of class 0 are the same.
    """
    raw_logits = predict(model, sets.raw)
    report = {}
    groups = {}
    for name, split in sets.tests.items():
        logits = raw_logits
        if name == "biased":  # only some images of class 1 differ from the raw ones
            is_changed = (sets.biased.images != sets.raw.images).flatten(1).any(1)
            logits = raw_logits.clone()
            logits[is_changed.cpu()] = predict(model, sets.biased[is_changed])
        report[name] = _of_split(logits, split)
        groups.update(report[name]["groups"])
    if len(sets.validation):
        logits = predict(model, sets.validation)
        report["validation"] = _of_split(logits, sets.validation)
    report["groups"] = groups
    report["worst_group"] = min(groups.values())
    return report


def _of_split(logits: Tensor, split: data.Split) -> dict[str, Any]:
    groups = group_accuracy(logits, split)
    report = metrics(logits, split.labels)
    report["worst_class"] = worst_class(logits, split.labels)
    report["groups"] = groups
    report["worst_group"] = min(groups.values())
    return report


def evaluate_checkpoint(
    path: str | Path, dataset: str = "auto", device: str = "auto"
) -> dict:
    """Metrics of a saved model on the test sets of its images.

    Args:
        path: a checkpoint of this project, or a plain state dict of a SmallCNN.
        dataset: the images to test on. The shortcut is the checkpoint's own, else a
            blue 6×6 square.
        device: see `models.resolve_device`.

    Returns:
        See `evaluate`.

    Raises:
        CheckpointError: the file is damaged, foreign, or made from other images or for
            another number of classes.
        FileNotFoundError: no such file, or no such images.
        ValueError: an unknown data set or device.
    """
    dataset = data.resolve_dataset(dataset)
    checkpoint = store.load_checkpoint(path, device=models.resolve_device(device))
    source = checkpoint.settings.get("dataset", dataset)
    if source != dataset:
        raise store.CheckpointError(
            f"{path} was trained on {source!r}; use dataset={source!r}."
        )
    values = {"dataset": dataset, "device": device}
    of_images = DataSettings.model_fields.keys() - {"limit", "validation_share", "half"}
    for name in of_images & checkpoint.settings.keys():
        values[name] = checkpoint.settings[name]
    sets = shortcuts.load(DataSettings(**values))
    outputs = predict(checkpoint.model, sets.raw[:1]).shape[1]
    num_classes = len(sets.raw.labels.unique())
    if outputs != num_classes:
        raise store.CheckpointError(
            f"{path} tells {outputs} classes apart; the images have {num_classes}."
        )
    return evaluate(checkpoint.model, sets)
