"""Faults while it runs, in real processes: the next run ends as an undisturbed one."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import TINY, outcome
from tiny_runs import contents, masktune

from masktune_utils import datasets, experiment, plotting, store
from masktune_utils.settings import Settings

pytest_plugins = ["tiny_runs"]
SMALLEST = TINY | {"limit": 60, "epochs": 1}
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


def pipeline(directory: Path) -> None:
    """What the notebooks write, in their order."""
    torch.set_num_threads(1)
    settings = Settings(**SMALLEST, directory=str(directory))
    sets = datasets.load(settings)
    sets = sets._replace(raw=sets.raw[::10], biased=sets.biased[::10])
    base = experiment.base_model(settings, sets.train)
    experiment.record(base, sets)
    tuned = experiment.masktune(settings, base, sets.train)
    experiment.record(tuned, sets)
    images, _ = tuned.images.batch(slice(0, 2))
    plotting.show(plotting.grid({"masked": images}), settings, "picture")


def pipeline_with_exit_code(directory: Path) -> None:
    """The pipeline; the number of the system's error that ends it is the exit code."""
    try:
        pipeline(directory)
    except OSError as error:
        sys.exit(error.errno)


def disturbed(
    directory: Path, event: str, name: str, fault: Callable[[Path], None]
) -> None:
    """The pipeline, with a fault at the first event of Python's audit on a file."""
    happened = []

    def watch(current_event: str, arguments: tuple) -> None:
        if current_event != event or happened:
            return
        if name in str(arguments[0]):
            happened.append(name)
            fault(directory)

    sys.addaudithook(watch)
    pipeline_with_exit_code(directory)


def kill(_directory: Path) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop_at_a_thousand_bytes(_directory: Path) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))


def remount(disk: Path, mode: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{mode}", str(disk)], check=True)


def lock(disk: Path) -> None:
    remount(disk, "ro")


def in_process(target: Callable, *arguments: object) -> int:
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
def whole(tmp_path_factory) -> Path:
    """The directory of an undisturbed run."""
    directory = tmp_path_factory.mktemp("whole")
    assert in_process(pipeline, directory) == 0
    return directory


@pytest.fixture(scope="module")
def undisturbed(whole) -> dict[str, object]:
    """What that run leaves."""
    left = outcome(whole)
    assert left.keys() == {*WRITES}
    return left


def fill(disk: Path, free: int) -> None:
    """Leave so many bytes free."""
    filler = disk / "filler"
    filler.unlink(missing_ok=True)
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - free))


OF_WRITES = pytest.mark.parametrize(
    "names", [WRITES[:1], pytest.param(WRITES, marks=pytest.mark.slow)]
)


@OF_WRITES
def test_killed_during_each_write(names, undisturbed, tmp_path):
    """One directory, two faults for each write, one after the other."""
    before = {}
    for name in names:
        half_written = ("open", f"/.{name}.", stop_at_a_thousand_bytes)
        assert in_process(disturbed, tmp_path, *half_written) == -signal.SIGXFSZ
        assert outcome(tmp_path) == before
        not_in_place = ("os.rename", f"/.{name}.", kill)
        assert in_process(disturbed, tmp_path, *not_in_place) == -signal.SIGKILL
        assert outcome(tmp_path) == before
        before[name] = undisturbed[name]
    assert in_process(pipeline, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed


@OF_WRITES
def test_disk_full_at_each_write(names, disk, whole, undisturbed):
    sizes = {}  # in whole pages
    for path in whole.rglob("*.*"):
        sizes[path.name] = -(-path.stat().st_size // 4096) * 4096
    directory = disk / "run"
    before = {}
    for name in names:
        shutil.rmtree(directory, ignore_errors=True)
        fill(disk, free=sum(sizes[written] for written in before))
        code = in_process(pipeline_with_exit_code, directory)
        assert code == errno.ENOSPC
        assert outcome(directory) == before
        # no half file, which would fill it further
        assert not list(directory.glob("**/.*"))
        before[name] = undisturbed[name]
    (disk / "filler").unlink()
    assert in_process(pipeline, directory) == 0
    assert outcome(directory) == undisturbed


@pytest.mark.slow
def test_permission_lost_midway(disk, undisturbed):
    first = WRITES[0]
    assert in_process(disturbed, disk, "open", f"/{first}", lock) == errno.EROFS
    assert outcome(disk) == {first: undisturbed[first]}
    message = f"directory is '{disk}'; allowed: a folder to write to"
    with pytest.raises(ValueError, match=message):
        store.check_writable(str(disk))
    remount(disk, "rw")
    assert in_process(pipeline, disk) == 0
    assert outcome(disk) == undisturbed


@pytest.mark.slow
def test_the_clock_is_set_back(whole, undisturbed, tmp_path):
    """Files are then of the future."""
    directory = shutil.copytree(whole, tmp_path / "copy")
    future = 4e9
    for path in directory.rglob("*"):
        os.utime(path, (future, future))
    assert in_process(pipeline, directory) == 0
    checkpoints = list(directory.glob("checkpoints/**/*.pth"))
    assert len(checkpoints) == 3
    for path in checkpoints:
        assert path.stat().st_mtime == future
    assert outcome(directory) == undisturbed


@pytest.mark.slow
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
    copy = shutil.copytree(directory, disk / "run")
    for path in copy.rglob("*top_k_0.1*"):
        path.unlink()
    fill(disk, free=100_000)
    assert masktune(copy, "--param", "0.1") == 1
    error = capfd.readouterr().err
    message = "seed 0, 04_finetune_sweep_top_k_0.1: OSError: [Errno 28] No space"
    assert message in error
    assert contents(copy).items() <= contents(directory).items()
    assert {path.name for path in copy.glob("**/.*")} <= {".gitignore"}
