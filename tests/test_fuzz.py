"""Properties that hold for whatever comes: 200 examples each, the same in every run."""

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from masktune_utils import data, evaluation, masking, shortcuts
from masktune_utils.settings import DEFAULTS, PARAM_RANGES, Settings, Upsample

settings.register_profile(
    "properties", max_examples=200, derandomize=True, deadline=None
)
settings.load_profile("properties")

SIZE = (28, 28)
FLOATS = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])
SHAPES = st.tuples(st.integers(1, 3), st.just(8), st.just(8))
MAPS = st_numpy.arrays(np.float32, SHAPES, elements=FLOATS).map(torch.from_numpy)
METHODS = st.sampled_from([method for method in PARAM_RANGES if method != "random"])
RULES = METHODS.flatmap(lambda m: st.tuples(st.just(m), st.floats(0, PARAM_RANGES[m])))
UPSAMPLES = st.sampled_from(get_args(Upsample))
SEEDS = st.integers(0, 2**32 - 1)


def integers(most: int, length: int) -> st.SearchStrategy[torch.Tensor]:
    """1 to `length` integers from 0 to `most`."""
    elements = st.integers(0, most)
    arrays = st_numpy.arrays(np.int64, st.integers(1, length), elements=elements)
    return arrays.map(torch.from_numpy)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(count: int, seed: int) -> torch.Tensor:
    shape = (count, 3, *SIZE)
    return torch.randint(256, shape, generator=generator(seed), dtype=torch.uint8)


def one_by_one(labels: torch.Tensor, **options) -> data.Split:
    """A split of images of one pixel."""
    return data.Split(
        torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8), labels, **options
    )


@given(MAPS, RULES, UPSAMPLES, st.integers(0, 26))
def test_masks_lie_in_0_1_and_are_monotone_in_dilation(maps, rule, upsample, dilation):
    masks = masking.image_masks(maps, SIZE, *rule, upsample, dilation)
    assert masks.shape == (len(maps), *SIZE) and masks.dtype == torch.float32
    assert ((masks >= 0) & (masks <= 1)).all()
    assert upsample == "bilinear" or ((masks == 0) | (masks == 1)).all()
    assert (
        masks <= masking.image_masks(maps, SIZE, *rule, upsample, dilation + 1)
    ).all()
    assert not masking.image_masks(0 * maps, SIZE, *rule, upsample, dilation).any()


@given(MAPS, RULES, st.floats(0, 1), UPSAMPLES)
def test_masks_are_monotone_in_param(maps, rule, share, upsample):
    """More of `top_k` hides more; of the other methods it hides less."""
    method, high = rule
    params = (share * high, high)
    less, more = (
        masking.image_masks(maps, SIZE, method, p, upsample, 0) for p in params
    )
    assert (
        (less <= more + 1e-6).all()
        if method == "top_k"
        else (less >= more - 1e-6).all()
    )


@given(MAPS, RULES, st.sampled_from(["nearest", "map"]), SEEDS)
def test_masking_twice_with_hard_edges_equals_once(maps, rule, upsample, seed):
    images = random_images(len(maps), seed)
    masks = masking.image_masks(maps, SIZE, *rule, upsample, 0)
    once = masking.apply_mask(images, masks)
    assert torch.equal(masking.apply_mask(once, masks), once)
    assert torch.equal(once, images * (masks == 0)[:, None])


@given(MAPS, RULES, UPSAMPLES, st.integers(0, 27), SEEDS)
def test_a_masked_image_is_the_same_in_any_batch(maps, rule, upsample, dilation, seed):
    split = data.Split(random_images(len(maps), seed), torch.arange(len(maps)))
    masked = masking.mask_dataset(split, maps, *rule, upsample, dilation)
    masks = masking.image_masks(maps, SIZE, *rule, upsample, dilation)
    expected = split.images / 255 * (1 - masks[:, None])
    assert torch.equal(masked.batch(slice(None))[0], expected)
    for label in split.labels:
        images, labels = masked.batch(label[None])
        assert torch.equal(images, expected[label][None]) and labels.tolist() == [label]


@given(st.integers(0, 50), st.floats(0, PARAM_RANGES["random"]), SEEDS)
def test_random_patches_are_squares_of_up_to_twice_the_share(count, share, seed):
    patches = masking.random_patches(count, share, seed, SIZE)
    assert patches.shape == (count, *SIZE)
    assert torch.equal(patches, masking.random_patches(count, share, seed, SIZE))
    rows, columns = patches.any(2).sum(1), patches.any(1).sum(1)
    assert torch.equal(rows, columns) and torch.equal(
        patches.sum((1, 2)), rows * columns
    )
    assert (rows <= round((2 * share * 28 * 28) ** 0.5) + 1e-6).all()


