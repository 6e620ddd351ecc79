"""Masks, and images that are masked by them."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from masktune_utils import results
from masktune_utils.data import Split
from masktune_utils.masking import (
    NOTHING,
    RULES,
    MaskedDataset,
    Rule,
    apply_mask,
    create_mask,
    mask_dataset,
    mean_map,
)

SIZE = (20, 28)
ALL = slice(None)
EACH_MAP = {
    "axis": (-2, -1),
    "keepdims": True,
}


def resized(masks, mode="bilinear"):
    """Masks or maps of the size of the images."""
    one_channel = masks[:, None].float()
    return interpolate(one_channel, size=SIZE, mode=mode)[:, 0]


RANDOM = torch.Generator().manual_seed(0)
MAPS = torch.rand(50, 8, 8, generator=RANDOM) - 0.2
MAPS = MAPS.clamp(min=0)  # a fifth of the pixels are zero
FIRST_MAPS, SECOND_MAPS = torch.rand(2, 200, 8, 8, generator=RANDOM)
IMAGES = torch.randint(256, (200, 3, *SIZE), generator=RANDOM)
LABELS = torch.arange(200) % 2
TRAIN = Split(IMAGES.byte(), LABELS)


def mean_std(maps, param):
    """As in the authors' code, with the population's standard deviation."""
    positive = np.where(maps > 0, maps, np.nan)
    deviation = np.nanstd(positive, **EACH_MAP)
    return np.nanmean(positive, **EACH_MAP) + param * deviation


LIMITS = {  # what a map must exceed to be hidden
    "threshold": lambda _, param: param,
    "top_k": lambda maps, param: np.quantile(maps, 1 - param, **EACH_MAP),
    "mean": lambda maps, param: param * maps.mean(**EACH_MAP),
    "mean_std": mean_std,
}


@pytest.mark.parametrize("param", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("method", RULES)
def test_masks_equal_the_formulas(method, param):
    mask = create_mask(MAPS, method, param)
    assert mask.dtype == torch.bool
    maps = MAPS.numpy()
    expected = maps > LIMITS[method](maps, param)
    np.testing.assert_array_equal(mask, expected)
    alone = create_mask(maps[7], method, param)  # of an array, too
    assert torch.equal(alone, mask[7])


def test_a_map_that_is_zero_everywhere_hides_nothing():
    """Nor does one that is the same everywhere, by mean_std."""
    flat = torch.full((3, 8, 8), 0.5)
    assert not mean_map(flat).any()
    assert not create_mask(flat, "mean_std", 2.0).any()
    for method in RULES:
        assert not create_mask(0 * flat, method, 0.0).any()


@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "map"])
@pytest.mark.parametrize("method", RULES)
def test_masks_reach_the_size_of_the_image_as_they_should(method, upsample):
    """Those with soft edges as floats, and only those."""
    rule = Rule(method, 0.3, upsample)
    if upsample == "map" or method == "mean_std":
        expected = create_mask(resized(MAPS), method, 0.3)
    else:
        hard = create_mask(MAPS, method, 0.3)
        expected = resized(hard, upsample)
    if upsample == "nearest":
        expected = expected.bool()
    mask = rule.image_masks(MAPS, SIZE)
    torch.testing.assert_close(mask, expected)


def test_any_type_is_masked_and_kept_and_masks_are_resized():
    mask = create_mask(MAPS, "top_k", 0.3)
    seen = 1 - resized(mask)
    images = TRAIN.images[:50]
    expected = images * seen[:, None]
    expected = expected.round().byte()
    assert torch.equal(apply_mask(images, mask), expected)
    masked = apply_mask(images.half(), mask)
    assert masked.dtype == torch.float16


def test_shares_tell_what_is_really_hidden():
    """In three images of 2×2; but for the last one, the shortcut is on the left."""
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images[0] = torch.tensor([[99, 30], [0, 10]])  # the second has no ink to be hidden
    shortcut = torch.zeros(3, 2, 2, dtype=torch.bool)
    shortcut[:2, :, 0] = True
    split = Split(images, torch.arange(3), shortcut=shortcut)
    masks = torch.ones(3, 2, 2)
    masks[0, 0, 1] = 0.5
    masks[0, 1] = 0
    masks[0, 1, 0] = 0.75
    masked = MaskedDataset(split, masks)
    assert results.hidden_shares(masked) == {
        "shortcut": (0.875 + 1) / 2,
        "shortcut_whole": 0.5,
        "rest": (0.25 + 1) / 2,
        "digit": 0.5 * 30 / 40,
    }
    resampled = dataclasses.replace(masked, fill="resample")
    assert resampled.partners[0] != 0  # where all is hidden
    assert results.hidden_shares(resampled)["rest"] == 1
    without = MaskedDataset(split[2:], masks[2:])
    for share in results.hidden_shares(without).values():
        assert np.isnan(share)


@pytest.mark.parametrize("fill", ["zero", "resample"])
def test_masked_images_equal_the_formula(fill):
    """Soft edges are filled by their share."""
    masked = mask_dataset(TRAIN, FIRST_MAPS, "top_k", 0.3, fill=fill)
    masked = masked.in_epoch(2)
    pixels = TRAIN.images / 255
    hidden = resized(create_mask(FIRST_MAPS, "top_k", 0.3))
    filled = torch.zeros_like(pixels)
    if fill == "resample":
        hidden = torch.maximum(hidden, hidden[masked.partners])
        filled = pixels[masked.partners]
    share = hidden[:, None]
    whole, labels = masked.batch(ALL)
    assert torch.equal(whole, pixels * (1 - share) + filled * share)
    assert torch.equal(labels, LABELS)
    index = torch.arange(7, 14)
    part, _ = masked.batch(index)
    assert torch.equal(part, whole[index])
    as_bytes = (255 * whole).round().byte()
    assert torch.equal(masked.images, as_bytes)


def test_partners_are_a_permutation_by_the_seed_anew_in_each_epoch():
    """Of any class."""
    masked = MaskedDataset(TRAIN, FIRST_MAPS, seed=5)
    partners = masked.partners
    assert sorted(partners) == [*range(200)]
    assert not torch.equal(LABELS[partners], LABELS)
    of_another_seed = dataclasses.replace(masked, seed=9)
    for other in (masked.in_epoch(2), of_another_seed):
        assert not torch.equal(partners, other.partners)


BAD_RULES = {
    "method": ("foo", ".*".join(map(repr, RULES))),
    "upsample": ("bicubic", "'bilinear', 'nearest' or 'map'"),
    "fill": ("black", "'zero' or 'resample'"),
    "param": (-1, "greater than or equal to 0"),
    "dilation": (-1, "greater than or equal to 0"),
    "rounds": (0, "greater than or equal to 1"),
    "dilate": (1, "Unexpected keyword argument"),
}


@pytest.mark.parametrize("name", BAD_RULES)
def test_an_unknown_name_or_value_is_refused_with_what_is_allowed(name):
    value, allowed = BAD_RULES[name]
    message = f"{name}\n .*{allowed} .*input_value={value!r}"
    with pytest.raises(ValueError, match=message):
        Rule(**{name: value})


def test_masks_by_an_unknown_method_or_of_too_few_maps_are_refused():
    with pytest.raises(ValueError, match="method is 'foo'; allowed: threshold, top_k"):
        create_mask(MAPS, "foo", 0.1)
    message = r"maps are \(3, 8, 8\); allowed: 200×h×w, one per image"
    with pytest.raises(ValueError, match=message):
        mask_dataset(TRAIN, MAPS[:3])


def test_rules_that_differ_have_names_that_differ():
    names = [f"{Rule('mean', param)}" for param in (2, 0.2, 0.20000001, 1e-7)]
    assert names == ["mean 2", "mean 0.2", "mean 0.20000001", "mean 1e-07"]
    assert f"{Rule('threshold', math.inf, dilation=2)}" == "threshold inf dilated by 2"
    assert f"{NOTHING}" == "nothing masked"


def test_dilation_is_in_28ths_of_the_shorter_side():
    """In all directions, up to the edge."""
    masks = torch.zeros(1, 56, 112)
    masks[0, 14, 0] = 1
    expected = torch.zeros_like(masks)
    expected[0, 6:23, :9] = 1
    rule = Rule("threshold", 0.5, dilation=4)
    wide = rule.image_masks(masks, (56, 112))
    assert torch.equal(wide, expected)
    high = rule.image_masks(masks.mT, (112, 56))
    assert torch.equal(high, expected.mT)


def test_a_shared_mask_is_that_of_the_mean_map():
    masked = mask_dataset(TRAIN, FIRST_MAPS, "threshold", 0.3, shared=True)
    mean = FIRST_MAPS.mean(0)
    mean -= mean.min()
    mean /= mean.max()
    (expected,) = resized(mean[None] > 0.3)
    assert 0 < expected.mean() < 1
    for mask in masked.masks(ALL):
        torch.testing.assert_close(mask, expected)
    by_exchange = Rule("threshold", 0.3, exchange=True).mask(TRAIN, FIRST_MAPS)
    assert torch.equal(by_exchange.own_masks, masked.own_masks)


def test_what_an_earlier_masking_hides_stays_hidden():
    rule = Rule("top_k", 0.1)
    first = rule.mask(TRAIN, FIRST_MAPS)
    second = rule.mask(TRAIN, SECOND_MAPS)
    both = rule.mask(TRAIN, SECOND_MAPS, earlier=first)
    expected = torch.maximum(first.own_masks, second.own_masks)
    assert torch.equal(both.own_masks, expected)
