"""Faults while it runs, in real processes: the next run ends as an undisturbed one."""

import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import masktune, outcome, tiny

from masktune_utils import datasets, experiment, plotting

pytestmark = pytest.mark.slow
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["preloaded"])
WRITES = [  # in their order
    "CNN_checkpoint_base.pth",
    "base.json",
    "CNN_saliency.pth",
    "CNN_checkpoint_finetuned_top_k_0.1.pth",
    "top_k_0.1.json",
    "picture.png",
]


def pipeline(directory):
    """What the notebooks write, in their order."""
    torch.set_num_threads(1)
    settings = tiny(directory, limit=60, epochs=1)
    sets = datasets.load(settings)
    sets = sets._replace(raw=sets.raw[::10], biased=sets.biased[::10])
    base = experiment.base_model(settings, sets.train)
    experiment.record(base, sets)
    tuned = experiment.masktune(settings, base)
    experiment.record(tuned, sets)
    images, _ = tuned.images.batch(slice(0, 2))
    plotting.show(plotting.grid({"masked": images}), settings, "picture")


def unfinished(name):
    """Pattern of the path of a file before it is in its place."""
    return rf"/\.tmp\w+/{re.escape(name)}$"


def disturbed(directory, event, pattern, fault):
    """The pipeline, with a fault at an event of Python's audit on a file."""

    def watch(current_event, arguments):
        if current_event == event and re.search(pattern, f"{arguments[0]}"):
            fault()

    sys.addaudithook(watch)
    pipeline(directory)


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at_500_bytes():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))


def in_process(target, *arguments):
    """Exit code of a process of its own."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module", autouse=True)
def preloaded():
    """All processes start with what preloaded.py has imported and read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, object]:
    """What an undisturbed run leaves."""
    directory = tmp_path_factory.mktemp("whole")
    assert in_process(pipeline, directory) == 0
    left = outcome(directory)
    assert left.keys() == {*WRITES}
    return left


def test_killed_during_each_write(undisturbed, tmp_path):
    """One directory, two faults for each write, one after the other."""
    before = {}
    for name in WRITES:
        half_written = ("open", unfinished(name), stop_at_500_bytes)
        assert in_process(disturbed, tmp_path, *half_written) == -signal.SIGXFSZ
        assert outcome(tmp_path) == before
        not_in_place = ("os.rename", unfinished(name), kill)
        assert in_process(disturbed, tmp_path, *not_in_place) == -signal.SIGKILL
        assert outcome(tmp_path) == before
        before[name] = undisturbed[name]
    assert in_process(pipeline, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed


def test_disk_full_during_a_sweep(directory, disk, capfd):
    """What is there stays whole, no half file is left, and the next one goes on."""
    copy = shutil.copytree(directory, disk / "run")
    for path in copy.rglob("*top_k_0.1*"):
        path.unlink()
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - 100_000))
    assert masktune(copy, "--param", "0.1") == 1
    error = capfd.readouterr().err
    assert "04_finetune_sweep_top_k_0.1.ipynb: OSError: [Errno 28] No space" in error
    assert outcome(copy).items() <= outcome(directory).items()
    assert {path.name for path in copy.glob("**/.*")} <= {".gitignore"}
    filler.unlink()
    assert masktune(copy, "--param", "0.1") == 0
    assert outcome(copy) == outcome(directory)
