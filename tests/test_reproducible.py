"""Same seed, machine and number of threads: the same bytes, in whatever order."""

import os
import signal
import time

import pytest
from conftest import outcome
from tiny_runs import masktune, start

pytest_plugins = ["tiny_runs"]


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(whole_run, tmp_path):
    """In another order than the run it is compared with, and without 01 and 05."""
    params = ["--param", "0.3", "0.1"]
    process = start(tmp_path, *params)
    while not any(tmp_path.glob("checkpoints/*/*/CNN_saliency.pth")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert masktune(tmp_path, *params) == 0
    left = outcome(tmp_path)
    assert len(left) > 10
    assert left.items() <= outcome(whole_run.directory).items()
