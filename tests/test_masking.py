"""Masks, and images that are masked by them."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masktune_utils import data, evaluation, masking

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


def threshold(maps, param):
    return maps > param


def top_k(maps, param):
    return maps > np.quantile(maps, 1 - param, **EACH_MAP)


def mean(maps, param):
    return maps > param * maps.mean(**EACH_MAP)


def mean_std(maps, param):
    """As in the authors' code: with the population's standard deviation."""
    positive = np.where(maps > 0, maps, np.nan)
    deviation = np.nanstd(positive, **EACH_MAP)
    return maps > np.nanmean(positive, **EACH_MAP) + param * deviation


FORMULAS = {"threshold": threshold, "top_k": top_k, "mean": mean, "mean_std": mean_std}


@pytest.mark.parametrize("param", [0.1, 0.3, 0.5, 0.7, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_equal_the_formulas(method, param):
    mask = masking.create_mask(MAPS, method, param)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, FORMULAS[method](MAPS.numpy(), param))
    assert torch.equal(masking.create_mask(MAPS[7], method, param), mask[7])
    assert torch.equal(masking.create_mask(MAPS.numpy(), method, param), mask)


@pytest.mark.parametrize("method", FORMULAS)
def test_a_map_that_is_zero_everywhere_hides_nothing(method):
    """Nor does one that is the same everywhere, by mean_std."""
    assert not masking.create_mask(torch.zeros(3, 8, 8), method, 0.0).any()
    assert not masking.create_mask(torch.full((3, 8, 8), 0.5), "mean_std", 2.0).any()


@pytest.mark.parametrize("upsample", masking.UPSAMPLES)
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_reach_the_size_of_the_image_as_they_should(method, upsample):
    """Those with soft edges as floats, and only those."""
    mask = masking.Rule(method, 0.3, upsample).image_masks(MAPS, SIZE)
    has_soft_edges = upsample == "bilinear" and method != "mean_std"
    assert mask.dtype == (torch.float32 if has_soft_edges else torch.bool)
    if upsample == "map" or method == "mean_std":
        maps = F.interpolate(MAPS[:, None], size=SIZE, mode="bilinear")[:, 0]
        expected = FORMULAS[method](maps.numpy().astype(np.float64), 0.3)
        assert (mask.numpy() != expected).mean() < 1e-4  # ties at float32's last digit
    else:
        hard = torch.as_tensor(FORMULAS[method](MAPS.numpy(), 0.3)).float()
        expected = F.interpolate(hard[:, None], size=SIZE, mode=upsample)[:, 0]
        torch.testing.assert_close(mask.float(), expected)


def test_images_are_multiplied_by_what_is_not_hidden():
    images = PIXELS[:50]
    mask = masking.create_mask(MAPS, "top_k", 0.3)
    soft = F.interpolate(mask[:, None].float(), size=SIZE, mode="bilinear")
    expected = images * (1 - soft)
    torch.testing.assert_close(masking.apply_mask(images, soft[:, 0]), expected)
    torch.testing.assert_close(masking.apply_mask(images[4], mask[4]), expected[4])
    whole_numbers = TRAIN.images[:50]
    expected = (whole_numbers * (1 - soft)).round().byte()
    assert torch.equal(masking.apply_mask(whole_numbers, mask), expected)


@pytest.mark.parametrize("fill", masking.FILLS)
def test_shares_tell_what_is_really_hidden(fill, splits):
    train = splits.train
    images = train.images.clone()
    images[train.has_shortcut.nonzero()[0]] = 0  # without ink there is no share of it
    train = dataclasses.replace(train, images=images)
    maps = FIRST_MAPS.clone()
    maps[::2] = 1
    masked = masking.mask_dataset(train, maps, "threshold", 0.7, fill=fill)
    hidden = masked.masks(ALL)[train.has_shortcut].double()
    inside = train.shortcut[train.has_shortcut].double()
    ink = images[train.has_shortcut].double().sum(1) * (1 - inside)
    expected = {}
    for name, area in {"shortcut": inside, "rest": 1 - inside, "digit": ink}.items():
        shares = (hidden * area).sum((1, 2)) / area.sum((1, 2))
        expected[name] = shares[~shares.isnan()].mean().item()
        if name == "shortcut":
            expected["shortcut_whole"] = shares.eq(1).double().mean().item()
    assert evaluation.hidden_shares(masked) == pytest.approx(expected, rel=1e-5)
    no_square = masking.mask_dataset(splits.raw[:200], maps)
    assert np.isnan([*evaluation.hidden_shares(no_square).values()]).all()


@pytest.mark.parametrize("fill", masking.FILLS)
@pytest.mark.parametrize("rule", [("threshold", 0.5, "nearest"), ("top_k", 0.3)])
def test_masked_images_equal_the_formula(rule, fill):
    """Soft edges are filled by their share."""
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
    """Of any class: 20,000 images of one pixel, in two classes."""
    numbers = torch.arange(20_000)
    split = data.Split(torch.zeros(20_000, 3, 1, 1), numbers % 2)
    nothing = torch.zeros(20_000, 1, 1)
    rule = {"method": "threshold", "fill": "resample"}
    masked = masking.mask_dataset(split, nothing, **rule, seed=5)
    partners = masked.partners
    assert torch.equal(partners.sort().values, numbers)
    same_class = (split.labels[partners] == split.labels).double().mean().item()
    assert same_class == pytest.approx(0.5, abs=0.015)  # four standard deviations
    again = masking.MaskedDataset(split, nothing, "resample", seed=5)
    assert torch.equal(partners, again.in_epoch(1).partners)
    for other in (masked.in_epoch(2), dataclasses.replace(masked, seed=9)):
        assert not torch.equal(partners, other.partners)


UNKNOWN = {
    "method is 'foo'; allowed: threshold, top_k, mean, mean_std": ("foo", 0.1),
    "upsample is 'bicubic'; allowed: bilinear, nearest, map": ("mean", 0.1, "bicubic"),
    "fill is 'black'; allowed: zero, resample": ("mean", 0.1, "map", 0, False, "black"),
}


@pytest.mark.parametrize("message", UNKNOWN)
def test_an_unknown_name_is_refused(message):
    with pytest.raises(ValueError, match=message):
        masking.Rule(*UNKNOWN[message])
    with pytest.raises(ValueError, match="method is 'foo'; allowed: threshold, top_k"):
        masking.create_mask(MAPS, "foo", 0.1)


@pytest.mark.parametrize("values", [{"param": -1}, {"dilation": -1}, {"rounds": 0}])
def test_a_number_that_is_too_small_is_refused(values):
    ((name, value),) = values.items()
    with pytest.raises(ValueError, match=f"{name} is {value}; allowed: . or more"):
        masking.Rule(**values)


@pytest.mark.parametrize("method", masking.RULES)
def test_an_empty_batch_of_maps_gives_an_empty_batch_of_masks(method):
    mask = masking.create_mask(MAPS[:0], method, 0.1)
    assert mask.shape == (0, 8, 8)
    assert mask.dtype == torch.bool


def test_too_few_maps_are_refused():
    message = r"maps are \(3, 8, 8\); allowed: 200×h×w, one per image"
    with pytest.raises(ValueError, match=message):
        masking.mask_dataset(TRAIN, MAPS[:3])


@pytest.mark.parametrize(
    ("size", "dilation", "pixels"),
    [((28, 28), 2, 2), ((112, 112), 4, 16), ((28, 112), 2, 2)],
)
def test_dilation_is_in_28ths_of_the_shorter_side(size, dilation, pixels):
    """In all directions, up to the edge."""
    masks = torch.zeros(2, *size)
    masks[0, 14, 20] = 1
    masks[1, 0, 0] = 1
    expected = torch.zeros(2, *size)
    top = max(0, 14 - pixels)
    expected[0, top : 15 + pixels, 20 - pixels : 21 + pixels] = 1
    expected[1, : 1 + pixels, : 1 + pixels] = 1
    dilated = image_masks(masks, size, "threshold", 0.5, "bilinear", dilation)
    assert torch.equal(dilated, expected)


@pytest.mark.parametrize("method", FORMULAS)
def test_a_shared_mask_is_that_of_the_mean_map(method):
    masked = masking.mask_dataset(TRAIN, FIRST_MAPS, method, 0.3, shared=True)
    mean = FIRST_MAPS.sum(0) / len(FIRST_MAPS)
    mean = (mean - mean.min()) / (mean.max() - mean.min())
    expected = image_masks(mean, SIZE, method, 0.3)
    assert 0 < expected.mean() < 1
    torch.testing.assert_close(masked.masks(ALL), expected.expand(200, *SIZE))


def test_a_mean_map_that_is_flat_hides_nothing():
    assert masking.mean_map(torch.full((5, 8, 8), 0.5)).eq(0).all()


def test_what_an_earlier_masking_hides_stays_hidden():
    rule = masking.Rule("top_k", 0.1)
    first = rule.mask(TRAIN, FIRST_MAPS)
    second = rule.mask(TRAIN, SECOND_MAPS)
    both = rule.mask(TRAIN, SECOND_MAPS, earlier=first)
    expected = torch.maximum(first.own_masks, second.own_masks)
    assert torch.equal(both.own_masks, expected)


def test_a_rule_in_words():
    assert str(masking.Rule(param=3.5, dilation=3)) == "mean_std 3.5 dilated by 3"
    described = str(masking.Rule(param=4.0, dilation=3, fill="resample", rounds=2))
    assert described == "mean_std 4 dilated by 3, resampled, 2 rounds"
    described = str(masking.Rule(fill="resample", shared=True))
    assert described == "mean_std 2, shared, resampled"
