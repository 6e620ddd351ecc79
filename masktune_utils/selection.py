"""Choosing among candidates by training images and their classes alone, without groups and test sets.

A model that relies on what a mask hides is found out on images where that is hidden, or exchanged
with that of an image of another class. So every candidate is judged by the masks of all of them.
"""

import contextlib
import dataclasses
import io
import json
import re
import zlib
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed

from masktune_utils import evaluation, experiment, masking, models, progress, shortcuts, store
from masktune_utils.data import Split
from masktune_utils.settings import Settings

IMAGES = 400  # at most this many training images are masked, or exchanged, with each mask
SELF_TUNED = "MaskTune, self-tuned"
NEAR = 0.005  # scores that differ by less are taken as equal
LITTLE = 1.5  # gain per share hidden; where masks find the shortcut, it is 2 to 8
WARNING = "Doubt: masks make little difference here. "
WARNING += "They may not hide the shortcut, or there is none."


def worst_classes(paths: Sequence[Path], sets: Sequence[Split], device: torch.device) -> dict:
    """By path: accuracy of the worst class of models on each of several sets of images, in [0, 1].

    Args:
        paths: of their checkpoints.
        sets: masked or exchanged images.
        device: see `models.resolve_device`.
    """
    worst = {}
    for path in paths:
        (model, _), worst[path] = store.load_checkpoint(path, device=device), []
        for images in sets:
            labels = images.labels
            correct = (evaluation.predict(model, images.to(device)).argmax(1) == labels).double()
            classes = (correct[labels == label].mean().item() for label in labels.unique())
            worst[path].append(min(classes))
    return worst


def scores(accuracy: pd.DataFrame, hidden: pd.Series, candidates: Sequence[str]) -> pd.Series:
    """Weighted mean of accuracies, in [0, 1], one per model.

    A set weighs gain ^ 2.5 / hidden ^ 1.5, where gain is what the best candidate gains on it over
    the base model. So masks that hide nothing the base model relies on, or all there is, count
    little, and most do those that make a difference by hiding little.

    Args:
        accuracy: see `worst_classes`; a row per model, `base` among them, and a column per set.
        hidden: mean share of the images that is hidden, or exchanged, for each set.
        candidates: names of their rows.
    """
    weights = gains(accuracy, candidates) ** 2.5 / hidden.clip(lower=1e-3) ** 1.5
    weights += 1e-9  # so that they never are all zero
    return accuracy @ weights / weights.sum()


def gains(accuracy: pd.DataFrame, candidates: Sequence[str]) -> pd.Series:
    """What the best candidate gains over the base model on each set, see `scores`."""
    return (accuracy.loc[candidates].max() - accuracy.loc["base"]).clip(lower=0)


def masked_and_exchanged(masked: masking.MaskedDataset, seed: int) -> list[tuple[Split, float]]:
    """Images without what their mask hides, and images with a region of another class pasted in.

    Args:
        masked: the masked training set.
        seed: decides which `IMAGES` images are taken, and with which others they are paired.

    Returns:
        Both sets, on the CPU, each with the mean share of the images that is hidden or exchanged.
    """
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(len(masked), generator=generator)[:IMAGES]
    labels, others = masked.labels.cpu(), index.clone()
    for label in labels.unique():
        pool, own = (labels != label).nonzero()[:, 0], labels[index] == label
        others[own] = pool[torch.randint(len(pool), (int(own.sum()),), generator=generator)]
    images, donors = (masked.split.images[i].float() for i in (index, others))
    found, removed = [], torch.zeros_like(images)
    for into, mask in ((removed, masked.masks(index)), (donors, masked.masks(others))):
        pixels = torch.lerp(images, into, mask[:, None].to(images.device)).round()
        found.append((Split(pixels.to("cpu", torch.uint8), labels[index]), mask.mean().item()))
    return found


def chains(candidates: Sequence[Settings]) -> list[list[Settings]]:
    """Candidates that differ only in their iterations, together and in this order."""

    def first(one: Settings) -> Settings:
        return dataclasses.replace(one, iterations=1, accumulate=False, restart=False)

    ordered = sorted(candidates, key=lambda one: (first(one).configuration, one.iterations))
    return [list(chain) for _, chain in groupby(ordered, first)]


