"""What several tests share: a tiny experiment, sets of images, a finished run."""

import copy
import fcntl
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

# Before PyTorch is imported: two processes that both take all cores are slow.
os.environ["OMP_NUM_THREADS"] = "1"  # of notebooks, too: other threads, other bits
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")  # how many cores the command sees

import nbformat
import numpy as np
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from masktune_utils import datasets, models, training
from masktune_utils.choice import exchange
from masktune_utils.runner import command
from masktune_utils.settings import Settings

KERNEL = {"name": "python3", "language": "python", "display_name": "Python"}
TINY = {"dataset": "mnist5k", "limit": 200, "epochs": 2, "batch_size": 20}
TINY["device"] = "cpu"  # where there is a GPU, too
OPTIONS = []  # of the command
for setting, value in TINY.items():
    OPTIONS += [f"--{setting}", str(value)]
OPTIONS += ["--method", "top_k"]
# A process group of its own does not hear Ctrl-C, unless it is told to.
SWEEP = """
import signal, sys
from masktune_utils.runner.command import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def tiny(directory, **settings):
    return Settings(**(TINY | settings), directory=str(directory))


def write_idx_files(folder, labels):
    """A data set in torchvision's layout, of random images: training is testing.

    Args:
        folder: a new folder.
        labels: of the images.

    Returns:
        The images.
    """
    folder.mkdir(parents=True)
    shape = (len(labels), 28, 28)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    pixels = struct.pack(">4i", 0x803, *shape) + images.tobytes()
    digits = struct.pack(">2i", 0x801, len(labels)) + bytes(labels)
    for prefix in ("t10k", "train"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(pixels)
        (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(digits)
    return images


def write_notebook(path, sources):
    """A notebook with a cell of code for each source."""
    cells = [new_code_cell(source) for source in sources]
    notebook = new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, path)


def outcome(directory):
    """What a run leaves, by name of the file.

    Checkpoints, maps and pictures as bytes; results without their seconds.
    """
    contents = {}
    for path in sorted(directory.rglob("*.*")):
        if path.parent.name.startswith("."):  # was not completed
            continue
        if path.suffix in (".pth", ".png"):
            contents[path.name] = path.read_bytes()
        elif path.suffix == ".json":
            result = json.loads(path.read_text())
            result.pop("seconds", None)  # a choice has none
            contents[path.name] = result
    return contents


def times_of_writing(directory):
    """Of each file."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*.*")}


def sweep(directory, *arguments):
    """The arguments of `masktune sweep`."""
    return ["sweep", *OPTIONS, "--directory", str(directory), *arguments]


def masktune(directory, *arguments):
    """Exit code of `masktune sweep` in this process."""
    return command.main(sweep(directory, *arguments))


def start(directory, *arguments):
    """`masktune sweep` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, *sweep(directory, *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kernels_of(pid):
    """The kernels that a process has started."""
    family = psutil.Process(pid).children(recursive=True)
    return [child for child in family if "ipykernel_launcher" in child.cmdline()]


class Run(NamedTuple):
    """What a finished `masktune run` left, and what it printed."""

    directory: Path
    printed: str


def pytest_collection_modifyitems(items):
    """Only with the full MNIST have the notebooks' tables their committed numbers."""
    if (datasets.data_root() / "MNIST").is_dir():
        return
    for item in items:
        if "full-mnist" in getattr(item, "cell", {}).get("metadata", {}).get(
            "tags", []
        ):
            item.options["check"] = False


@pytest.fixture
def settings(tmp_path) -> Settings:
    """The tiny experiment, in a directory of its own."""
    return tiny(tmp_path)


@pytest.fixture(scope="session")
def splits() -> datasets.BiasedSets:
    """Two hundred real digits to train on and a thousand to test on."""
    settings = Settings(**TINY, conflicting_share=0.2)
    return datasets.load(settings)


@pytest.fixture(scope="session")
def trained(splits) -> models.SmallCNN:
    """A network that is right on some test images of each group, wrong on others."""
    model = models.new_model(seed=3)
    training.train(model, splits.train, epochs=5, batch_size=16)
    return model.eval()


@pytest.fixture
def model(trained) -> models.SmallCNN:
    """The trained network, one copy for each test."""
    return copy.deepcopy(trained)


@pytest.fixture(scope="module")
def few_windows():
    """Exchange maps of 16 windows: 169 take most of the time of a tiny choice.

    What is yielded makes all windows.
    """
    all_windows = exchange._windows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "_windows", lambda side: all_windows(side)[::4])
        yield all_windows


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, worker_id) -> Run:
    """`masktune run` with two configurations, which all processes of pytest share."""
    directory = tmp_path_factory.getbasetemp() / "run"
    if worker_id != "master":  # each process has a folder of its own in a shared one
        directory = directory.parents[1] / "run"
    printed = directory.with_suffix(".txt")
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            options = [*OPTIONS, "--param", "0.1", "0.3", "--directory", directory]
            installed = Path(sys.executable).with_name("masktune")
            text = subprocess.check_output([installed, "run", *options], text=True)
            printed.write_text(text)
    return Run(directory, printed.read_text())


@pytest.fixture
def directory(whole_run, tmp_path) -> Path:
    """A copy of what that run left, to do things to."""
    return shutil.copytree(whole_run.directory, tmp_path / "copy")


@pytest.fixture
def disk(tmp_path):
    """A disk of 64 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a disk, as root of a container has it")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def write_photographs(folder, counts):
    """A folder of photographs, all noise, for each class."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{k:02}.jpg")
