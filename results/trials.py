"""What the models of both folds predict, collected once; rules are compared on it.

    python results/trials.py                      # rules → reference_rules.csv
    python results/trials.py collect frame 0 1    # a kind of base model, and its seeds

A file of results/trials holds, for one kind and seed on the 5,000 digits: predictions
for every held-out image by ERM, by ERM fine-tuned with nothing masked, and by each
candidate; whether they are right where the masks of each candidate resample the image;
and, for looking only, accuracies on the test sets. Three minutes of one core each.
"""

import copy
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import torch

from masktune_utils import (
    data,
    datasets,
    evaluation,
    experiment,
    masking,
    metrics,
    models,
    selection,
    training,
)
from masktune_utils.masking import MaskedDataset
from masktune_utils.selection import ERM, NULL, HeldOut
from masktune_utils.settings import Settings

FILES = Path(__file__).with_suffix("")
SILENT = "largest harm, no shortcut, ERM's mistakes not asked"
NO_EXCEPTION = {"conflicting_share": 0.0}
KINDS = {
    "square_4": {"square_size": 4},
    "square_6": {},
    "square_8": {"square_size": 8},
    "square_10": {"square_size": 10},
    "square_12": {"square_size": 12},
    "red": {"square_color": "red"},
    "ordered": {"placement": "ordered"},
    "two_squares": {"shortcut": "two_squares"},
    "anywhere": {"shortcut": "square_anywhere"},
    "frame": {"shortcut": "frame"},
    "pixels": {"shortcut": "pixels"},
    "digit_color": {"shortcut": "digit_color"},
    "background": {"shortcut": "background"},
    "none": {"shortcut": "none"},
    "share0": NO_EXCEPTION,
    "share0_12": NO_EXCEPTION | {"square_size": 12},
    "share_02": {"conflicting_share": 0.002},
    "share_5": {"conflicting_share": 0.05},
    "undertrained": {"epochs": 3},
    "undertrained_none": {"epochs": 3, "shortcut": "none"},
    "digits_square_6": {"labels": "digits"},
    "digits_square_8": {"labels": "digits", "square_size": 8},
    "digits_square_10": {"labels": "digits", "square_size": 10},
    "digits_share0": NO_EXCEPTION | {"labels": "digits"},
    "digits_none": {"labels": "digits", "shortcut": "none"},
}


def without_mistakes(held_out: HeldOut) -> tuple[pd.DataFrame, pd.Series]:
    """The environments of `selection`, but for ERM's mistakes and the rest."""
    num_classes = held_out.probabilities.shape[1]
    counts = pd.Series(
        held_out.resampled_images / num_classes, held_out.resampled.index
    )
    return held_out.resampled, counts


VARIANTS = {  # names in `selection` that are changed
    "the rule": {"COST": selection.COST},
    "no model is struck out": {"strike_out": lambda accuracy, _: list(accuracy)},
    "a loss counts 1.5 times": {"COST": 1.5},
    "a loss counts six times": {"COST": 6},
    "sure: 90%": {"SURE": 0.9},
    "sure: 97.5%": {"SURE": 0.975},
    "5 mistakes are enough": {"FEW": 5},
    "20 mistakes are enough": {"FEW": 20},
    "5 points behind": {"BEHIND": 0.05},
    "20 points behind": {"BEHIND": 0.2},
    "without ERM's mistakes": {"environments": without_mistakes},
    "the smallest distance alone": {
        "propose": lambda behind, *_: behind.max().idxmin()
    },
}


def networks_of_fold(
    settings: Settings, fold: data.Split
) -> tuple[dict[str, torch.nn.Module], dict[str, torch.Tensor]]:
    """The models that are trained on a fold, and the masks of each candidate for it.

    A round that hides nothing more repeats the model of the round before.
    """
    num_classes = len(fold.labels.unique())
    base = models.new_model(settings.seed, "cpu", num_classes)
    training.train(base, fold, **settings.training)
    of_choice = experiment.choice_settings(settings, 2 * len(fold))

    def fine_tuned(
        network: torch.nn.Module, images: torch.utils.data.Dataset
    ) -> torch.nn.Module:
        training.train(network, images, **of_choice.finetuning)
        return network.eval()

    networks = {ERM: base.eval(), NULL: fine_tuned(copy.deepcopy(base), fold)}
    masks = {}
    for rule in selection.CANDIDATES:
        tuned = [*masking.masktune(base, fold, rule, fine_tuned, seed=settings.seed)]
        for number in range(rule.rounds):
            network, masked = tuned[: number + 1][-1]
            shared = "shared " if rule.shared else ""
            name = f"{shared}{rule.param:g}+{rule.dilation} r{number + 1}"
            networks[name] = network
            masks[name] = masked.own_masks
    return networks, masks


