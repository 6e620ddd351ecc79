"""Same seed, machine and number of threads: the same bytes, in whatever order."""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen

import papermill
import pytest
from conftest import TINY
from tiny_runs import contents, masktune, start

from masktune_utils.runner import jobs

pytest_plugins = ["tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


def wait(process: Popen, is_ready: Callable[[], bool]) -> None:
    """Wait until something is the case, while a sweep goes on."""
    while not is_ready():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


def count_as_in(whole: Path, directory: Path) -> int:
    """Number of the files in a directory, all of which are as in the whole run."""
    expected = contents(whole)
    left = contents(directory)
    different = [name for name in left if left[name] != expected[name]]
    assert different == []
    return len(left)


def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(whole_run, tmp_path):
    """In another order than the run it is compared with, and without 01 and 05."""
    params = ["--param", "0.3", "0.1"]
    process = start(tmp_path, *params)
    wait(process, lambda: any(tmp_path.glob("checkpoints/*/*/CNN_saliency.pth")))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert masktune(tmp_path, *params) == 0
    assert count_as_in(whole_run.directory, tmp_path) > 10


def test_one_notebook_alone_by_papermill(whole_run, tmp_path):
    source = jobs.NOTEBOOKS / "04_finetune_sweep.ipynb"
    values = {**TINY, "param": 0.3, "directory": str(tmp_path)}
    options = {"cwd": tmp_path, "progress_bar": False}
    papermill.execute_notebook(source, None, values, **options)
    assert count_as_in(whole_run.directory, tmp_path) == 9
