"""Sweeps and studies on a Dask cluster: two worker processes on this machine."""

import os
import subprocess
import sys

import pandas as pd
import psutil
import pytest
from conftest import kernels_of, outcome, start
from distributed import Client, LocalCluster
from test_failing import wait_for

from masktune_utils.settings import REPOSITORY


@pytest.fixture
def cluster(monkeypatch, tmp_path):
    """A scheduler and two workers that find scripts, each a process with one thread."""
    monkeypatch.syspath_prepend(tmp_path)  # for the scheduler, in this process
    for folder in (REPOSITORY / "studies", tmp_path):
        monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with LocalCluster(**options) as cluster:
        yield cluster


@pytest.mark.slow
def test_a_worker_may_die_and_the_sweep_ends_with_the_same_bytes(
    cluster, whole_run, tmp_path
):
    params = ["--param", "0.1", "0.3"]
    process = start(tmp_path, *params, "--dask", cluster.scheduler_address)
    wait_for(1, tmp_path, "runs/*/*/04_*_unfinished.ipynb", process)
    (*_, copy) = tmp_path.glob("runs/*/*/04_*_unfinished.ipynb")
    *_, pid, _ = copy.stem.split("_")
    with Client(cluster) as client:
        workers = client.run(os.getpid)
    assert int(pid) in workers.values()
    kernels = kernels_of(int(pid))
    os.kill(int(pid), 9)
    _, error = process.communicate()
    assert process.returncode == 0, error
    left = outcome(tmp_path)
    assert {"top_k_0.1.json", "top_k_0.3.json"} < left.keys()
    assert left.items() <= outcome(whole_run.directory).items()
    _, alive = psutil.wait_procs(kernels, timeout=10)
    assert not alive


SCRIPT = """
import os
import sys
import joblib
from resume import resume

def run(seed):
    return [{"pid": os.getpid(), "jobs": joblib.effective_n_jobs(None)}]

if __name__ == "__main__":
    import script
    runs = [(int(seed),) for seed in sys.argv[2:]]
    resume(sys.argv[1], ["seed"], runs, script.run)
"""


def test_a_script_of_the_results_runs_on_the_workers(cluster, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    resume = [sys.executable, REPOSITORY / "studies" / "resume.py"]
    arguments = [cluster.scheduler_address, "script.py", tmp_path / "a.csv", "3", "4"]
    subprocess.run([*resume, *arguments], check=True, cwd=tmp_path, timeout=60)
    table = pd.read_csv(tmp_path / "a.csv")
    assert {*table["seed"]} == {3, 4}
    assert {*table["jobs"]} == {1}  # no run gives parts of it to the others
    with Client(cluster) as client:
        assert {*table["pid"]} <= {*client.run(os.getpid).values()}
