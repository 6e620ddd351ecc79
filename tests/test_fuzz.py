"""Properties that hold for whatever comes: a thousand examples each, the same in every run."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from masktune_utils import data, evaluation, experiment, masking

settings.register_profile("thousand", max_examples=1000, derandomize=True, deadline=None)
settings.load_profile("thousand")

SHAPES = st.tuples(st.integers(0, 3), st.just(8), st.just(8))
FLOATS = st.floats(0, 1, width=32)
MAPS = st_numpy.arrays(np.float32, SHAPES, elements=FLOATS | st.sampled_from([0.0, 0.5, 1.0])).map(torch.from_numpy)
RULES = st.sampled_from([name for name in masking.METHODS if name != "random"]).flatmap(
    lambda method: st.tuples(st.just(method), st.floats(*masking.PARAM_RANGES[method]))
)
UPSAMPLES = st.sampled_from(masking.UPSAMPLES)
LABELS = st_numpy.arrays(np.int64, st.integers(1, 60), elements=st.integers(0, 1)).map(torch.from_numpy)
DIGITS = st_numpy.arrays(np.int64, st.integers(1, 200), elements=st.integers(0, 9)).map(torch.from_numpy)
SEEDS = st.integers(0, 2**32 - 1)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(MAPS, RULES, UPSAMPLES, st.integers(0, masking.MOST_GROWTH))
def test_masks_lie_in_0_1_and_a_map_of_zeros_hides_nothing(maps, rule, upsample, grow):
    masks = masking.image_masks(maps, *rule, upsample, grow)
    assert masks.shape == (len(maps), 28, 28) and masks.dtype == torch.float32
    assert ((masks >= 0) & (masks <= 1)).all()
    if upsample != "bilinear":
        assert ((masks == 0) | (masks == 1)).all()
    assert not masks[maps.amax((1, 2)) == 0].any()


@given(MAPS, RULES, st.data(), UPSAMPLES)
def test_masks_are_monotone_in_param(maps, rule, draw, upsample):
    """More of `top_k` hides more; of the other methods it hides less."""
    method, low = rule
    high = draw.draw(st.floats(low, masking.PARAM_RANGES[method][1]))
    one, other = (masking.image_masks(maps, method, param, upsample) for param in (low, high))
    assert (one <= other + 1e-6).all() if method == "top_k" else (one >= other - 1e-6).all()


@given(MAPS, RULES, UPSAMPLES, st.integers(0, masking.MOST_GROWTH - 1))
def test_masks_are_monotone_in_grow(maps, rule, upsample, grow):
    one, other = (masking.image_masks(maps, *rule, upsample, pixels) for pixels in (grow, grow + 1))
    assert (one <= other).all()


@given(MAPS, RULES, st.sampled_from(["nearest", "map"]), SEEDS)
def test_masking_twice_with_hard_edges_equals_once(maps, rule, upsample, seed):
    images = torch.randint(256, (len(maps), 3, 28, 28), generator=random(seed), dtype=torch.uint8)
    masks = masking.image_masks(maps, *rule, upsample)
    once = masking.apply_mask(images, masks)
    assert torch.equal(masking.apply_mask(once, masks), once)
    assert torch.equal(once, images * (masks == 0)[:, None])


@given(MAPS, RULES, UPSAMPLES, SEEDS)
def test_masked_images_are_never_brighter_and_the_same_in_any_batch(maps, rule, upsample, seed):
    images = torch.randint(256, (len(maps), 3, 28, 28), generator=random(seed), dtype=torch.uint8)
    none = torch.zeros(len(maps), dtype=torch.int64)
    masked = masking.mask_dataset(data.Split(images, none, none, none.bool()), maps, *rule, upsample)
    together, _ = masked.batch(slice(None))
    assert ((together >= 0) & (together <= images / 255)).all()
    for index in range(len(maps)):
        assert torch.equal(masked.batch(torch.tensor([index]))[0][0], together[index])


@given(st.integers(0, 50), st.floats(*masking.PARAM_RANGES["random"]), SEEDS)
def test_random_patches_are_squares_of_up_to_twice_the_share(count, share, seed):
    patches = masking.random_patches(count, share, seed)
    assert patches.shape == (count, 28, 28) and torch.equal(patches, masking.random_patches(count, share, seed))
    rows, columns = patches.any(2).sum(1), patches.any(1).sum(1)
    assert torch.equal(rows, columns) and torch.equal(patches.sum((1, 2)), rows * columns)
    assert (rows <= round((2 * share * 28 * 28) ** 0.5) + 1e-6).all()


@given(DIGITS, SEEDS, st.tuples(st.floats(0, 1), st.floats(0, 1)))
def test_placement_marks_the_shares_the_first_of_each_class_and_more_if_more_is_asked(digits, seed, shares):
    labels = (digits >= 5).long()
    ordered = data.place_squares(digits, "ordered", random(seed), shares)
    for label, share in enumerate(shares):
        members = labels == label
        assert ordered[members].sum() == round(torch.tensor(share).item() * int(members.sum()))
        marked, others = digits[members & ordered], digits[members & ~ordered]
        assert not len(marked) or not len(others) or marked.max() <= others.min()
    placed = data.place_squares(digits, "random", random(seed), shares)
    assert torch.equal(placed, data.place_squares(digits, "random", random(seed), shares))
    more = data.place_squares(digits, "random", random(seed), tuple((share + 1) / 2 for share in shares))
    assert (placed <= more).all()
    assert data.place_squares(digits, "random", random(seed), (1, 0)).equal(labels == 0)


@given(st.integers(1, 28), st.integers(0, 27), st.integers(0, 27), st.tuples(*[st.integers(0, 255)] * 3), SEEDS)
def test_a_square_changes_what_it_covers_and_nothing_else(size, row, column, color, seed):
    images = torch.randint(256, (2, 3, 28, 28), generator=random(seed), dtype=torch.uint8)
    name = "#{:02x}{:02x}{:02x}".format(*color)
    changed = data.add_square(images, torch.tensor([True, False]), size, name, (row, column))
    inside = torch.zeros(28, 28, dtype=torch.bool)
    inside[row : row + size, column : column + size] = True
    assert (changed[0, :, inside] == torch.tensor(color)[:, None]).all()
    assert torch.equal(changed[0, :, ~inside], images[0, :, ~inside]) and torch.equal(changed[1], images[1])


@given(LABELS, SEEDS)
def test_groups_are_a_partition_and_their_accuracies_add_up(labels, seed):
    has_square, correct = torch.rand(2, len(labels), generator=random(seed)) < 0.5
    groups = data.groups(labels, has_square)
    assert torch.cat(list(groups.values())).sort().values.tolist() == list(range(len(labels)))
    accuracy = evaluation.group_accuracy(correct, labels, has_square)
    hits = sum(accuracy[name] * len(index) for name, index in groups.items())
    assert hits == pytest.approx(correct.sum().item())


@given(LABELS, SEEDS, st.integers(2, 5))
def test_metrics_are_invariant_under_permutation(labels, seed, classes):
    logits = torch.randn(len(labels), classes, generator=random(seed))
    order = torch.randperm(len(labels), generator=random(seed))
    one, other = evaluation.metrics(logits, labels), evaluation.metrics(logits[order], labels[order])
    assert one["loss"] == pytest.approx(other.pop("loss"), rel=1e-5)
    assert one["confusion_matrix"] == other["confusion_matrix"]
    for name in ("accuracy", "class_accuracy", "precision", "recall", "f1"):
        assert one[name] == pytest.approx(other[name], nan_ok=True)
    confusion = torch.tensor(one["confusion_matrix"])
    assert confusion.sum(1).tolist() == labels.bincount(minlength=classes).tolist()
    assert confusion.trace().item() / len(labels) == pytest.approx(one["accuracy"])


FIELDS = {
    "seed": SEEDS,
    "limit": st.sampled_from([None, 20, 200]),
    "square_size": st.integers(1, 28),
    "square_color": st.sampled_from(["blue", "red", "#0000ff"]),
    "placement": st.sampled_from(data.PLACEMENTS),
    "holdout": st.sampled_from([0.0, 0.1, 0.5]),
    "epochs": st.integers(1, 100),
    "lr": st.sampled_from([0.01, 0.1]),
    "cam": st.sampled_from(["XGradCAM", "GradCAM"]),
    "param": st.sampled_from([0.1, 0.11, 1e-7, 1]),
    "upsample": UPSAMPLES,
    "grow": st.integers(0, 27),
    "finetune_lr": st.sampled_from([None, 0.01, 0.1]),
    "iterations": st.integers(1, 12),
    "accumulate": st.booleans(),
}
SETTINGS = st.fixed_dictionaries({}, optional=FIELDS).map(lambda chosen: experiment.Settings(dataset="mnist", **chosen))


@given(SETTINGS, SETTINGS, st.sampled_from([*FIELDS]))
def test_two_settings_share_a_file_only_if_they_are_the_same(one, other, name):
    for pair in ((one, other), (one, dataclasses.replace(one, **{name: getattr(other, name)}))):
        base, finetuned = (
            len({settings.checkpoint_path(model or settings.configuration) for settings in pair}) == 1
            for model in ("base", None)
        )
        assert base == (pair[0].identity(base=True) == pair[1].identity(base=True))
        assert finetuned == (pair[0].identity(base=False) == pair[1].identity(base=False))
