from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masktune_utils import data, masking
from masktune_utils.settings import Upsample

MAPS = (torch.rand(50, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.2).clamp(
    min=0
)
MORE = torch.rand(2, 200, 8, 8, generator=torch.Generator().manual_seed(1))
SIZE = (28, 28)
ALL = slice(None)


def above(limit):
    return lambda s, param: s > limit(s, param)


def paper_limit(s, param):
    """As in the authors' code: mean + param · population standard deviation of positive values."""
    positive, options = np.where(s > 0, s, np.nan), {"axis": (-2, -1), "keepdims": True}
    return np.nanmean(positive, **options) + param * np.nanstd(positive, **options)


FORMULAS = {
    "threshold": above(lambda s, param: param),
    "top_k": above(
        lambda s, param: np.quantile(s, 1 - param, axis=(-2, -1), keepdims=True)
    ),
    "mean": above(lambda s, param: param * s.mean(axis=(-2, -1), keepdims=True)),
    "mean_std": above(paper_limit),
}


@pytest.mark.parametrize("param", [0.1, 0.3, 0.5, 0.7, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_equal_the_formulas(method, param):
    mask = masking.create_mask(MAPS, method, param)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, FORMULAS[method](MAPS.numpy(), param))
    assert torch.equal(masking.create_mask(MAPS[7], method, param), mask[7])
    assert torch.equal(masking.create_mask(MAPS.numpy(), method, param), mask)


@pytest.mark.parametrize("upsample", get_args(Upsample))
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_reach_the_size_of_the_image_as_they_should(method, upsample):
    mask = masking.image_masks(MAPS, SIZE, method, 0.3, upsample, 0)
    if upsample == "map" or method == "mean_std":
        maps = F.interpolate(
            MAPS[:, None], size=SIZE, mode="bilinear", align_corners=False
        )[:, 0]
        expected = FORMULAS[method](maps.numpy().astype(np.float64), 0.3)
        assert (mask.numpy() != expected).mean() < 1e-4  # ties at float32's last digit
    else:
        hard = torch.as_tensor(FORMULAS[method](MAPS.numpy(), 0.3)).float()
        expected = F.interpolate(hard[:, None], size=SIZE, mode=upsample)[:, 0]
        torch.testing.assert_close(mask, expected)
    soft = bool(((mask > 0) & (mask < 1)).any())
    assert soft == (upsample == "bilinear" and method != "mean_std")


def test_images_are_multiplied_by_what_is_not_hidden():
    images = torch.rand(50, 3, 28, 28)
    mask = masking.create_mask(MAPS, "top_k", 0.3)
    soft = F.interpolate(mask[:, None].float(), size=SIZE, mode="bilinear")
    expected = images * (1 - soft)
    torch.testing.assert_close(masking.apply_mask(images, mask), expected)
    torch.testing.assert_close(masking.apply_mask(images, soft[:, 0]), expected)
    torch.testing.assert_close(masking.apply_mask(images[4], mask[4]), expected[4])
    whole = (255 * images).byte()
    expected = (whole * (1 - soft)).round().byte()
    assert torch.equal(masking.apply_mask(whole, mask), expected)


def test_images_of_any_size_are_masked_at_that_size():
    images = torch.full((4, 3, 20, 32), 200, dtype=torch.uint8)
    split = data.Split(images, torch.zeros(4, dtype=torch.long))
    masked = masking.mask_dataset(split, torch.rand(4, 4, 6), "mean_std", 1.0)
    assert masked.batch(ALL)[0].shape == images.shape
    masked = masking.mask_dataset(split, torch.rand(4, 4, 6), "random", 0.2, seed=7)
    patches = masking.random_patches(4, 0.2, 7, (20, 32))
    assert torch.equal(masked.masks(ALL), patches.float())


def test_hidden_shares_of_known_masks(splits):
    maps = torch.zeros(200, 8, 8)
    maps[:, :4] = 1  # the upper half of the image
    masked = masking.mask_dataset(splits.train, maps, "threshold", 0.5, "nearest")
    shares = masking.hidden_shares(masked)
    assert shares["shortcut"] == shares["shortcut_whole"] == 1
    assert shares["rest"] == pytest.approx((14 * 28 - 36) / (28 * 28 - 36))
    ink = splits.train.images[splits.train.has_shortcut].double().mean(1)
    ink[:, :6, :6] = 0
    hidden = ink[:, :14].sum((1, 2)) / ink.sum((1, 2))
    assert shares["digit"] == pytest.approx(hidden.mean().item(), rel=1e-5)


@pytest.mark.parametrize("method", [*FORMULAS, "random"])
def test_hidden_shares_are_nan_where_no_image_has_a_square(splits, method):
    masked = masking.mask_dataset(splits.raw, MORE[0], method, 0.1)
    assert np.isnan([*masking.hidden_shares(masked).values()]).all()


def test_resampled_images_equal_the_formula_one_by_one(splits):
    split, how = splits.train, ("threshold", 0.5, "nearest")
    masked = masking.mask_dataset(
        split, MORE[0], *how, seed=3, fill="resample"
    ).in_epoch(2)
    pixels = split.images / 255
    for i, j in enumerate(masked.partners.tolist()):
        own, of_partner = masked.own_masks[i], masked.own_masks[j]
        hidden = (own | of_partner).float()
        expected = pixels[i] * (1 - hidden) + pixels[j] * hidden
        found, labels = masked.batch(torch.tensor([i]))
        assert torch.equal(found[0], expected) and labels.item() == split.labels[i]
        assert torch.equal(masked.masks(torch.tensor([i]))[0], hidden)
    hard = masking.image_masks(MORE[0], SIZE, *how, 0).bool()
    assert torch.equal(masked.own_masks, hard)


def test_soft_edges_are_resampled_by_their_share(splits):
    split = splits.train
    masked = masking.mask_dataset(split, MORE[0], "top_k", 0.3, fill="resample")
    soft = masking.image_masks(MORE[0], SIZE, "top_k", 0.3, "bilinear", 0)
    partners = masked.partners
    hidden = torch.maximum(soft, soft[partners])[:, None]
    pixels = split.images / 255
    expected = pixels * (1 - hidden) + pixels[partners] * hidden
    torch.testing.assert_close(masked.batch(ALL)[0], expected)


def test_partners_come_from_the_seed_anew_in_each_epoch_and_from_any_class():
    labels = torch.arange(20_000) % 2
    split = data.Split(torch.zeros(20_000, 3, 1, 1, dtype=torch.uint8), labels)
    nothing = torch.zeros(20_000, 1, 1, dtype=torch.bool)
    masked = masking.MaskedDataset(split, nothing, "resample", seed=5)
    first, second = masked.partners, masked.in_epoch(2).partners
    assert torch.equal(first, masked.in_epoch(1).partners) and not torch.equal(
        first, second
    )
    other = masking.MaskedDataset(split, nothing, "resample", seed=9)
    assert not torch.equal(first, other.partners)
    for partners in (first, second):
        assert torch.equal(
            partners.sort().values, torch.arange(20_000)
        )  # each is one once
        same_class = (labels[partners] == labels).double().mean().item()
        assert same_class == pytest.approx(0.5, abs=0.015)  # four standard deviations


@pytest.mark.parametrize("batch_size", [1, 7, 200])
def test_resampled_images_are_the_same_in_batches_of_any_size(splits, batch_size):
    masked = masking.mask_dataset(
        splits.train, MORE[0], "mean_std", 1.0, fill="resample"
    )
    whole, _ = masked.batch(ALL)
    parts = [masked.batch(i)[0] for i in torch.arange(200).split(batch_size)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(masked.images, (255 * whole).round().byte())


def test_shares_tell_what_is_really_hidden(splits):
    shares = {}
    for fill in ("zero", "resample"):
        masked = masking.mask_dataset(
            splits.train, MORE[0], "top_k", 0.1, "nearest", fill=fill
        )
        shares[fill] = masking.hidden_shares(masked)["rest"]
        has_shortcut = splits.train.has_shortcut
        outside = ~splits.train.shortcut[has_shortcut]
        hidden = masked.masks(ALL)[has_shortcut]
        expected = (hidden * outside).sum((1, 2)) / outside.sum((1, 2))
        assert shares[fill] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert shares["resample"] > 1.5 * shares["zero"]  # a union of two masks


def test_what_is_hidden_is_filled_with_zeros(splits):
    split, index = splits.train, torch.tensor([5, 0, 7])
    maps = torch.zeros(200, 8, 8)
    maps[:, :4] = 1  # the upper half of the image
    images = split.batch(index)[0]
    masked = masking.mask_dataset(split, maps, "threshold", 0.5, "nearest")
    found = masked.batch(index)[0]
    assert torch.equal(found[:, :, :14], torch.zeros(3, 3, 14, 28))
    assert torch.equal(found[:, :, 14:], images[:, :, 14:])
    assert masked.images.dtype == torch.uint8
    torch.testing.assert_close(masked.images[index] / 255, found, atol=0.002, rtol=0)


def test_an_unknown_method_and_too_few_maps_are_refused(splits):
    with pytest.raises(
        ValueError, match="method is 'foo'; allowed: threshold, top_k, mean, mean_std"
    ):
        masking.create_mask(MAPS[:0], "foo", 0.1)  # of an empty batch, too
    with pytest.raises(ValueError, match="3 maps; allowed: 200, one per image"):
        masking.mask_dataset(splits.train, MAPS[:3], "mean", 0.1)


def test_dilation_widens_a_mask_by_its_pixels_in_all_directions():
    mask = torch.zeros(28, 28)
    mask[10, 20] = mask[0, 0] = 1
    expected = torch.zeros(28, 28)
    expected[8:13, 18:23] = expected[:3, :3] = 1
    dilated = masking.image_masks(mask, SIZE, "threshold", 0.5, "bilinear", 2)
    assert torch.equal(dilated, expected)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5])
def test_random_patches_hide_the_share_on_average_at_every_place(share):
    patches = masking.random_patches(20_000, share, 4, SIZE)
    assert patches.float().mean().item() == pytest.approx(share, abs=0.01)
    if share:
        heights = patches.any(2).sum(1)
        assert heights.unique().numel() > 5
        places = patches.any(2).int().argmax(1)[heights == 4]
        assert places.unique().tolist() == list(range(25))
        assert not torch.equal(patches, masking.random_patches(20_000, share, 5, SIZE))


def test_what_an_earlier_masking_hides_stays_hidden(splits):
    how = ("top_k", 0.1, "nearest")
    first, alone = (masking.mask_dataset(splits.train, maps, *how) for maps in MORE)
    both = masking.mask_dataset(splits.train, MORE[1], *how, earlier=first)
    index = torch.tensor([5, 199])
    expected = torch.maximum(first.masks(index), alone.masks(index))
    assert torch.equal(both.masks(index), expected)
