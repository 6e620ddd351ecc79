"""Does bfloat16 cost accuracy? ERM over seeds, in bfloat16 and in float32.

Both start from the same weights, and see the images in the same order.
"""

import argparse
from contextlib import nullcontext
from unittest import mock

import pandas as pd
import torch
from common import machine

from masktune_utils import datasets, experiment, training
from masktune_utils.settings import REPOSITORY, Settings

FLOAT32 = mock.patch.object(training, "has_bfloat16", lambda device: False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=50)
    arguments = parser.parse_args()
    if not training.has_bfloat16(torch.device("cpu")):
        raise SystemExit("This processor has no bfloat16: there is nothing to compare.")
    rows = []
    for seed in arguments.seeds:
        for precision, switch in {
            "bfloat16": nullcontext(),
            "float32": FLOAT32,
        }.items():
            directory = REPOSITORY / "runs" / "precision" / precision
            settings = Settings(
                directory=str(directory),
                device="cpu",
                dataset="mnist",
                seed=seed,
                epochs=arguments.epochs,
            )
            splits = datasets.load(settings)
            with switch:
                base = experiment.base_model(settings, splits.train)
            result = experiment.record(base, splits)
            rows.append(
                {"precision": precision, "seed": seed, "loss": base.history[-1]["loss"]}
            )
            rows[-1] |= {name: 100 * result[name] for name in ("raw", "biased")}
            print(rows[-1], flush=True)
    print(machine())
    groups = pd.DataFrame(rows).groupby("precision")[["raw", "biased", "loss"]]
    print(groups.agg(["mean", "std"]).round(4).to_string())


if __name__ == "__main__":
    main()
