"""What several tests share: a tiny experiment, sets of images, what a run leaves."""

import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

# Before PyTorch is imported: two processes that both take all cores are slow.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("LOKY_MAX_CPU_COUNT", "1")  # how many cores the command sees

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from PIL import Image

from masktune_utils import datasets, models, training
from masktune_utils.choice import exchange
from masktune_utils.settings import Settings

pytest_plugins = ["tiny_runs"]  # its fixtures
# The command, as it is installed.
MASKTUNE = str(Path(sys.executable).with_name("masktune"))
KERNEL = {"name": "python3", "language": "python", "display_name": "Python"}
TINY = {"dataset": "mnist5k", "limit": 200, "epochs": 2, "batch_size": 20}
TINY["device"] = "cpu"  # where there is a GPU, too


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
    return Settings(**TINY, directory=str(tmp_path))


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
