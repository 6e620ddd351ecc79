"""Which configuration would be chosen without group labels? The table of section "Choosing" in results/README.md.

Every fine-tuned model of an experiment with `validation_share` predicts the validation images masked by the rules of
all of them. A model that relies on what one of the rules hides is found out. Run it on two cores in ten minutes:

    masktune sweep sweeps/choosing.yaml --directory runs/choosing
    python benchmarks/masked_validation.py --directory runs/choosing
"""

import argparse
import dataclasses

import pandas as pd

from masktune_utils import evaluation, experiment, masking, saliency, shortcuts, store
from masktune_utils.settings import DEFAULTS, Settings

IMAGES = 2000  # at most this many validation images


def scores(common: Settings) -> pd.Series:
    """Mean over the rules of the accuracy of the worse class, in [0, 1], by configuration."""
    sets = shortcuts.load(common)
    images = sets.validation[:IMAGES]
    base, _ = experiment.base_model(common, sets.train)
    models, rules = {}, {}
    for path in sorted(common.folder("checkpoints").glob("*finetuned*")):
        model, about = store.load_checkpoint(path, device=sets.train.labels.device)
        made_with = {name: value for name, value in about["settings"].items() if name in DEFAULTS}
        one = dataclasses.replace(common, **made_with)
        maps = saliency.saliency_maps(base, images.images, images.labels, one.cam)
        models[one.configuration] = model
        rules[one.configuration] = masking.mask_dataset(images, maps, **one.mask_rule)
    table = pd.DataFrame(
        {
            rule: {
                name: min(evaluation.metrics(evaluation.predict(model, masked), masked.labels)["class_accuracy"])
                for name, model in models.items()
            }
            for rule, masked in rules.items()
        }
    )
    return table.mean(axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", required=True)
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
