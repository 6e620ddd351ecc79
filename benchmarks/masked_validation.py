"""Which configuration would be chosen without group labels? See "Choosing" in results/README.md.

Every fine-tuned model of an experiment with `validation_share` predicts the validation images,
masked by the rules of all of them. A model that relies on what one of the rules hides is found out.
Run it after `masktune sweep sweeps/reference.yaml`.
"""

import argparse
import dataclasses
from functools import cache

import pandas as pd
import torch

from masktune_utils import evaluation, experiment, masking, saliency, shortcuts, store
from masktune_utils.settings import DEFAULTS, Settings

IMAGES = 2000  # at most this many validation images


def scores(common: Settings) -> pd.Series:
    """Mean over the rules of the accuracy of the worse class, in [0, 1], by configuration."""
    sets = shortcuts.load(common)
    images = sets.validation[:IMAGES]
    base, _ = experiment.base_model(common, sets.train)
    maps = cache(lambda cam: saliency.saliency_maps(base, images.images, images.labels, cam))
    models, rules = {}, {}
    for path in sorted(common.folder("checkpoints").glob("*finetuned*")):
        model, about = store.load_checkpoint(path, device=sets.train.labels.device)
        made_with = {name: value for name, value in about["settings"].items() if name in DEFAULTS}
        one = dataclasses.replace(common, **made_with)
        models[one.configuration] = model
        rules[one.configuration] = masking.mask_dataset(images, maps(one.cam), **one.mask_rule)
    worst = {}
    for rule, masked in rules.items():
        logits = {name: evaluation.predict(model, masked) for name, model in models.items()}
        worst[rule] = {name: worst_class(given, masked.labels) for name, given in logits.items()}
    return pd.DataFrame(worst).mean(axis=1)


def worst_class(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Accuracy of the worse class, in [0, 1]."""
    return min(evaluation.metrics(logits, labels)["class_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", default="")
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    columns = {}
    for seed in arguments.seed:
        common = Settings(
            directory=arguments.directory,
            dataset=arguments.dataset,
            epochs=arguments.epochs,
            validation_share=0.1,
            seed=seed,
        )
        columns[f"seed {seed}"] = scores(common)
    table = pd.DataFrame(columns)
    print(table.map("{:.4f}".format).to_string())
    print("chosen:", *table.idxmax(), sep="\n  ")


if __name__ == "__main__":
    main()
