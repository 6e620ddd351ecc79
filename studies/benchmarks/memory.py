"""How much memory does notebook 04 take on the full MNIST? Against plain.py."""

import sys
from pathlib import Path

import pandas as pd
from common import BIN, base_model_alone, machine, measure

from masktune_utils.settings import REPOSITORY


def main() -> None:
    notebook = REPOSITORY / "notebooks" / "04_finetune_sweep.ipynb"
    parameters = [
        "-p",
        "dataset",
        "mnist",
        "-p",
        "method",
        "top_k",
        "-p",
        "param",
        "0.1",
    ]
    with base_model_alone() as directory:
        ours = [
            BIN / "papermill",
            "--cwd",
            notebook.parent,
            notebook,
            Path(directory) / "04.ipynb",
            *parameters,
        ]
        commands = {
            "plain procedure": [sys.executable, Path(__file__).with_name("plain.py")],
            "papermill and 04": [*ours, "-p", "directory", directory],
        }
        rows = {
            name: measure([str(word) for word in command])
            for name, command in commands.items()
        }
    print(machine())
    print(pd.DataFrame(rows, index=["seconds", "peak GB"]).T.round(2).to_string())


if __name__ == "__main__":
    main()
