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
    """Accuracy of each group that has images, see `shortcuts.groups`.

    Args:
        logits: N×classes.
        split: the images.
    """
    correct = (logits.argmax(1) == split.labels.cpu()).double()
    return {name: correct[index].mean().item() for name, index in shortcuts.groups(split).items()}


def evaluate(model: nn.Module, sets: shortcuts.BiasedSets) -> dict[str, Any]:
    """All metrics on the test sets, and on what is held out of the training set, if anything is.

    Returns:
        `raw` and `biased`, or `test`, and `validation`: see `metrics`; also their `groups`, see
        `group_accuracy`, and `worst_group`, the smallest of these. Besides, `groups` and
        `worst_group` over both test sets together, whose images of class 0 are the same.
    """
    report, groups, raw = {}, {}, predict(model, sets.raw)
    for name, split in (sets.tests | {"validation": sets.validation}).items():
        if len(split):
            logits = raw.clone() if name in sets.tests else predict(model, split)
            if name == "biased":  # the images of class 0 are the same
                changed = (split.images != sets.raw.images).flatten(1).any(1)
                logits[changed.cpu()] = predict(model, split[changed])
            own = group_accuracy(logits, split)
            report[name] = metrics(logits, split.labels) | {"groups": own}
            report[name]["worst_group"] = min(own.values())
            groups |= own if name in sets.tests else {}
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
    if (source := recorded.get("dataset", dataset)) != dataset:
        raise store.CheckpointError(f"{path} was trained on {source!r}; use dataset={source!r}.")
    ours = recorded.keys() & DataSettings.__pydantic_fields__.keys() - {"limit", "validation_share"}
    own = {name: recorded[name] for name in ours} | {"dataset": dataset, "device": device}
    return evaluate(model, shortcuts.load(DataSettings(**own)))


def summarize(
    table: pd.DataFrame, by: Sequence = ("configuration",), shares: Sequence = ("test", *ACCURACIES)
) -> pd.DataFrame:
    """Shares in %, one row per group of rows; with several seeds, mean ± sample standard deviation.

    Args:
        table: see `store.collect`.
        by: columns that tell the rows apart.
        shares: names of the columns that are summarized, where there is anything in them.

    Returns:
        The `shares`, with blanks in their names, and `seeds`, as text.
    """
    columns = [name for name in shares if name in table and table[name].notna().any()]
    groups = table.groupby(list(by), sort=False, dropna=False)[columns]
    mean, std = 100 * groups.mean(), 100 * groups.std()
    text = mean.map("{:.2f}".format).where(mean.notna(), "")
    text += std.map(" ± {:.2f}".format).where(std.notna(), "")
    return text.assign(seeds=groups.size()).rename(columns=lambda name: name.replace("_", " "))
