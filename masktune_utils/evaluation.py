"""How well a model does on the raw and on the biased test set, by class and by group."""

import math
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support
from torch import Tensor, nn

from masktune_utils import data, experiment, training
from masktune_utils.experiment import CheckpointError, Settings
from masktune_utils.models import SmallCNN


@torch.no_grad()
def predict(model: nn.Module, split: data.Split, batch_size: int = 1000) -> Tensor:
    """Logits, N×classes, float32 on the CPU, in evaluation mode; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        return torch.cat([model(split.batch(index)[0]) for index in torch.arange(len(split)).split(batch_size)]).cpu()
    finally:
        model.train(was_training)


def metrics(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of predictions on one test set, as plain numbers.

    Args:
        logits: N×classes.
        labels: N.

    Returns:
        `loss` (mean cross-entropy), `accuracy`, `class_accuracy` (one a class, NaN for a class without images),
        `confusion_matrix` (rows: true class, columns: predicted class), and macro-averaged `precision`, `recall` and
        `f1`, as in scikit-learn (0 where undefined).
    """
    classes = list(range(logits.shape[1]))
    labels = labels.cpu()
    predicted = logits.argmax(1)
    confusion = confusion_matrix(labels, predicted, labels=classes)
    precision, recall, f1, _ = precision_recall_fscore_support(
        labels, predicted, labels=classes, average="macro", zero_division=0
    )
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": float(accuracy_score(labels, predicted)),
        "class_accuracy": [float(row[k] / row.sum()) if row.sum() else math.nan for k, row in enumerate(confusion)],
        "confusion_matrix": confusion.tolist(),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def group_accuracy(correct: Tensor, labels: Tensor, has_square: Tensor) -> dict[str, float]:
    """Accuracy of each of the four groups class × square, NaN for an empty one.

    Args:
        correct: N, bool.
        labels: N.
        has_square: N, bool.
    """
    groups = {}
    for label in (0, 1):
        for square in (False, True):
            members = (labels == label) & (has_square == square)
            groups[f"class {label}, {'square' if square else 'no square'}"] = correct[members].double().mean().item()
    return groups


def evaluate(model: nn.Module, splits: data.BiasedMNIST) -> dict[str, Any]:
    """All metrics on both test sets.

    Returns:
        `raw` and `biased`, see `metrics`; `groups`, see `group_accuracy`, over both test sets together; `worst_group`,
        the smallest of the groups that have images.
    """
    tests = {"raw": splits.raw, "biased": splits.biased}
    logits = {name: predict(model, split) for name, split in tests.items()}
    report = {name: metrics(logits[name], split.labels) for name, split in tests.items()}
    labels = torch.cat([split.labels for split in tests.values()]).cpu()
    has_square = torch.cat([split.has_square for split in tests.values()]).cpu()
    groups = group_accuracy(torch.cat(list(logits.values())).argmax(1) == labels, labels, has_square)
    return report | {"groups": groups, "worst_group": min(value for value in groups.values() if not math.isnan(value))}


def evaluate_checkpoint(path: str | Path, dataset: str = "auto", device: str = "auto") -> dict[str, Any]:
    """Metrics of a saved model on both test sets.

    Args:
        path: a checkpoint of this project, or a plain state dict of a SmallCNN (with the same keys).
        dataset: the digits to test on, see `data.load`. The square is the checkpoint's own, else 6×6 and blue.
        device: see `training.resolve_device`.

    Returns:
        `{"raw": {"accuracy": …, …}, "biased": {…}, "groups": {…}, "worst_group": …}`, see `evaluate`.

    Raises:
        CheckpointError: the file is damaged, foreign, or made from other digits than those to test on.
        FileNotFoundError: no such file, or no such digits.
    """
    device = training.resolve_device(device)
    model, checkpoint = experiment.load_checkpoint(path, device=device)
    made_with = checkpoint.get("settings", {})
    square = {name: made_with[name] for name in ("square_size", "square_color") if name in made_with}
    splits = data.load(dataset, device=device, **square)
    if made_with and made_with["dataset"] != splits.dataset:
        raise CheckpointError(
            f"{path} was trained on {made_with['dataset']!r}, whose images may be among the test images of "
            f"{splits.dataset!r}; use dataset={made_with['dataset']!r}."
        )
    return evaluate(model, splits)


def record(settings: Settings, model: SmallCNN, splits: data.BiasedMNIST, *, base: bool = False) -> dict[str, Any]:
    """Evaluate a model of the experiment and write the result as JSON; a result of the same weights is only read.

    Args:
        settings: the experiment.
        model: the base model or the fine-tuned one.
        splits: the data.
        base: whether it is the base model.

    Returns:
        See `evaluate`; besides, `configuration`, `seed`, `dataset`, `settings` and the SHA-256 of the weights.
    """
    name = "base" if base else settings.configuration
    path = settings.folder("results") / f"{name}.json"
    about = {
        "configuration": name,
        "dataset": splits.dataset,
        "seed": settings.seed,
        "sha256": experiment.weights_sha256(model.state_dict()),
        "settings": settings.identity(base=base),
    }
    saved = experiment.read_json(path)
    if saved and all(saved.get(key) == value for key, value in about.items()):
        return saved
    result = about | evaluate(model, splits)
    experiment.write_json(path, result)
    return result


def collect(folder: Path) -> pd.DataFrame:
    """One row a saved result of a folder and all below it: configuration, seed, accuracies in [0, 1].

    Args:
        folder: for example `settings.folder("results")`, or its parent for all seeds.

    Returns:
        Columns `configuration`, `dataset`, `seed`, `raw`, `biased`, `worst_group`, and `{raw,biased}_class_{0,1}`; the
        base model first, then by name.
    """
    columns = ["configuration", "dataset", "seed", "worst_group"]
    rows = []
    for result in map(experiment.read_json, sorted(Path(folder).rglob("*.json"))):
        row = {key: result[key] for key in columns}
        for test in ("raw", "biased"):
            row |= {test: result[test]["accuracy"]}
            row |= {f"{test}_class_{label}": value for label, value in enumerate(result[test]["class_accuracy"])}
        rows.append(row)
    table = pd.DataFrame(rows, columns=None if rows else columns)
    return table.sort_values(["configuration", "seed"], key=lambda c: c.replace("base", ""), ignore_index=True)


def summarize(table: pd.DataFrame) -> pd.DataFrame:
    """Accuracies in %, a row a configuration; where there are several seeds as mean ± standard deviation (of the sample).

    Args:
        table: see `collect`.

    Returns:
        Columns `raw`, `biased`, `worst group` and `seeds`; text.
    """
    groups = table.groupby("configuration", sort=False)[["raw", "biased", "worst_group"]]
    mean, std, seeds = 100 * groups.mean(), 100 * groups.std(), groups.size()
    text = mean.map("{:.2f}".format) + std.map(" ± {:.2f}".format).where(std.notna(), "")
    return text.assign(seeds=seeds).rename(columns={"worst_group": "worst group"})