def collect(kind: str, seed: int) -> None:
    """Train the models of both folds, and save what they predict."""
    settings = Settings(dataset="mnist5k", seed=seed, **KINDS[kind])
    sets = datasets.load(settings)
    folds = []
    for index in data.folds(sets.train.labels, seed):
        folds.append(sets.train[index])
    networks = []
    masks = []
    for fold in folds:
        networks_of, masks_of = networks_of_fold(settings, fold)
        networks.append(networks_of)
        masks.append(masks_of)

    labels = torch.cat([fold.labels for fold in folds])
    right = np.zeros((len(masks[0]), len(networks[0]), len(labels)), bool)
    predictions = np.zeros((len(networks[0]), len(labels)), np.uint8)
    probabilities = np.zeros(len(labels), np.float32)
    worst_groups = np.zeros((2, len(networks[0])))
    hidden = np.zeros(len(masks[0]))
    for masks_of in masks:
        for row, own_masks in enumerate(masks_of.values()):
            hidden[row] += own_masks.float().mean().item() / 2
    partners = []
    start = 0
    for number, fold in enumerate(folds):
        here = slice(start, start + len(fold))
        start += len(fold)
        for column, (name, network) in enumerate(networks[1 - number].items()):
            logits = metrics.predict(network, fold)
            predictions[column, here] = logits.argmax(1)
            if name == ERM:
                probabilities[here] = logits.softmax(1).amax(1)
            report = evaluation.evaluate(network, sets)
            worst_groups[number, column] = report["worst_group"]
            for row, own_masks in enumerate(masks[number].values()):
                resampled = MaskedDataset(fold, own_masks, "resample", seed)
                logits = metrics.predict(network, resampled)
                right[row, column, here] = metrics.is_right(logits, fold.labels)
        partners.append(fold.labels[resampled.partners])
    FILES.mkdir(exist_ok=True)
    np.savez_compressed(
        FILES / f"{kind}__{seed}.npz",
        models=list(networks[0]),
        labels=labels.byte().numpy(),
        partner_labels=torch.cat(partners).byte().numpy(),
        predictions=predictions,
        probabilities=probabilities,
        right=np.packbits(right, axis=-1),
        hidden=hidden,
        worst_groups=worst_groups,
    )


def read(file: Path, exchange: str = "any") -> tuple[HeldOut, dict[str, float]]:
    """What a file holds, and the worst group of each model, the mean of both folds.

    Args:
        file: of `collect`.
        exchange: `any`; or only images whose hidden part comes from the `same` class,
            or from an `other` one.
    """
    saved = np.load(file)
    names = [name.replace("base", ERM) for name in saved["models"].tolist()]
    labels = saved["labels"]
    right = np.unpackbits(saved["right"], axis=-1, count=len(labels)).astype(bool)
    is_same = labels == saved["partner_labels"]
    counts = {"any": np.ones(len(labels), bool), "same": is_same, "other": ~is_same}
    resampled = {}
    for mask, of_models in zip(names[2:], right, strict=True):
        shares = []
        for label in np.unique(labels):
            members = counts[exchange] & (labels == label)
            shares.append(of_models[:, members].mean(1))
        resampled[mask] = dict(zip(names, np.min(shares, axis=0), strict=True))
    predictions = {}
    for name, of_model in zip(names, saved["predictions"], strict=True):
        predictions[name] = torch.from_numpy(of_model).long()
    probabilities = torch.from_numpy(saved["probabilities"])[:, None]
    is_predicted = torch.nn.functional.one_hot(predictions[ERM]).bool()
    held_out = HeldOut(
        labels=torch.from_numpy(labels).long(),
        probabilities=is_predicted * probabilities,  # of the other classes: not saved
        predictions=predictions,
        resampled=pd.DataFrame(resampled).T,
        resampled_images=counts[exchange].sum(),
        hidden=dict(zip(names[2:], saved["hidden"], strict=True)),
    )
    worst_groups = dict(zip(names, saved["worst_groups"].mean(0), strict=True))
    return held_out, worst_groups


def compare() -> pd.DataFrame:
    """Regret and harm of the rule, and of variants, over all files, in points."""
    rows = []
    for name, changes in VARIANTS.items():
        rows.append({"rule": name, **outcome(changes)})
    for exchange in ("same", "other"):
        name = f"exchange by the {exchange} class"
        rows.append({"rule": name, **outcome(VARIANTS["the rule"], exchange)})
    return pd.DataFrame(rows).set_index("rule")


def outcome(changes: dict, exchange: str = "any") -> dict[str, float]:
    """What a rule is worth over all files.

    Args:
        changes: of names in `selection`.
        exchange: see `read`.
    """
    regrets = []
    gains = []
    gains_in_silence = []
    kept = 0
    for file in sorted(FILES.glob("*.npz")):
        held_out, worst_groups = read(file, exchange)
        with patch.multiple(selection, **changes):
            verdict = selection.judge(held_out)
        taken = worst_groups[verdict.chosen]
        if "none" in file.stem:
            with patch.multiple(selection, **changes | {"FEW": len(held_out.labels)}):
                verdict_in_silence = selection.judge(held_out)
            alternative = worst_groups[verdict_in_silence.chosen]
            gains_in_silence.append(100 * (alternative - worst_groups[ERM]))
        regrets.append(100 * (max(worst_groups.values()) - taken))
        gains.append(100 * (taken - worst_groups[ERM]))
        kept += verdict.chosen == ERM
    return {
        "files": len(regrets),
        "mean regret": np.mean(regrets),
        "largest regret": max(regrets),
        "largest harm": max(0.0, -min(gains)),
        SILENT: max(0.0, -min(gains_in_silence)),
        "ERM kept": kept,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["collect"]:
        kind, *seeds = sys.argv[2:]
        for seed in seeds:
            collect(kind, int(seed))
    else:
        table = compare().round(1)
        table.to_csv(FILES.with_name("reference_rules.csv"))
        print(table.to_string())
