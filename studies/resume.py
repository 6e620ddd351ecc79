"""Runs of a script, two at a time; what is in its table is not run again."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd
from joblib import Parallel, delayed

from masktune_utils.results import save_table


def in_parallel(make: Callable, runs: Sequence[tuple]) -> Iterator:
    """What a function makes of each run, two at a time, as they are ready."""
    parallel = Parallel(2, return_as="generator_unordered")
    return parallel(delayed(make)(*run) for run in runs)


def resume(
    file: Path, key: Sequence[str], runs: Sequence[tuple], make: Callable
) -> None:
    """Make the rows of each run that is missing, and save after each.

    Args:
        file: the table.
        key: the columns that tell runs apart.
        runs: their values, which are also the arguments of `make`.
        make: returns the rows of a run.
    """
    tables = []
    done = set()
    if file.exists():
        tables = [pd.read_csv(file, keep_default_na=False)]  # "null" is a name
        done = set(tables[0][key].itertuples(index=False, name=None))
    missing = [run for run in runs if run not in done]
    for rows in in_parallel(make, missing):
        tables.append(pd.DataFrame(rows))
        save_table(pd.concat(tables, ignore_index=True), file)
        print(*rows[0].values(), flush=True)
