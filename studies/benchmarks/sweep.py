"""How long is a sweep of 15 configurations, given the base model? Against plain.py."""

import argparse

import pandas as pd
import plain
from common import BIN, base_model_alone, machine, measure

from masktune_utils import datasets
from masktune_utils.runner.command import PUBLISHED
from masktune_utils.runner.grids import read_grid
from masktune_utils.settings import Settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--share",
        type=int,
        default=10,
        help="the plain procedure runs on one image in so many",
    )
    arguments = parser.parse_args()
    splits = datasets.load(Settings(dataset="mnist"))
    tenth = splits._replace(
        **{
            name: getattr(splits, name)[:: arguments.share]
            for name in ("train", "raw", "biased")
        }
    )
    with base_model_alone() as directory:
        path = Settings(dataset="mnist", directory=directory).checkpoint_path("base")
        _, grid = read_grid(PUBLISHED, {"dataset": ["mnist"]})
        parts = [
            plain.configuration(path, tenth, one.method, one.param) for one in grid
        ]
        ours = measure(
            [BIN / "masktune", "sweep", "--dataset", "mnist", "--directory", directory]
        )
    parts = arguments.share * pd.DataFrame(parts).sum()
    print(machine())
    print(
        f"plain procedure, 15 configurations, on 1/{arguments.share} of the images, seconds × {arguments.share}:\n"
    )
    print(parts.round(0).to_string())
    print(
        f"\nplain {parts.sum():.0f} s, masktune sweep {ours:.0f} s: {parts.sum() / ours:.1f} × faster"
    )


if __name__ == "__main__":
    main()
