"""How well a model does: metrics of predictions, by class and by group, and tables of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktune_utils import data, models, shortcuts, store
from masktune_utils.settings import DataSettings

ACCURACIES = ("raw", "biased", "worst_group")


@torch.no_grad()
def predict(model: nn.Module, dataset: Any, batch_size: int = 100) -> Tensor:
    """Logits in evaluation mode, N×classes, float32 on the CPU.

    Args:
        model: its mode is restored.
        dataset: a `data.Split` or a `masking.MaskedDataset`, on the model's device.
        batch_size: images at a time; it changes nothing but the speed.
    """
    was_training = model.training
    model.eval()
    logits = [model(dataset.batch(i)[0]) for i in torch.arange(len(dataset)).split(batch_size)]
    model.train(was_training)
    return torch.cat(logits).cpu()


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of predictions on one test set, as plain numbers.

    Args:
        logits: N×classes, N > 0.
        labels: N.

    Returns:
        `loss` (mean cross-entropy), `accuracy`, `class_accuracy` (one per class; NaN for a class
        without images), `confusion_matrix` (rows: true class, columns: predicted class), and
        macro-averaged `precision`, `recall` and `f1` as in scikit-learn (0 where undefined).
    """
    from sklearn.metrics import classification_report, confusion_matrix  # takes a second

    pair = labels.cpu().numpy(), logits.argmax(1).numpy()
    classes = range(logits.shape[1])
    options = {"labels": classes, "output_dict": True, "zero_division": 0}
    average = classification_report(*pair, **options)["macro avg"]
    confusion = torch.from_numpy(confusion_matrix(*pair, labels=classes))
    return {
        "loss": F.cross_entropy(logits, labels.cpu()).item(),
        "accuracy": confusion.trace().item() / len(labels),
        "class_accuracy": (confusion.diagonal().double() / confusion.sum(1)).tolist(),
        "confusion_matrix": confusion.tolist(),
    } | {name.removesuffix("-score"): average[name] for name in ("precision", "recall", "f1-score")}


def group_accuracy(logits: Tensor, split: data.Split) -> dict[str, float]:
    """Accuracy of each group class × shortcut that has images, see `shortcuts.groups`.

    Args:
        logits: N×classes.
        split: the images.
    """
    correct = (logits.argmax(1) == split.labels.cpu()).double()
    members = shortcuts.groups(split)
    return {name: correct[index].mean().item() for name, index in members.items()}


def evaluate(model: nn.Module, sets: shortcuts.BiasedSets) -> dict[str, Any]:
    """All metrics on both test sets, and on what is held out of the training set, if anything is.

    Returns:
        `raw`, `biased` and `validation`: see `metrics`; also their `groups`, see `group_accuracy`,
        and `worst_group`, the smallest of these. Besides, `groups` and `worst_group` over both test
        sets together, whose images of class 0 are the same.
    """
    report, raw = {}, predict(model, sets.raw)
    logits = {"raw": raw, "biased": raw.clone(), "validation": predict(model, sets.validation)}
    changed = (sets.biased.images != sets.raw.images).flatten(1).any(1)
    logits["biased"][changed.cpu()] = predict(model, sets.biased[changed])
    for name, predicted in logits.items():
        if len(split := getattr(sets, name)):
            groups = group_accuracy(predicted, split)
            report[name] = metrics(predicted, split.labels) | {"groups": groups}
            report[name]["worst_group"] = min(groups.values())
    groups = report["raw"]["groups"] | report["biased"]["groups"]
    return report | {"groups": groups, "worst_group": min(groups.values())}


def evaluate_checkpoint(path: str | Path, dataset: str = "auto", device: str = "auto") -> dict:
    """Metrics of a saved model on both test sets.

    Args:
        path: a checkpoint of this project, or a plain state dict of a SmallCNN.
        dataset: the images to test on. The square is the checkpoint's own, else 6×6 and blue.
        device: see `models.resolve_device`.

    Returns:
        See `evaluate`.

    Raises:
        CheckpointError: the file is damaged, foreign, or made from other images.
        FileNotFoundError: no such file, or no such images.
    """
    dataset, place = data.resolve_dataset(dataset), models.resolve_device(device)
    model, about = store.load_checkpoint(path, device=place)
    recorded = about["settings"]
    if (made_from := recorded.get("dataset", dataset)) != dataset:
        raise store.CheckpointError(
            f"{path} was trained on {made_from!r}; use dataset={made_from!r}."
        )
    names = "labels", "square_size", "square_color", "shortcut", "train_folder", "test_folder"
    square = {name: recorded[name] for name in names if name in recorded}
    return evaluate(model, shortcuts.load(DataSettings(dataset=dataset, device=device, **square)))


def summarize(
    table: pd.DataFrame, by: Sequence = ("configuration",), columns: Sequence = ACCURACIES
) -> pd.DataFrame:
    """Shares in %, one row per group of rows; with several seeds, mean ± sample standard deviation.

    Args:
        table: see `store.collect`.
        by: columns that tell the rows apart.
        columns: what is summarized.

    Returns:
        The `columns`, with blanks in their names, and `seeds`, as text.
    """
    groups = table.groupby(list(by), sort=False, dropna=False)[list(columns)]
    mean, std = 100 * groups.mean(), 100 * groups.std()
    text = mean.map("{:.2f}".format).where(mean.notna(), "")
    text += std.map(" ± {:.2f}".format).where(std.notna(), "")
    return text.assign(seeds=groups.size()).rename(columns=lambda name: name.replace("_", " "))
