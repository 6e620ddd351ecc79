"""How well a model does on the raw and on the biased test set, by class and by group."""

import math
from collections.abc import Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from masktune_utils import data, experiment, masking, progress, saliency, training
from masktune_utils.experiment import Settings
from masktune_utils.masking import MaskedDataset
from masktune_utils.models import SmallCNN

KEY = ["experiment", "configuration", "seed"]  # what tells one result from all others
RESULT = {*KEY, "sha256", "base_sha256", "settings", "raw", "biased", "worst_group", "seconds", "device", "threads"}
RESULT |= {"versions"}
REFERENCE = data.REPOSITORY / "results" / "reference.csv"


@torch.no_grad()
def predict(model: nn.Module, split: training.Batches, batch_size: int = 200) -> Tensor:
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

    Raises:
        ValueError: for no images, another number of labels, or a label without a logit.
    """
    from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support  # slow to import

    classes = list(range(logits.shape[1]))
    labels = labels.cpu()
    if len(logits) != len(labels) or not len(labels):
        raise ValueError(
            f"{len(logits)} predictions and {len(labels)} labels; allowed: one an image, of 1 image or more."
        )
    if labels.min() < 0 or labels.max() >= len(classes):
        raise ValueError(f"labels are {labels.min()} to {labels.max()}; allowed: 0 to {len(classes) - 1}.")
    pair = labels.numpy(), logits.argmax(1).numpy()
    confusion = confusion_matrix(*pair, labels=classes)
    precision, recall, f1, _ = precision_recall_fscore_support(*pair, labels=classes, average="macro", zero_division=0)
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": float(accuracy_score(*pair)),
        "class_accuracy": [float(row[k] / row.sum()) if row.sum() else math.nan for k, row in enumerate(confusion)],
        "confusion_matrix": confusion.tolist(),
        "precision": float(precision),
        "recall": float(recall),
        "f1": float(f1),
    }


def group_accuracy(correct: Tensor, labels: Tensor, has_square: Tensor) -> dict[str, float]:
    """Accuracy of each group class × square that has images, see `data.groups`.

    Args:
        correct: N, bool.
        labels: N.
        has_square: N, bool.
    """
    groups = data.groups(labels, has_square)
    return {name: correct[index].double().mean().item() for name, index in groups.items()}


def evaluate(model: nn.Module, splits: data.BiasedMNIST) -> dict[str, Any]:
    """All metrics on both test sets.

    Returns:
        `raw` and `biased`, see `metrics`; `groups`, see `group_accuracy`, over both test sets together; `worst_group`,
        the smallest of them. Where images are held out, all of this on them is `validation`.
    """
    tests = {"raw": splits.raw, "biased": splits.biased}
    logits = {name: predict(model, split) for name, split in tests.items()}
    report = {name: metrics(logits[name], split.labels) for name, split in tests.items()}
    report |= _groups(torch.cat(list(logits.values())), list(tests.values()))
    if len(splits.validation):
        logits = predict(model, splits.validation)
        report["validation"] = metrics(logits, splits.validation.labels) | _groups(logits, [splits.validation])
    return report


def _groups(logits: Tensor, splits: list[data.Split]) -> dict[str, Any]:
    labels = torch.cat([split.labels for split in splits]).cpu()
    has_square = torch.cat([split.has_square for split in splits]).cpu()
    groups = group_accuracy(logits.argmax(1) == labels, labels, has_square)
    return {"groups": groups, "worst_group": min(groups.values())}


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
    device, dataset = training.resolve_device(device), data.resolve_dataset(dataset)
    model, checkpoint = experiment.load_checkpoint(path, device=device, dataset=dataset)
    made_with = checkpoint.get("settings", {})
    names = ("square_size", "square_color", "train_folder", "test_folder")
    splits = data.load(dataset, device=device, **{name: made_with[name] for name in names if name in made_with})
    return evaluate(model, splits)


def masked_validation(settings: Settings, images: int = 2000) -> pd.DataFrame:
    """Let every fine-tuned model of an experiment be tested on validation images masked by the rules of all of them.

    A model that relies on what one of the rules hides is found out, and no group label is asked.

    Args:
        settings: the experiment, with `holdout`; those of fine-tuning do not matter.
        images: of the held-out ones, so many at most.

    Returns:
        Accuracy of the worse class, in [0, 1]; a row a model, a column a rule, both named by the configuration.

    Raises:
        CheckpointError: a checkpoint there is damaged, foreign, or made with other settings.
        FileNotFoundError: there is no base model.
    """
    device, folder = training.resolve_device(settings.device), settings.folder("checkpoints")
    identity = settings.identity(base=True)
    base, about = experiment.load_checkpoint(settings.checkpoint_path("base"), identity, device)
    identity |= {"base_sha256": about["sha256"]}
    split = experiment.load_data(settings).validation[:images]
    maps = cache(lambda cam: saliency.saliency_maps(base, split.images, split.labels, cam))
    models, rules = {}, {}
    for path in sorted(folder.glob("CNN_checkpoint_finetuned_*.pth")):
        model, about = experiment.load_checkpoint(path, identity, device)
        made_with = {name: value for name, value in about["settings"].items() if name != "base_sha256"}
        configuration = Settings(**made_with).configuration
        models[configuration] = model
        rules[configuration] = masking.mask_dataset(split, maps(made_with["cam"]), **Settings(**made_with).mask_rule)
    accuracy = {
        rule: {
            name: min(metrics(predict(model, masked), masked.labels)["class_accuracy"])
            for name, model in models.items()
        }
        for rule, masked in progress.bar(rules.items(), desc="masked validation", unit="rule")
    }
    return pd.DataFrame(accuracy)


def recorded(settings: Settings, *, base: bool = False) -> dict[str, Any] | None:
    """The saved result of the base model or of the fine-tuned one, if it is still that of these settings.

    Args:
        settings: the experiment.
        base: which of the two models.

    Returns:
        See `record`; None where there is no result, no checkpoint, or one from another base model.
    """
    name = "base" if base else settings.configuration
    result = experiment.read_json(settings.folder("results") / f"{name}.json")
    if (
        result is None
        or not settings.checkpoint_path(name).exists()
        or experiment.differences(result.get("settings", {}), settings.identity(base=base))
    ):
        return None
    if not base:
        parent = recorded(settings, base=True)
        return result if parent and parent.get("sha256") == result.get("base_sha256") else None
    return result


def record(
    settings: Settings,
    model: SmallCNN,
    splits: data.BiasedMNIST,
    history: list[dict[str, float]],
    base: SmallCNN | None = None,
    masked: MaskedDataset | None = None,
) -> dict[str, Any]:
    """Evaluate a model of the experiment and save the result; where that of the same weights is saved, it is only read.

    Args:
        settings: the experiment.
        model: the base model or the fine-tuned one.
        splits: the data.
        history: of its training; if it was just trained, its result is made anew in any case.
        base: the base model of a fine-tuned one.
        masked: what a fine-tuned one was trained on (in the first iteration).

    Returns:
        See `evaluate`; besides, `experiment`, `configuration`, `dataset`, `seed`, `settings`, `sha256` of the weights and
        `base_sha256` of the base model's, `hidden` (see `masking.hidden_shares`), `seconds` of training (None where it
        was loaded), `device`, `threads` and `versions`.
    """
    saved, sha256 = recorded(settings, base=base is None), experiment.weights_sha256(model.state_dict())
    trained_now = all("seconds" in epoch for epoch in history)
    if saved and saved.get("sha256") == sha256 and not trained_now:
        return saved
    name = settings.configuration if base else "base"
    result = {
        "experiment": settings.experiment,
        "configuration": name,
        "dataset": splits.dataset,
        "seed": settings.seed,
        "settings": settings.identity(base=base is None),
        "sha256": sha256,
        "base_sha256": experiment.weights_sha256(base.state_dict()) if base else sha256,
        "seconds": sum(epoch["seconds"] for epoch in history) if trained_now else None,
        "device": training.describe_device(splits.train.labels.device),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "torchvision", "torchcam")},
        **evaluate(model, splits),
    }
    if masked is not None:
        result["hidden"] = masking.hidden_shares(masked, settings.square_size)
    experiment.write_json(settings.folder("results") / f"{name}.json", result)
    return result


def collect(directory: str = "", reference: bool = False) -> pd.DataFrame:
    """Gather all saved results into a table, and write it as `results/results.csv`.

    A result whose base model has been replaced since is left out.

    Args:
        directory: as `Settings.directory`.
        reference: return the rows of the committed reference run as well, where the directory has none of its own.

    Returns:
        One row a result: `experiment`, `configuration` and `seed`, which tell it from all others; `raw`, `biased`,
        `worst_group` and `{raw,biased}_class_{0,1,…}`, accuracies in [0, 1], and, where images were held out,
        `validation_worst_class` and `validation_worst_group`; the shares hidden, `hidden_{square,square_whole,rest,digit}`;
        `seconds`, `device`, `threads`, `torch`; and its settings. The base models come first.

    Raises:
        ValueError: a JSON file there is damaged or not a result.
    """
    root = data.REPOSITORY / directory / "results"
    results = {path: experiment.read_json(path) for path in sorted(root.rglob("*.json"))}
    for path, result in results.items():
        if missing := RESULT - set(result):
            raise ValueError(
                f"{path} is not a result of this project: it has no {', '.join(sorted(missing))}. Remove it."
            )
    bases = {path.parent: result["sha256"] for path, result in results.items() if path.stem == "base"}
    rows = [_row(result) for path, result in results.items() if result["base_sha256"] == bases.get(path.parent)]
    table = pd.DataFrame(rows, columns=None if rows else KEY)
    table = table.sort_values(KEY, key=_base_first, ignore_index=True)
    with experiment.atomic_write(root / "results.csv") as file:
        table.to_csv(file, index=False)
    if reference:
        table = pd.concat([table, pd.read_csv(REFERENCE)]).drop_duplicates(KEY)
        table = table.sort_values(KEY, key=_base_first, ignore_index=True)
    return table


def _base_first(column: pd.Series) -> pd.Series:
    return column.replace("base", "") if column.name == "configuration" else column


def _row(result: dict[str, Any]) -> dict[str, Any]:
    row = {name: result[name] for name in ("experiment", "configuration", "seed")}
    row |= {test: result[test]["accuracy"] for test in ("raw", "biased")} | {"worst_group": result["worst_group"]}
    for test in ("raw", "biased"):
        row |= {f"{test}_class_{label}": value for label, value in enumerate(result[test]["class_accuracy"])}
    if held_out := result.get("validation"):
        row |= {
            "validation_worst_class": min(held_out["class_accuracy"]),
            "validation_worst_group": held_out["worst_group"],
        }
    row |= {f"hidden_{part}": share for part, share in result.get("hidden", {}).items()}
    row |= {name: result[name] for name in ("seconds", "device", "threads")} | {"torch": result["versions"]["torch"]}
    return row | result["settings"]


def summarize(
    table: pd.DataFrame, by: Sequence[str] = (), columns: Sequence[str] = ("raw", "biased", "worst_group")
) -> pd.DataFrame:
    """Shares in %, a row a configuration; where there are several seeds as mean ± standard deviation (of the sample).

    Args:
        table: see `collect`.
        by: columns that tell the rows apart; if empty, the configuration, and the experiment where there are several.
        columns: what is summarized.

    Returns:
        The `columns`, with blanks in their names, and `seeds`, as text.
    """
    by = list(by) or (["experiment", "configuration"] if table["experiment"].nunique() > 1 else ["configuration"])
    groups = table.groupby(by, sort=False, dropna=False)[list(columns)]
    mean, std, seeds = 100 * groups.mean(), 100 * groups.std(), groups.size()
    text = mean.map("{:.2f}".format).where(mean.notna(), "") + std.map(" ± {:.2f}".format).where(std.notna(), "")
    return text.assign(seeds=seeds).rename(columns=lambda name: name.replace("_", " "))
