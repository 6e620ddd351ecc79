"""The studies that compare models: Waterbirds, in a tiny folder; solar cells."""

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import solar
import torch
import waterbirds
from PIL import Image
from torch import nn

from masktune_utils import choice

SIZE = 28
MODELS = ["ERM", "nothing masked", "place hidden", "chosen", "JTT"]


@pytest.fixture
def folder(tmp_path):
    """Of 48 images, 16 of each split: noise, red or blue by class, dark on water."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(48):
        bird, place, split = number % 2, number // 2 % 2, number // 16
        pixels = rng.integers(0, 100, (30, 40, 3), np.uint8)
        pixels[..., 2 * bird] += 150
        if place:
            pixels //= 4
        name = f"{bird:03}.Bird/{number}.png"
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / name)
        rows.append([number + 1, name, bird, split, place, f"/{place}/x.jpg"])
    columns = ["img_id", "img_filename", "y", "split", "place", "place_filename"]
    table = pd.DataFrame(rows, columns=columns)
    table.to_csv(tmp_path / "metadata.csv", index=False)
    return tmp_path


def test_load_reads_the_three_sets(folder):
    sets = waterbirds.load(folder, SIZE)
    for split in sets:
        assert split.images.shape == (16, 3, SIZE, SIZE)
        assert split.images.dtype == torch.uint8
        assert split.labels.tolist() == [0, 1] * 8
        assert split.groups.tolist() == [0, 2, 1, 3] * 4
        assert split.class_names == ("landbird", "waterbird")
        assert split.group_names == (
            "landbird, land",
            "landbird, water",
            "waterbird, land",
            "waterbird, water",
        )
        colours = split.images.float().mean((2, 3))
        assert torch.equal(colours[:, [0, 2]].argmax(1), split.labels)
        is_dark = colours.amax(1) < 100
        assert torch.equal(is_dark, split.groups % 2 == 1)
    assert not torch.equal(sets.validation.images, sets.test.images)


def test_load_keeps_the_centre_of_a_larger_square(folder):
    path = folder / "000.Bird" / "0.png"
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[2:-2, 4:-4] = 255  # the frame is less than what is cut off, 1/16
    Image.fromarray(pixels).save(path)
    assert (waterbirds.load(folder, 56).train.images[0] == 255).all()


def change(folder, **columns):
    """Set columns of the table; None: remove it."""
    path = folder / "metadata.csv"
    table = pd.read_csv(path).assign(**columns)
    gone = [name for name, value in columns.items() if value is None]
    table.drop(columns=gone).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"place": None, "y": None}, r"has no \['y', 'place'\]; allowed: the columns"),
        ({"y": 2}, r"y is \[2\] in .*metadata.csv; allowed: all of \[0, 1\]"),
        ({"split": 0}, r"split is \[0\] in .*; allowed: all of \[0, 1, 2\]"),
    ],
)
def test_a_bad_table_is_refused(folder, columns, words):
    change(folder, **columns)
    with pytest.raises(ValueError, match=words):
        waterbirds.load(folder, SIZE)


def test_missing_files_are_refused(folder):
    (folder / "001.Bird" / "3.png").unlink()
    words = r"1 of 48 images are not in .*'001.Bird/3.png'.*; allowed: all that"
    with pytest.raises(FileNotFoundError, match=words):
        waterbirds.load(folder, SIZE)
    (folder / "metadata.csv").unlink()
    with pytest.raises(FileNotFoundError, match=r"metadata.csv; allowed: the unpacked"):
        waterbirds.load(folder, SIZE)


def tiny_network(_name, weights, seed):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )


def test_a_run_has_a_row_for_each_model(folder, few_windows, monkeypatch):
    monkeypatch.setattr(waterbirds, "new_network", tiny_network)
    pointed = partial(choice.audit, place=(0, 0, 0.5, 0.5))
    monkeypatch.setattr(waterbirds, "audit", pointed)
    rows = waterbirds.run(folder, "resnet18", False, SIZE, 1, seed=0)
    assert [row["model"] for row in rows] == MODELS
    for row in rows:
        assert 0 <= row["worst_group"] <= row["mean"] <= 1
        assert (row["found_by"], row["place"]) == ("you", "top left")
        assert row["region"] == 0.25
        assert 0 <= row["estimate"] <= 1
        assert row["chosen"]
        assert 0 <= row["jtt_mistakes"] <= 16


def test_a_run_without_a_place_hides_none(folder, few_windows, monkeypatch):
    def audit(*arguments):
        return replace(choice.audit(*arguments), found_by="")

    monkeypatch.setattr(waterbirds, "new_network", tiny_network)
    monkeypatch.setattr(waterbirds, "audit", audit)
    rows = waterbirds.run(folder, "resnet18", False, SIZE, 1, seed=0)
    assert [row["model"] for row in rows] == [m for m in MODELS if m != "place hidden"]
    assert {row["estimate"] for row in rows} == {""}


def test_the_network_has_two_classes():
    network = waterbirds.new_network("resnet18", weights=False, seed=0)
    again = waterbirds.new_network("resnet18", weights=False, seed=0)
    assert torch.equal(network[1].fc.weight, again[1].fc.weight)
    images = torch.rand(2, 3, SIZE, SIZE)
    assert network(images).shape == (2, 2)


def test_mistakes_are_repeated(folder):
    train = waterbirds.load(folder, SIZE).train
    repeated = waterbirds.upweighted(train, torch.arange(16) == 3)
    assert len(repeated) == 115
    assert (repeated.images == train.images[3]).flatten(1).all(1).sum() == 100


def test_solar_cells_are_drawn_with_a_bias(monkeypatch):
    counts = torch.tensor([588, 920, 313, 402])  # of the data set, by group
    groups = torch.arange(4).repeat_interleave(counts)
    images = torch.linspace(0, 1, len(groups), dtype=torch.double).view(-1, 1, 1, 1)
    cells = (images, groups // 2, groups % 2 == 1)
    monkeypatch.setattr(solar, "photographs", lambda: cells)
    sets = solar.load(0)
    assert sets.train.groups.bincount().tolist() == [10, 200, 200, 10]
    assert sets.validation.groups.bincount().tolist() == [2, 38, 38, 2]
    assert sets.test.groups.bincount().tolist() == [576, 682, 75, 390]
    drawn = torch.cat([split.images.flatten() for split in sets])
    assert torch.equal(drawn.sort().values, images.flatten())
    for split in sets:
        numbers = torch.searchsorted(images.flatten(), split.images.flatten())
        assert torch.equal(split.groups, groups[numbers])
    again, other = solar.load(0), solar.load(1)
    assert torch.equal(again.train.images, sets.train.images)
    assert not torch.equal(other.train.images, sets.train.images)
