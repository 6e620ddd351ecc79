"""Do time and memory increase linearly with images and with configurations?"""

import tempfile

import numpy as np
import pandas as pd
from common import BIN, machine, measure

from masktune_utils.settings import REPOSITORY

BASE = ["--dataset", "mnist", "--epochs", "1", "--jobs", "1"]
NOTEBOOK = REPOSITORY / "notebooks" / "04_finetune_sweep.ipynb"


def report(table: pd.DataFrame, unit: str) -> None:
    """Print the table, and the straight line through each of its columns."""
    print(f"\n{table.round(2).to_string()}\n")
    for column in table:
        slope, start = np.polyfit(table.index, table[column], 1)
        off = np.abs(np.polyval((slope, start), table.index) - table[column]).max()
        print(
            f"{column}: {start:.2f} + {slope:.3g} a {unit}, at most {off:.2f} off the line"
        )


def main() -> None:
    columns = ["seconds", "peak GB"]
    with tempfile.TemporaryDirectory() as directory:
        sweep = [BIN / "masktune", "sweep", *BASE, "--directory", directory]
        parameters = f"-p directory {directory} -p dataset mnist -p epochs 1 -p method top_k -p param 0.3".split()
        images = {}
        for count in (4_000, 15_000, 60_000):
            makes_base = [*sweep, "--method", "top_k", "--param", "0.1"]
            limit = "None"
            if count < 60_000:
                limit = str(count)
                makes_base += ["--limit", limit]
            measure(makes_base)
            command = [
                BIN / "papermill",
                "--cwd",
                NOTEBOOK.parent,
                NOTEBOOK,
                f"{directory}/04.ipynb",
                *parameters,
            ]
            images[count] = measure([*command, "-p", "limit", limit])
        configurations = {}
        grids = {1: "top_k --param 0.1", 5: "top_k", 15: "threshold top_k mean"}
        for count, grid in grids.items():
            options = [
                "--directory",
                f"{directory}/{count}",
                "--limit",
                "15000",
                "--method",
                *grid.split(),
            ]
            configurations[count] = measure([*sweep, *options])
    print(machine())
    print("notebook 04, by images")
    report(pd.DataFrame(images, index=columns).T, "image")
    print("\nmasktune sweep --jobs 1 on 15,000 images, by configurations")
    report(pd.DataFrame(configurations, index=columns).T, "configuration")


if __name__ == "__main__":
    main()
