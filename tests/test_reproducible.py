"""Same seed, machine and number of threads: the same bytes, however and in whatever order they are made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MASKTUNE, outcome

from masktune_utils import sweep
from masktune_utils.experiment import Settings

ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1"}


def masktune(directory: Path, *arguments: str) -> dict[str, object]:
    tiny = ["--dataset", "mnist5k", "--epochs", "2", "-p", "limit", "200"]
    command = [MASKTUNE, *arguments, *tiny, "--directory", str(directory)]
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD)
    return outcome(directory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory) -> dict[str, object]:
    """All notebooks, one after the other."""
    options = ["--jobs", "1", "--methods", "top_k", "random", "--params", "0.1"]
    return masktune(tmp_path_factory.mktemp("reference"), "run", *options)


def test_in_another_order_and_side_by_side(reference, tmp_path):
    options = ["--jobs", "4", "--methods", "random", "top_k", "--params", "0.1"]
    again = masktune(tmp_path, "run", *options)
    assert again.keys() == reference.keys() and len(again) > 25
    assert [name for name in again if again[name] != reference[name]] == []


def test_one_notebook_alone_by_papermill(reference, tmp_path):
    parameters = {"method": "random", "param": 0.1, "dataset": "mnist5k", "epochs": 2, "limit": 200}
    command = [sys.executable, "-m", "papermill", str(sweep.NOTEBOOKS / "04_finetune_sweep.ipynb"), os.devnull]
    for name, value in (parameters | {"directory": str(tmp_path)}).items():
        command += ["-p", name, str(value)]
    subprocess.run(command, check=True, capture_output=True, env=ONE_THREAD, cwd=tmp_path)
    settings = Settings(directory=str(tmp_path), **parameters)
    again = outcome(tmp_path)
    assert {settings.checkpoint_path(name).name for name in ("base", "random_0.1")} < again.keys()
    assert [name for name in again if again[name] != reference[name]] == []
