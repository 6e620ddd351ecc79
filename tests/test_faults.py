"""Faults while it runs, in real processes: the next run ends as an undisturbed one does."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import outcome
from tiny_runs import contents, masktune

from masktune_utils import experiment, plotting, shortcuts, store
from masktune_utils.settings import Settings

pytest_plugins = ["tiny_runs"]
PROCESSES = multiprocessing.get_context("forkserver")
SLOW = [
    "sklearn.metrics",
    "torch._dynamo",
    "matplotlib.backends.backend_agg",
]  # to import
PROCESSES.set_forkserver_preload(["masktune_utils.sweep", *SLOW])
WRITES = ["CNN_checkpoint_base.pth", "base.json", "CNN_saliency_XGradCAM.pth"]
WRITES += ["CNN_checkpoint_finetuned_top_k_0.1.pth", "top_k_0.1.json", "picture.png"]


def pipeline(directory: Path) -> None:
    """What the notebooks write, in their order."""
    torch.set_num_threads(1)
    settings = Settings(
        directory=str(directory), dataset="mnist5k", limit=200, epochs=1
    )
    sets = shortcuts.load(settings)
    base = experiment.base_model(settings, sets.train)
    experiment.record(base, sets)
    tuned = experiment.masktune(settings, base, sets.train)
    experiment.record(tuned, sets)
    pictures = {"masked": tuned.masked.batch(slice(0, 2))[0]}
    plotting.show(plotting.grid(pictures), settings, "picture")


def disturbed(directory: Path, event: str, name: str, fault) -> None:
    """The pipeline, with a fault at the first event of Python's audit that names a file.

    The number of the system's error that ends it is the exit code.
    """
    happened = []

    def watch(now: str, arguments: tuple) -> None:
        if now == event and not happened and name in str(arguments[0]):
            happened.append(name)
            fault(directory)

    sys.addaudithook(watch)
    try:
        pipeline(directory)
    except OSError as error:
        sys.exit(error.errno)


def kill(_directory: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at_a_thousand_bytes(_directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def lock(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)


def in_process(target, *arguments: object) -> int:
    """Exit code of a process of its own."""
    process = PROCESSES.Process(target=target, args=arguments)
    process.start()
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of an undisturbed run."""
    directory = tmp_path_factory.mktemp("whole")
    assert in_process(pipeline, directory) == 0
    return directory


@pytest.fixture(scope="module")
def undisturbed(whole) -> dict[str, object]:
    found = outcome(whole)
    assert found.keys() == set(WRITES)
    return found


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip(
            "needs the right to mount a tmpfs: run the tests as root of a container"
        )
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, free: int) -> None:
    (disk / "filler").unlink(missing_ok=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))


def test_killed_during_each_write(undisturbed, tmp_path):
    """One directory, twelve faults, one after the other."""
    for number, name in enumerate(WRITES):
        half_written = "open", f"/.{name}.", stop_at_a_thousand_bytes
        not_in_place = "os.rename", f"/.{name}.", kill
        for fault, code in {
            half_written: signal.SIGXFSZ,
            not_in_place: signal.SIGKILL,
        }.items():
            assert in_process(disturbed, tmp_path, *fault) == -code
            assert outcome(tmp_path) == {
                whole: undisturbed[whole] for whole in WRITES[:number]
            }
    assert in_process(pipeline, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed


def test_disk_full_at_each_write(disk, whole, undisturbed):
    sizes = {
        path.name: -(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*.*")
    }
    for number in range(len(WRITES)):
        shutil.rmtree(disk / "run", ignore_errors=True)
        before = WRITES[:number]
        fill(disk, sum(sizes[name] for name in before))
        assert in_process(disturbed, disk / "run", "", "", None) == errno.ENOSPC
        assert outcome(disk / "run") == {name: undisturbed[name] for name in before}
        assert not list(
            disk.glob("run/**/.*")
        )  # no half file, which would fill it further
    (disk / "filler").unlink()
    assert in_process(pipeline, disk / "run") == 0
    assert outcome(disk / "run") == undisturbed


def test_permission_lost_midway(disk, undisturbed):
    assert in_process(disturbed, disk, "open", f"/{WRITES[0]}", lock) == errno.EROFS
    assert outcome(disk) == {WRITES[0]: undisturbed[WRITES[0]]}
    with pytest.raises(ValueError, match=f"directory is '{disk}'; allowed: a folder to write to"):
        store.check_writable(str(disk))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert in_process(pipeline, disk) == 0
    assert outcome(disk) == undisturbed


def test_the_clock_is_set_back(whole, undisturbed, tmp_path):
    """Files are then of the future."""
    directory = shutil.copytree(whole, tmp_path / "copy")
    checkpoints = list(directory.glob("checkpoints/**/*.pth"))
    for path in directory.rglob("*"):
        os.utime(path, (4e9, 4e9))
    assert in_process(pipeline, directory) == 0
    assert {path.stat().st_mtime for path in checkpoints} == {4e9}
    assert outcome(directory) == undisturbed


def test_two_runs_at_once_in_one_directory(undisturbed, tmp_path):
    both = [PROCESSES.Process(target=pipeline, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert outcome(tmp_path) == undisturbed


def test_disk_full_during_a_sweep(directory, disk, capfd):
    """What is there stays whole, and no half file is left."""
    shutil.copytree(directory, disk / "run")
    for path in disk.rglob("*top_k_0.1*"):
        path.unlink()
    fill(disk, 100_000)
    assert masktune(disk / "run", "--param", "0.1") == 1
    error = capfd.readouterr().err
    assert (
        "failed: 04_finetune_sweep_top_k_0.1, seed 0: OSError: [Errno 28] No space"
        in error
    )
    assert contents(disk / "run").items() <= contents(directory).items()
    assert not list(disk.glob("run/**/.*"))
