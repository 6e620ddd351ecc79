"""Same seed, machine and number of threads: the same bytes, however and in whatever order."""

import os
import re
import signal
import time
from collections.abc import Callable
from subprocess import Popen

import papermill
import pytest
from tiny_runs import TINY, contents, kernels, masktune, start

from masktune_utils.runner import jobs

pytest_plugins = ["tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


def wait(sweeping: Popen, ready: Callable) -> None:
    while not ready():
        assert sweeping.poll() is None, sweeping.stderr.read()
        time.sleep(0.05)


def test_a_sweep_killed_again_and_again_goes_on_to_the_same_bytes(whole_run, tmp_path):
    """In another order than the run it is compared with, and without notebooks 01 and 05."""
    arguments = "--param", "0.3", "0.1"
    sweeping = start(tmp_path, *arguments)
    wait(sweeping, lambda: kernels(sweeping))
    time.sleep(1)
    kernels(sweeping)[0].kill()
    _, error = sweeping.communicate()
    assert sweeping.returncode == 1 and "Traceback" not in error
    assert re.search(
        "failed: 02_erm, seed 0: (DeadKernel|Runtime)Error: Kernel died", error
    )
    for moment in ("CNN_checkpoint_base.pth", "CNN_saliency_*.pth"):
        sweeping = start(tmp_path, *arguments)
        wait(
            sweeping, lambda name=moment: list(tmp_path.glob(f"checkpoints/*/*/{name}"))
        )
        os.killpg(sweeping.pid, signal.SIGKILL)
        sweeping.wait()
    assert masktune(tmp_path, *arguments) == 0
    expected, found = contents(whole_run.directory), contents(tmp_path)
    assert (
        len(found) > 10
        and [name for name in found if found[name] != expected[name]] == []
    )


def test_one_notebook_alone_by_papermill(whole_run, tmp_path):
    source, values = jobs.NOTEBOOKS / "04_finetune_sweep.ipynb", {"param": 0.3, **TINY}
    options = {
        "parameters": values | {"directory": str(tmp_path)},
        "progress_bar": False,
    }
    papermill.execute_notebook(source, None, cwd=tmp_path, **options)
    expected, found = contents(whole_run.directory), contents(tmp_path)
    assert len(found) == 7 and [name for name in found if found[name] != expected[name]] == []