@given(integers(9, 200), SEEDS, st.floats(0, 1))
def test_placement_marks_the_shares_and_in_order_the_first_of_each_class(
    digits, seed, share
):
    split = one_by_one((digits >= 5).long(), digits=digits)
    ordered = shortcuts.place(split, "ordered", share, generator(seed))
    for label, marked_share in enumerate([1 - share, share]):
        members = split.labels == label
        expected = torch.tensor(marked_share).item() * int(members.sum())
        assert ordered[members].sum() == round(expected)
        marked, others = digits[members & ordered], digits[members & ~ordered]
        assert not len(marked) or not len(others) or marked.max() <= others.min()
    how = (split, "random", share)
    placed = shortcuts.place(*how, generator(seed))
    assert torch.equal(placed, shortcuts.place(*how, generator(seed)))
    without_conflict = shortcuts.place(split, "random", 0, generator(seed))
    assert torch.equal(without_conflict, split.labels == 0)


COLORS = st.tuples(*[st.integers(0, 255)] * 3)


@given(st.integers(1, 28), st.integers(0, 27), st.integers(0, 27), COLORS, SEEDS)
def test_a_square_changes_what_it_covers_and_nothing_else(
    size, row, column, color, seed
):
    images = random_images(2, seed)
    name = "#{:02x}{:02x}{:02x}".format(*color)
    changed = shortcuts.add_square(images, size, name, row, column)
    inside = torch.zeros(SIZE, dtype=torch.bool)
    inside[row : row + size, column : column + size] = True
    assert (changed[:, :, inside] == torch.tensor(color)[:, None]).all()
    assert torch.equal(changed[:, :, ~inside], images[:, :, ~inside])


@given(integers(1, 60), SEEDS)
def test_groups_are_a_partition_and_their_accuracies_add_up(labels, seed):
    has_shortcut, replies = torch.rand(2, len(labels), generator=generator(seed)) < 0.5
    split = one_by_one(labels, shortcut=has_shortcut.view(-1, 1, 1))
    groups = shortcuts.groups(split)
    everyone = torch.cat(list(groups.values())).sort().values
    assert everyone.tolist() == list(range(len(labels)))
    logits = torch.eye(2)[replies.long()]
    accuracy = evaluation.group_accuracy(logits, split)
    hits = sum(accuracy[name] * len(index) for name, index in groups.items())
    assert hits == pytest.approx((replies == labels).sum().item())


@given(integers(1, 60), SEEDS, st.integers(2, 5))
def test_metrics_do_not_depend_on_the_order(labels, seed, classes):
    logits = torch.randn(len(labels), classes, generator=generator(seed))
    order = torch.randperm(len(labels), generator=generator(seed))
    one = evaluation.metrics(logits, labels)
    other = evaluation.metrics(logits[order], labels[order])
    assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert one["confusion_matrix"] == other["confusion_matrix"]
    for name in ("accuracy", "class_accuracy", "precision", "recall", "f1"):
        assert one[name] == pytest.approx(other[name], nan_ok=True)
    counts = torch.tensor(one["confusion_matrix"]).sum(1)
    assert torch.equal(counts, labels.bincount(minlength=classes))


VALUES = {"dataset": ["mnist", "mnist5k"], "seed": [1, 11], "limit": [20, 200]}
VALUES |= {
    "square_size": [1, 16],
    "square_color": ["red", "#0000ff"],
    "placement": ["ordered"],
}
VALUES |= {
    "shortcut": ["none", "frame", "two_squares"],
    "conflicting_share": [0.0, 0.1],
    "validation_share": [0.1],
}
VALUES |= {"epochs": [1, 10], "batch_size": [2], "lr": [0.1], "momentum": [0.0, 0.1]}
VALUES |= {"weight_decay": [0.0], "lr_decay_epochs": [1, 10], "lr_decay_factor": [0.1]}
VALUES |= {"cam": ["GradCAM"], "method": ["mean", "mean_std"], "param": [0.11, 1e-7, 1]}
VALUES |= {"upsample": ["map"], "dilation": [1, 11], "finetune_optimizer": ["adam"]}
VALUES |= {
    "finetune_lr": [0.01, 0.1],
    "rounds": [2, 12],
    "cross_fit": [True],
    "half": [0, 1],
}
VALUES |= {"finetune_schedule": ["linear"], "finetune_batch_size": [3, 32]}
VALUES |= {"finetune_epochs": [2, 10]}
VALUES |= {"fill": ["resample"], "labels": ["digits"], "flip": [True]}
VALUES |= {"model": ["resnet18"], "weights": ["DEFAULT", "nets/a.pth"]}
FIELDS = {
    name: st.sampled_from([DEFAULTS[name], *values]) for name, values in VALUES.items()
}
SETTINGS = st.fixed_dictionaries({}, optional=FIELDS).map(lambda some: Settings(**some))


def test_every_setting_but_the_folders_is_tried_below():
    assert {*VALUES, "train_folder", "test_folder", "image_size"} == {
        *Settings().identity(base=False)
    }


@given(SETTINGS, SETTINGS, st.sampled_from([*FIELDS]))
def test_two_settings_share_a_file_only_if_they_are_the_same(one, other, name):
    for two in (other, one.replace(**{name: getattr(other, name)})):
        same_base = one.checkpoint_path("base") == two.checkpoint_path("base")
        assert same_base == (one.identity(base=True) == two.identity(base=True))
        paths = [some.checkpoint_path(some.configuration) for some in (one, two)]
        assert (paths[0] == paths[1]) == (
            one.identity(base=False) == two.identity(base=False)
        )
