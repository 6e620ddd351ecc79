"""Runs of a script, two at a time; what is in its table is not run again.

    python studies/resume.py tcp://HOST:PORT studies/registered.py 501 502

executes them on the workers of a Dask cluster, see benchmarks/README.md.
"""

import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from joblib import Parallel, delayed, parallel_config

from masktune_utils.results import save_table
from masktune_utils.runner.jobs import use_cluster
from masktune_utils.settings import REPOSITORY


def with_key(make: Callable, key: Sequence[str], run: tuple) -> list[dict]:
    """The rows of a run, made by one thread, with what tells it from others."""
    torch.set_num_threads(1)
    values = dict(zip(key, run, strict=True))
    with parallel_config("sequential"):  # no worker of a cluster gets a part of it
        return [{**values, **row} for row in make(*run)]


def resume(
    file: str | Path, key: Sequence[str], runs: Sequence[tuple], make: Callable
) -> None:
    """Make the rows of each run that is missing, and save after each, two at a time.

    Args:
        file: the table, in the folder of the results if no other one is given.
        key: the columns that tell runs apart, which are added to the rows.
        runs: their values, which are also the arguments of `make`.
        make: returns the rows of a run.
    """
    tables = []
    done = set()
    path = REPOSITORY / "results" / file
    if path.exists():
        tables = [pd.read_csv(path, keep_default_na=False)]  # "null" is a name
        done = set(tables[0][key].itertuples(index=False, name=None))
    missing = [run for run in runs if run not in done]
    parallel = Parallel(2, return_as="generator_unordered")
    for rows in parallel(delayed(with_key)(make, key, run) for run in missing):
        tables.append(pd.DataFrame(rows))
        save_table(pd.concat(tables, ignore_index=True), path)
        print(*rows[0].values(), flush=True)


if __name__ == "__main__":
    _, address, *sys.argv = sys.argv
    use_cluster(address)
    runpy.run_path(sys.argv[0], run_name="__main__")
