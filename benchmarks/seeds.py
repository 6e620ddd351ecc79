"""How long are the base models of two seeds, side by side and one after the other?"""

import tempfile

import pandas as pd
from common import BIN, machine, measure

EPOCHS = 3
OPTIONS = [
    "--method",
    "threshold",
    "--param",
    "1",
    "--seed",
    "0",
    "1",
    "--dataset",
    "mnist",
    "--epochs",
]


def main() -> None:
    rows = {}
    for jobs in (1, 2):
        with tempfile.TemporaryDirectory() as directory:
            command = [BIN / "masktune", "sweep", *OPTIONS, str(EPOCHS)]
            command += ["--directory", directory, "--jobs", str(jobs)]
            rows[f"{jobs} at once"] = measure([str(word) for word in command])
    print(machine())
    print(
        f"{EPOCHS} epochs of 60,000 images, maps, and a notebook 04, for each of two seeds"
    )
    print(pd.DataFrame(rows, index=["seconds", "peak GB"]).T.round(2).to_string())


if __name__ == "__main__":
    main()
