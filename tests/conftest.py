import copy
import json
import struct
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from masktune_utils import models, shortcuts, training
from masktune_utils.settings import Settings

MASKTUNE = str(
    Path(sys.executable).with_name("masktune")
)  # the command, as it is installed


def write_idx_files(
    folder: Path, labels: list[int], test_labels: list[int] | None = None
):
    """A data set in torchvision's layout, of random images; returns those of the training set."""
    folder.mkdir(parents=True)
    tests = labels if test_labels is None else test_labels
    for part, digits in {"t10k": tests, "train": labels}.items():
        images = np.random.default_rng(0).integers(
            0, 256, (len(digits), 28, 28), dtype=np.uint8
        )
        header = struct.pack(">4i", 0x803, *images.shape)
        (folder / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        header = struct.pack(">2i", 0x801, len(digits))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(header + bytes(digits))
    return images


def outcome(directory: Path) -> dict[str, object]:
    """What a run leaves: bytes of checkpoints, maps and pictures; results without their seconds."""
    found = {}
    for path in sorted(directory.rglob("*.*")):
        if path.suffix in (".pth", ".png") and not path.name.startswith("."):
            found[path.name] = path.read_bytes()
        elif path.suffix == ".json":
            found[path.name] = json.loads(path.read_text())
            found[path.name].pop("seconds", None)  # a choice has none
        elif path.name == "results.csv":
            found[path.name] = pd.read_csv(path).drop(columns="seconds").to_csv()
    return found


@pytest.fixture(scope="session")
def splits() -> shortcuts.BiasedSets:
    """Two hundred real digits to train on and two hundred to test on."""
    return shortcuts.load(Settings(dataset="mnist5k", limit=200))


@pytest.fixture(scope="session")
def _trained(splits) -> models.SmallCNN:
    model = models.new_model(seed=3)
    training.train(model, splits.train, epochs=3, batch_size=32)
    return model.eval()


@pytest.fixture
def model(_trained) -> models.SmallCNN:
    """A network that is right on some of the test images and wrong on others; one for each test."""
    return copy.deepcopy(_trained)
