"""The models of an experiment, their saliency maps and results: loaded if they are saved, else made."""

import contextlib
import copy
import dataclasses
import itertools
import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masktune_utils import data, evaluation, masking, models, saliency, store, training
from masktune_utils.settings import DEFAULTS, Settings
from masktune_utils.shortcuts import BiasedSets

Made = tuple[nn.Module, dict[str, Any]]  # a model, and what made it


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Make a notebook's parameters into settings, right after its cell of parameters.

    Papermill only warns of a parameter that the notebook does not have; here it is refused.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        ValueError: see `Settings`; or an unknown parameter.
    """
    for cell, injected in itertools.pairwise(filter(None, namespace["In"])):
        known, given = (re.findall(r"^(\w+) =", text, re.MULTILINE) for text in (cell, injected))
        unknown = [name for name in given if name not in known]
        if injected.startswith("# Parameters\n") and unknown:
            raise ValueError(f"{unknown[0]} is not a parameter; allowed: {', '.join(known)}.")
    settings = Settings(**{name: namespace[name] for name in DEFAULTS if name in namespace})
    settings = dataclasses.replace(settings, dataset=data.resolve_dataset(settings.dataset))
    if "model" in namespace:
        models.check(settings.image_size, **settings.network)
    print(f"Images: {settings.dataset}. Device: {models.resolve_device(settings.device)}.")
    return settings


def base_model(settings: Settings, train: data.Split, retrain: bool = False) -> Made:
    """The ERM model.

    Args:
        settings: the experiment.
        train: the biased training set.
        retrain: train and save it again in any case.

    Returns:
        The model, in evaluation mode; and what made it, see `store.load_checkpoint`, with the
        `seconds` of training if it was trained now.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings.
    """
    given = settings.seed, train.labels.device, len(train.labels.unique())
    model = models.new_model(*given, **settings.network)
    path, identity = settings.checkpoint_path("base"), settings.identity(base=True)
    return _load_or_train(path, identity, retrain, model, train, **settings.training)


def finetuned_model(
    settings: Settings, base: nn.Module, masked: masking.MaskedDataset, retrain: bool = False
) -> Made:
    """The base model after ONE epoch on the masked images (MaskTune).

    With several `iterations`, there is one epoch for each. Later ones mask the images by the maps
    of the model before, and train that model further. With `restart`, the maps are those of the
    masked images, and the base model is trained anew.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        masked: the masked training set, of the first iteration.
        retrain: fine-tune and save it again in any case.

    Returns:
        See `base_model`; and `masked`, the masked training set of the last iteration.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings or from
            another base model.
    """
    start, path = base, settings.checkpoint_path(settings.configuration)
    if settings.iterations > 1:
        split, several = masked.split, settings.iterations > 2  # a first one has none before it
        kept = {name: getattr(settings, name) and several for name in ("accumulate", "restart")}
        before = dataclasses.replace(settings, iterations=settings.iterations - 1, **kept)
        earlier, about = finetuned_model(before, base, masked, retrain)
        explained = about["masked"] if settings.restart else split
        with warnings.catch_warnings(action="ignore"):  # of maps that are zero
            maps = saliency.saliency_maps(earlier, explained.images, split.labels, settings.cam)
        hidden = about["masked"] if settings.accumulate else None
        masked = masking.mask_dataset(split, maps, **settings.mask_rule, earlier=hidden)
        start = base if settings.restart else earlier
    model, identity = copy.deepcopy(start), settings.identity(base=False)
    identity |= {"base_sha256": store.weights_sha256(base.state_dict())}
    model, about = _load_or_train(path, identity, retrain, model, masked, **settings.finetuning)
    return model, about | {"masked": masked}


def _load_or_train(
    path: Path, identity: dict, retrain: bool, model: nn.Module, dataset: Any, **options: Any
) -> Made:
    device, seconds = next(model.parameters()).device, None
    if retrain or not path.exists():
        history = training.train(model, dataset, **options)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, model, identity, history)
    model, about = store.load_checkpoint(path, identity, device)
    return model, about | {"seconds": seconds}


def training_saliency(settings: Settings, base: nn.Module, train: data.Split) -> Tensor:
    """Saliency maps of the training set, N×h×w; computed once per base model.

    Args:
        settings: the experiment.
        base: the ERM model.
        train: the biased training set.
    """
    path = settings.folder("checkpoints") / f"CNN_saliency_{settings.cam}.pth"
    sha256 = store.weights_sha256(base.state_dict())
    with contextlib.suppress(Exception):  # not there, damaged: it is made again
        saved = store.read_tensors(path)
        if saved["base_sha256"] == sha256 and len(saved["maps"]) == len(train):
            return saved["maps"].to(train.labels.device)
    maps = saliency.saliency_maps(base, train.images, train.labels, settings.cam)
    store.write_tensors(path, {"maps": maps.cpu(), "base_sha256": sha256})
    return maps


def record(settings: Settings, model: nn.Module, about: dict, sets: BiasedSets) -> dict[str, Any]:
    """Evaluate a model of the experiment, and save the result; or return what is saved of it.

    Args:
        settings: the experiment.
        model: the base model or the fine-tuned one.
        about: what `base_model` or `finetuned_model` returned with it.
        sets: the images.

    Returns:
        A row of the table of results: `experiment`, `configuration` and `seed`, which tell it from
        all others; the settings; `sha256` of the weights and `base_sha256` of the base model's;
        `seconds`, `threads`, `device`, `torch` of the training that made them, if known; `raw`
        and `biased`, or `test`; `worst_group` and `{raw,biased,test}_class_{0,1,…}`, accuracies in
        [0, 1]; `group {name}`, the same; if images are held out, `validation_worst_class` and
        `validation_worst_group`; for a fine-tuned model
        `hidden_{shortcut,shortcut_whole,rest,digit}`, see `masking.hidden_shares`. All of
        `evaluation.evaluate` is in `metrics`.
    """
    masked = about.get("masked")  # of a fine-tuned model
    name = settings.configuration if masked else "base"
    path = settings.folder("results") / f"{name}.json"
    how = {"seconds": about["seconds"], "threads": torch.get_num_threads()}
    how |= {"torch": torch.__version__, "device": models.describe_device(sets.train.labels.device)}
    before = store.read_result(path) if path.exists() else {"sha256": ""}
    if how["seconds"] is None and before["sha256"] == about["sha256"]:
        if settings.dataset != "folder":  # whose images may have changed
            return before
        how = {name: before.get(name) for name in how}  # of the training that made these weights
    report = evaluation.evaluate(model, sets)
    row = {"experiment": settings.experiment, "configuration": name}
    row |= settings.identity(base=not masked) | how | {"sha256": about["sha256"]}
    row["base_sha256"] = about["settings"].get("base_sha256", about["sha256"])
    row |= {"worst_group": report["worst_group"], "metrics": report}
    for test in sets.tests:
        row[test], shares = report[test]["accuracy"], report[test]["class_accuracy"]
        row |= {f"{test}_class_{label}": share for label, share in enumerate(shares)}
    row |= {f"group {name}": share for name, share in report["groups"].items()}
    if held_out := report.get("validation"):
        row["validation_worst_class"] = min(held_out["class_accuracy"])
        row["validation_worst_group"] = held_out["worst_group"]
    if masked:
        row |= {f"hidden_{part}": share for part, share in masking.hidden_shares(masked).items()}
    store.write_bytes(path, json.dumps(row, indent=1).encode())
    return row
