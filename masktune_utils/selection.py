"""Choosing among candidates by training images and their classes alone, without groups and test sets.

A model that relies on what some mask hides is found out on images with that mask. So every
candidate is judged on training images masked by all of the candidates.
"""

import contextlib
import dataclasses
import io
import json
import re
import zlib
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import nn
from tqdm import tqdm

from masktune_utils import evaluation, experiment, masking, shortcuts, store
from masktune_utils.data import Split
from masktune_utils.settings import Settings

IMAGES = 800  # at most this many training images are judged with each mask
SELF_TUNED = "MaskTune, self-tuned"
LITTLE = 0.2  # a mean gain below this one raises doubt
WARNING = (
    "Doubt: on masked images, the best candidates gain only {:.1%} over the base model. "
    "There is no shortcut, or the masks do not hide it."
)


def worst_class(model: nn.Module, images: Split) -> float:
    """Accuracy of the worst class, in [0, 1].

    Args:
        model: a candidate.
        images: masked as by a candidate.
    """
    labels = images.labels.cpu()
    correct = (evaluation.predict(model, images).argmax(1) == labels).double()
    return min(correct[labels == label].mean().item() for label in labels.unique())


def scores(accuracy: pd.DataFrame) -> pd.Series:
    """Geometric mean over the masks; a mask weighs what the best candidate gains on it over ERM.

    A mask that hides nothing the base model relies on has no weight, and neither has one that hides
    all there is.

    Args:
        accuracy: see `worst_class`; one row per model, `base` among them, and one column per
            candidate, whose mask hides. The rows of the candidates have the same names.

    Returns:
        In [0, 1], one per model.
    """
    weights = gains(accuracy) + 1e-6  # so that they never are all zero
    return np.exp(np.log(accuracy.clip(lower=0.01)) @ weights / weights.sum())


def gains(accuracy: pd.DataFrame) -> pd.Series:
    """What the best candidate gains over the base model on each mask, see `scores`."""
    candidates = accuracy.loc[accuracy.columns]
    return (candidates.max() - accuracy.loc["base"]).clip(lower=0)


def chains(candidates: Sequence[Settings]) -> list[list[Settings]]:
    """Candidates that differ only in their iterations, together and in this order."""

    def first(one: Settings) -> Settings:
        return dataclasses.replace(one, iterations=1, accumulate=False, restart=False)

    ordered = sorted(candidates, key=lambda one: (first(one).configuration, one.iterations))
    return [list(chain) for _, chain in groupby(ordered, first)]


def finetune(chain: Sequence[Settings], retrain: bool = False) -> dict[str, Split]:
    """Fine-tune candidates that differ only in their iterations, and record their results.

    Args:
        chain: the candidates.
        retrain: see `experiment.finetuned_model`.

    Returns:
        `IMAGES` training images at random, masked as by the candidate, by its configuration.
    """
    masked, sets = {}, shortcuts.load(chain[0])
    with contextlib.redirect_stderr(io.StringIO()):  # the bars of several processes
        base, _ = experiment.base_model(chain[0], sets.train)
        maps = experiment.training_saliency(chain[0], base, sets.train)
        first = masking.mask_dataset(sets.train, maps, **chain[0].mask_rule)
        for one in chain:
            model, about = experiment.finetuned_model(one, base, first, retrain)
            experiment.record(one, model, about, sets)
            generator = torch.Generator().manual_seed(zlib.crc32(one.configuration.encode()))
            index = torch.randperm(len(sets.train), generator=generator)[:IMAGES]
            images = masking.apply_mask(sets.train.images[index], about["masked"].masks(index))
            masked[one.configuration] = Split(images, sets.train.labels[index])
    return masked


def choose(
    candidates: Sequence[Settings],
    others: Sequence[Settings] = (),
    jobs: int = 1,
    retrain: bool = False,
) -> dict[str, Any]:
    """Fine-tune candidates, choose the one with the best score, and save the choice.

    Args:
        candidates: of one base model.
        others: configurations that are fine-tuned already; they are scored, but not chosen.
        jobs: how many processes.
        retrain: see `experiment.finetuned_model`.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one; `scores` of the candidates;
        `others`, the scores of the base model and of `others`; `base_sha256`; and `doubt`:
        `second`, the second best candidate; `lead`, by how much the score of the chosen one is
        better; `gain`, the mean of `gains`; and a `warning`, which is empty if the gain is large.
    """
    own = [one.configuration for one in candidates]
    names = [*own, "base", *(one.configuration for one in others)]
    folder = candidates[0].folder("results")
    path, base_sha256 = folder / "chosen.json", store.read_result(folder / "base.json")["sha256"]
    if path.exists() and not retrain:
        choice = store.read_result(path)
        if choice["base_sha256"] == base_sha256 and names == [*choice["scores"], *choice["others"]]:
            return choice
    masked = {}
    parallel = Parallel(jobs, return_as="generator_unordered")
    with tqdm(total=len(candidates), unit="candidate", ncols=110) as bar:
        for part in parallel(delayed(finetune)(chain, retrain) for chain in chains(candidates)):
            masked |= part
            bar.update(len(part))
    accuracy = pd.DataFrame(index=names, columns=own, dtype=float)
    for name in names:
        checkpoint = candidates[0].checkpoint_path(name)
        model, _ = store.load_checkpoint(checkpoint, device=masked[own[0]].labels.device)
        accuracy.loc[name] = [worst_class(model, masked[mask]) for mask in own]
    result, gain = scores(accuracy), gains(accuracy).mean()
    first, second, *_ = result[own].sort_values(ascending=False).index
    choice = {"configuration": first, "scores": result[own].to_dict()}
    choice["others"] = result.drop(own).to_dict()
    choice["doubt"] = {"second": second, "lead": result[first] - result[second], "gain": gain}
    choice["doubt"]["warning"] = WARNING.format(gain) if gain < LITTLE else ""
    choice["base_sha256"] = base_sha256
    store.write_bytes(path, json.dumps(choice, indent=1).encode())
    return choice


def describe(choice: dict[str, Any]) -> str:
    """A choice in words."""
    name, doubt = choice["configuration"], choice["doubt"]
    text = f"{short(name)} has the best score, {choice['scores'][name]:.1%}"
    return (
        f"{text}; the next, {short(doubt['second'])}, {doubt['lead']:.1%} less. {doubt['warning']}"
    )


def short(configuration: str) -> str:
    """Name of a configuration without how it is fine-tuned."""
    return re.sub(
        r"_(finetune_(lr|schedule|batch_size)|accumulate|restart)=[^_]+", "", configuration
    )


def compare(table: pd.DataFrame, settings: Settings) -> pd.DataFrame:
    """Rows of the table of results that tell what the choice is worth.

    Args:
        table: see `store.collect`.
        settings: the experiment.

    Returns:
        The rows of ERM, of the best of the other configurations by the same score, of the chosen
        one, and of the oracle, if there is one; `model` tells them apart.
    """
    own = table[table["experiment"] == settings.experiment]
    oracle = table["experiment"] == dataclasses.replace(settings, shortcut="none").experiment
    other = own[own["chosen"].isna() & own["score"].notna() & (own["configuration"] != "base")]
    rows = {
        "ERM": own[own["configuration"] == "base"],
        "MaskTune, best published": other.loc[other.groupby("seed")["score"].idxmax()],
        SELF_TUNED: own[own["chosen"].eq(True)],
        "oracle: ERM without the shortcut": table[oracle & (table["configuration"] == "base")],
    }
    return pd.concat([part.assign(model=name) for name, part in rows.items()])
