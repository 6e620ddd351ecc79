"""Where does the time of notebook 04 go in a kernel that is kept?

And does its memory grow over fifty notebooks?
"""

import os
import time

os.environ["OMP_NUM_THREADS"] = "1"  # as in a sweep with a notebook for each core

import nbformat
import pandas as pd
import psutil
from common import alternate, base_model_alone, machine
from joblib import cpu_count

from masktune_utils import datasets, experiment, results
from masktune_utils.runner import kernels
from masktune_utils.runner.command import SWEEP
from masktune_utils.runner.jobs import make_stage
from masktune_utils.settings import Settings

NOTEBOOKS = 50
MOMENTS = (1, 10, 25, NOTEBOOKS)


def seconds_by_cell(path: os.PathLike) -> pd.Series:
    """What papermill measured, by the first line of each code cell."""
    cells = nbformat.read(path, as_version=4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    names = [cell.source.split("\n")[0][:60] for cell in code]
    return pd.Series([cell.metadata.papermill.duration for cell in code], names)


def main() -> None:
    with base_model_alone() as directory:
        grid = [
            Settings(dataset="mnist", directory=directory, param=p)
            for p in (0.1, 0.3, 0.5)
        ]
        stages = [job for stem in SWEEP for job in make_stage(stem, grid)]
        wall = {}
        for job in stages:
            started = time.perf_counter()
            error = job.run(1)
            assert not error, error
            wall[job] = time.perf_counter() - started
        last, sets = stages[-1], datasets.load(grid[-1])
        base = experiment.base_model(grid[-1], sets.train)
        tests = {"predictions": lambda: results.evaluate(base.model, sets)}
        predictions = alternate(tests, 3)["predictions"]
        name = last.settings.configuration
        result = last.settings.folder("results") / f"{name}.json"
        training = results.read(result)["seconds"]
        print(machine())
        print(seconds_by_cell(last.copy).round(2).to_string())
        total = pd.Series(
            {"whole": wall[last], "training": training, "predictions": predictions}
        )
        total["beyond"] = wall[last] - training - predictions
        print(f"\n{total.round(2).to_string()}\n")
        memory = {}
        for count in range(1, NOTEBOOKS + 1):
            job = stages[-1 - count % 2]
            if count % 10 == 0:  # trained again
                job.settings.checkpoint_path(job.settings.configuration).unlink()
            error = job.run(1)
            assert not error, error
            if count in MOMENTS:
                pid = kernels.idle[cpu_count()][0].provisioner.pid
                memory[f"after {count}"] = psutil.Process(pid).memory_info().rss / 1e9
        print(f"GB of the kernel\n{pd.Series(memory).round(2).to_string()}")


if __name__ == "__main__":
    main()
