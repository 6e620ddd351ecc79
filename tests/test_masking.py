"""Masks, and images that are masked by them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masktune_utils import data, masking, results

SIZE = (20, 28)
ALL = slice(None)
EACH_MAP = {"axis": (-2, -1), "keepdims": True}


def image_masks(maps: torch.Tensor, size: tuple, *rule: object) -> torch.Tensor:
    """Masks by a rule: method, param, upsample, dilation."""
    return masking.Rule(*rule).image_masks(maps, size).float()


def random_maps(*shape: int, seed: int) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# A fifth of the pixels are zero.
MAPS = (random_maps(50, 8, 8, seed=0) - 0.2).clamp(min=0)
FIRST_MAPS, SECOND_MAPS = random_maps(2, 200, 8, 8, seed=1)
PIXELS = random_maps(200, 3, *SIZE, seed=2)
TRAIN = data.Split((255 * PIXELS).byte(), torch.arange(200) % 2)


def limit(maps: np.ndarray, method: str, param: float) -> np.ndarray | float:
    """What a map must exceed to be hidden."""
    if method == "threshold":
        return param
    if method == "top_k":
        return np.quantile(maps, 1 - param, **EACH_MAP)
    if method == "mean":
        return param * maps.mean(**EACH_MAP)
    # mean_std: as in the authors' code, with the population's standard deviation
    positive = np.where(maps > 0, maps, np.nan)
    deviation = np.nanstd(positive, **EACH_MAP)
    return np.nanmean(positive, **EACH_MAP) + param * deviation


@pytest.mark.parametrize("param", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("method", masking.RULES)
def test_masks_equal_the_formulas(method, param):
    mask = masking.create_mask(MAPS, method, param)
    assert mask.dtype == torch.bool
    expected = MAPS.numpy() > limit(MAPS.numpy(), method, param)
    np.testing.assert_array_equal(mask, expected)
    assert torch.equal(masking.create_mask(MAPS[7], method, param), mask[7])
    assert torch.equal(masking.create_mask(MAPS.numpy(), method, param), mask)


@pytest.mark.parametrize("method", masking.RULES)
def test_a_map_that_is_zero_everywhere_hides_nothing(method):
    """Nor does one that is the same everywhere, by mean_std."""
    assert not masking.create_mask(torch.zeros(3, 8, 8), method, 0.0).any()
    flat = torch.full((3, 8, 8), 0.5)
    assert not masking.create_mask(flat, "mean_std", 2.0).any()
    assert not masking.mean_map(flat).any()


@pytest.mark.parametrize("upsample", ["bilinear", "nearest", "map"])
@pytest.mark.parametrize("method", masking.RULES)
def test_masks_reach_the_size_of_the_image_as_they_should(method, upsample):
    """Those with soft edges as floats, and only those."""
    mask = masking.Rule(method, 0.3, upsample).image_masks(MAPS, SIZE)
    has_soft_edges = upsample == "bilinear" and method != "mean_std"
    assert mask.dtype == (torch.float32 if has_soft_edges else torch.bool)
    if upsample == "map" or method == "mean_std":
        maps = F.interpolate(MAPS[:, None], size=SIZE, mode="bilinear")[:, 0]
        maps = maps.double().numpy()
        expected = maps > limit(maps, method, 0.3)
        assert (mask.numpy() != expected).mean() < 1e-4  # ties at float32's last digit
    else:
        hard = masking.create_mask(MAPS, method, 0.3).float()
        expected = F.interpolate(hard[:, None], size=SIZE, mode=upsample)[:, 0]
        torch.testing.assert_close(mask.float(), expected)


def test_bytes_are_masked_too_one_or_many_and_masks_are_resized():
    mask = masking.create_mask(MAPS, "top_k", 0.3)
    soft = F.interpolate(mask[:, None].float(), size=SIZE, mode="bilinear")
    images = TRAIN.images[:50]
    expected = (images * (1 - soft)).round().byte()
    assert torch.equal(masking.apply_mask(images, mask), expected)
    assert torch.equal(masking.apply_mask(images[4], mask[4]), expected[4])


def test_shares_tell_what_is_really_hidden():
    """In three images of 2×2; but for the last one, the shortcut is on the left."""
    images = torch.zeros(3, 3, 2, 2, dtype=torch.uint8)
    images[0] = torch.tensor([[99, 30], [0, 10]])  # the second has no ink to be hidden
    shortcut = torch.zeros(3, 2, 2, dtype=torch.bool)
    shortcut[:2, :, 0] = True
    split = data.Split(images, torch.tensor([0, 0, 0]), shortcut=shortcut)
    masks = torch.ones(3, 2, 2)
    masks[0] = torch.tensor([[1, 0.5], [0, 0]])
    shares = results.hidden_shares(masking.MaskedDataset(split, masks))
    expected = {
        "shortcut": (0.5 + 1) / 2,
        "shortcut_whole": 0.5,
        "rest": (0.25 + 1) / 2,
        "digit": 0.5 * 30 / 40,
    }
    assert shares == pytest.approx(expected)
    resampled = masking.MaskedDataset(split, masks, "resample")
    assert results.hidden_shares(resampled)["rest"] > shares["rest"]
    without = masking.MaskedDataset(split[2:], masks[2:])
    for share in results.hidden_shares(without).values():
        assert np.isnan(share)


@pytest.mark.parametrize("fill", ["zero", "resample"])
def test_masked_images_equal_the_formula(fill):
    """Soft edges are filled by their share."""
    rule = ("top_k", 0.3)
    masked = masking.mask_dataset(TRAIN, FIRST_MAPS, *rule, seed=3, fill=fill)
    masked = masked.in_epoch(2)
    pixels = TRAIN.images / 255
    hidden = image_masks(FIRST_MAPS, SIZE, *rule)
    filled = torch.zeros_like(pixels)
    if fill == "resample":
        hidden = torch.maximum(hidden, hidden[masked.partners])
        filled = pixels[masked.partners]
    assert torch.equal(masked.masks(ALL), hidden)
    share = hidden[:, None]
    whole, labels = masked.batch(ALL)
    assert torch.equal(whole, pixels * (1 - share) + filled * share)
    assert torch.equal(labels, TRAIN.labels)
    batches = [masked.batch(index)[0] for index in torch.arange(200).split(7)]
    assert torch.equal(torch.cat(batches), whole)
    assert torch.equal(masked.images, (255 * whole).round().byte())


def test_partners_are_a_permutation_by_the_seed_anew_in_each_epoch():
    """Of any class."""
    masked = masking.MaskedDataset(TRAIN, torch.zeros(200, 1, 1), seed=5)
    partners = masked.partners
    assert torch.equal(partners.sort().values, torch.arange(200))
    assert not torch.equal(TRAIN.labels[partners], TRAIN.labels)
    assert torch.equal(partners, masked.in_epoch(1).partners)
    for other in (masked.in_epoch(2), dataclasses.replace(masked, seed=9)):
        assert not torch.equal(partners, other.partners)


BAD_RULES = {
    "method": ("foo", "'threshold', 'top_k', 'mean' or 'mean_std'"),
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
    with pytest.raises(
        ValueError, match=f"{name}\n .*{allowed} .*input_value={value!r}"
    ):
        masking.Rule(**{name: value})


def test_masks_by_an_unknown_method_are_refused():
    with pytest.raises(ValueError, match="method is 'foo'; allowed: threshold, top_k"):
        masking.create_mask(MAPS, "foo", 0.1)


def test_too_few_maps_are_refused():
    message = r"maps are \(3, 8, 8\); allowed: 200×h×w, one per image"
    with pytest.raises(ValueError, match=message):
        masking.mask_dataset(TRAIN, MAPS[:3])


@pytest.mark.parametrize(
    ("size", "dilation", "pixels"),
    [((28, 28), 2, 2), ((56, 56), 4, 8), ((28, 112), 2, 2)],
)
def test_dilation_is_in_28ths_of_the_shorter_side(size, dilation, pixels):
    """In all directions, up to the edge."""
    masks = torch.zeros(1, *size)
    masks[0, 14, 0] = 1
    expected = torch.zeros(1, *size)
    expected[0, 14 - pixels : 15 + pixels, : 1 + pixels] = 1
    dilated = image_masks(masks, size, "threshold", 0.5, "bilinear", dilation)
    assert torch.equal(dilated, expected)


def test_a_shared_mask_is_that_of_the_mean_map():
    masked = masking.mask_dataset(TRAIN, FIRST_MAPS, "threshold", 0.3, shared=True)
    mean = FIRST_MAPS.sum(0) / 200
    mean = (mean - mean.min()) / (mean.max() - mean.min())
    expected = image_masks(mean, SIZE, "threshold", 0.3)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(masked.masks(ALL), expected.expand(200, *SIZE))


def test_what_an_earlier_masking_hides_stays_hidden():
    rule = masking.Rule("top_k", 0.1)
    first = rule.mask(TRAIN, FIRST_MAPS)
    second = rule.mask(TRAIN, SECOND_MAPS)
    both = rule.mask(TRAIN, SECOND_MAPS, earlier=first)
    expected = torch.maximum(first.own_masks, second.own_masks)
    assert torch.equal(both.own_masks, expected)
