"""How quick is all of it on a GPU? ERM, saliency, a choice, one 04, fifteen of them."""

import argparse
import time

import pandas as pd
import torch
from common import BIN, base_model_alone, machine, measure

from masktune_utils import datasets, models, saliency, training
from masktune_utils.settings import REPOSITORY, Settings


def timed(function) -> float:
    """Seconds, with all that the device still has to do."""
    started = time.perf_counter()
    function()
    torch.accelerator.synchronize() if torch.accelerator.is_available() else None
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="cpu is for trying the script")
    parser.add_argument("--epochs", type=int, default=50)
    arguments = parser.parse_args()
    try:
        settings = Settings(dataset="mnist", device=arguments.device)
        train = datasets.load(settings).train
    except ValueError as error:
        raise SystemExit(str(error)) from None
    model = models.new_model(0, train.labels.device)
    training.train(model, train[:1280], epochs=1)
    epochs = arguments.epochs
    rows = {
        f"ERM, {epochs} epochs": timed(
            lambda: training.train(model, train, epochs=epochs)
        )
    }
    rows["saliency, 60,000 images"] = timed(
        lambda: saliency.saliency_maps(model, train.images, train.labels)
    )
    options = ["--dataset", "mnist", "--device", arguments.device]
    for jobs in (1, 2, 4):
        with base_model_alone() as directory:
            sweep = [BIN / "masktune", "sweep", *options, "--directory", directory]
            rows[f"sweep of 15, {jobs} at once"] = measure(
                [*sweep, "--jobs", str(jobs)]
            )
    with base_model_alone() as directory:
        choose = [BIN / "masktune", "choose", *options, "--directory", directory]
        rows["choice, base model saved"] = measure(choose)
    with base_model_alone() as directory:
        notebook = REPOSITORY / "notebooks" / "04_finetune_sweep.ipynb"
        values = {"directory": directory, "dataset": "mnist"}
        values["device"] = arguments.device
        parameters = [
            word for name, value in values.items() for word in ("-p", name, str(value))
        ]
        command = [
            BIN / "papermill",
            "--cwd",
            notebook.parent,
            notebook,
            f"{directory}/04.ipynb",
            *parameters,
        ]
        rows["one 04"] = measure(command)
    print(machine())
    print(pd.Series(rows, name="seconds").round(1).to_string())
    if torch.cuda.is_available():
        print(
            f"peak GPU memory of ERM and saliency: {torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
        )


if __name__ == "__main__":
    main()