def finetune(chain: Sequence[Settings], retrain: bool = False) -> dict[str, list]:
    """Fine-tune candidates that differ only in their iterations, and record their results.

    Args:
        chain: the candidates.
        retrain: see `experiment.finetuned_model`.

    Returns:
        See `masked_and_exchanged`; by configuration.
    """
    judging, sets = {}, shortcuts.load(chain[0])
    with contextlib.redirect_stderr(io.StringIO()):  # the bars of several processes
        base, _ = experiment.base_model(chain[0], sets.train)
        maps = experiment.training_saliency(chain[0], base, sets.train)
        first = masking.mask_dataset(sets.train, maps, **chain[0].mask_rule)
        for one in chain:
            name, seed = one.configuration, zlib.crc32(one.configuration.encode())
            model, about = experiment.finetuned_model(one, base, first, retrain)
            experiment.record(one, model, about, sets)
            judging[name] = masked_and_exchanged(about["masked"], seed)
    return judging


def choose(
    candidates: Sequence[Settings], others: Sequence = (), jobs: int = 1, retrain: bool = False
) -> dict:
    """Fine-tune candidates, choose one, and save the choice.

    Of the candidates whose score is next to the best (`NEAR`), the one that hides least is chosen.

    Args:
        candidates: of one base model.
        others: configurations that are fine-tuned already; they are scored, but not chosen.
        jobs: how many processes.
        retrain: see `experiment.finetuned_model`.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one; `scores` of the candidates;
        `others`, the scores of the base model and of `others`; `base_sha256`; and
        `doubt`: `near`, how many candidates are next to the best; `lead`, from the best score to
        the second; `gain`, the mean of `gains` per share hidden; and a `warning`, if that is small.
    """
    settings, own = candidates[0], [one.configuration for one in candidates]
    folder = settings.folder("results")
    path, base_sha256 = folder / "chosen.json", store.read_result(folder / "base.json")["sha256"]
    names = [*own, "base", *(one.configuration for one in others)]
    if path.exists() and not retrain:
        choice = store.read_result(path)
        if choice["base_sha256"] == base_sha256 and names == [*choice["scores"], *choice["others"]]:
            return choice
    judging, parallel = {}, Parallel(jobs, return_as="generator_unordered")
    with progress.bar(total=len(candidates), unit="candidate") as bar:
        for part in parallel(delayed(finetune)(chain, retrain) for chain in chains(candidates)):
            judging |= part
            bar.update(len(part))
    sets, shares = zip(*(pair for name in own for pair in judging[name]), strict=True)
    device = models.resolve_device(settings.device)
    paths = [settings.checkpoint_path(name) for name in names]
    parts = (delayed(worst_classes)(paths[k::jobs], sets, device) for k in range(jobs))
    rows = {path: row for part in Parallel(jobs)(parts) for path, row in part.items()}
    accuracy = pd.DataFrame([rows[path] for path in paths], index=names)
    hidden = pd.Series(shares)
    result = scores(accuracy, hidden, own)
    gain = (gains(accuracy, own) / hidden.clip(lower=1e-3)).mean()
    best = result[own].nlargest(len(own))
    near = [name for name in own if result[name] >= best.iloc[0] - NEAR]
    choice = {"configuration": min(near, key=lambda name: judging[name][0][1])}
    choice |= {"scores": result[own].to_dict(), "others": result.drop(own).to_dict()}
    choice["doubt"] = {"near": len(near), "lead": best.iloc[0] - best.iloc[1], "gain": gain}
    choice["doubt"]["warning"] = WARNING if gain < LITTLE else ""
    choice["base_sha256"] = base_sha256
    store.write_bytes(path, json.dumps(choice, indent=1).encode())
    return choice


def describe(choice: dict) -> str:
    """A choice in words."""
    best, near = max(choice["scores"].values()), choice["doubt"]["near"]
    reason = "has the best score by more than half a point"
    if near > 1:
        reason = f"hides least of the {near} candidates within half a point of the best score"
    warning = choice["doubt"]["warning"]
    return f"{short(choice['configuration'])} {reason}, {best:.1%}. {warning}".strip()


def short(configuration: str) -> str:
    """Name of a configuration without how it is fine-tuned."""
    left_out = r"_(finetune_(lr|schedule|batch_size)|accumulate|restart)=[^_]+"
    return re.sub(left_out, "", configuration)


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
