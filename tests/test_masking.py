import numpy as np
import pytest
import torch
import torch.nn.functional as F

from masktune_utils import data, masking

MAPS = (torch.rand(50, 8, 8, generator=torch.Generator().manual_seed(0)) - 0.2).clamp(min=0)
FORMULAS = {
    "threshold": lambda s, param: s > param,
    "top_k": lambda s, param: s > np.quantile(s, 1 - param, axis=(-2, -1), keepdims=True),
    "mean": lambda s, param: s > param * s.mean(axis=(-2, -1), keepdims=True),
    "mean_std": lambda s, param: s > paper_limit(np.where(s > 0, s, np.nan), param),
}


def paper_limit(positive, param):
    """As in the authors' code: mean + param · population standard deviation of the positive values."""
    return np.nanmean(positive, axis=(-2, -1), keepdims=True) + param * np.nanstd(positive, (-2, -1), keepdims=True)


@pytest.mark.parametrize("param", [0.1, 0.3, 0.5, 0.7, 0.9, 0.0, 1.0])
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_equal_the_formulas(method, param):
    mask = masking.create_mask(MAPS, method, param)
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask, FORMULAS[method](MAPS.numpy(), param))
    assert torch.equal(masking.create_mask(MAPS[7], method, param), mask[7])


@pytest.mark.parametrize("method", FORMULAS)
def test_a_map_that_is_zero_everywhere_hides_nothing(method):
    assert not masking.create_mask(torch.zeros(3, 8, 8), method, 0.5).any()
    assert masking.image_masks(torch.zeros(3, 8, 8), method, 0.5, "map").sum() == 0


@pytest.mark.parametrize("method", FORMULAS)
def test_no_maps_give_no_masks(method):
    assert masking.create_mask(torch.zeros(0, 8, 8), method, 0.5).shape == (0, 8, 8)


def test_top_k_hides_the_share_that_param_says():
    assert masking.create_mask(MAPS, "top_k", 0.25).flatten(1).sum(1).tolist() == [16] * 50


@pytest.mark.parametrize("upsample", masking.UPSAMPLES)
@pytest.mark.parametrize("method", FORMULAS)
def test_masks_reach_the_size_of_the_image_as_they_should(method, upsample):
    mask = masking.image_masks(MAPS, method, 0.3, upsample)
    if upsample == "map" or method == "mean_std":
        maps = F.interpolate(MAPS[:, None], size=(28, 28), mode="bilinear", align_corners=False)[:, 0]
        expected = FORMULAS[method](maps.numpy().astype(np.float64), 0.3)
        assert (mask.numpy() != expected).mean() < 1e-4  # ties at float32's last digit
    else:
        hard = torch.as_tensor(FORMULAS[method](MAPS.numpy(), 0.3)).float()
        torch.testing.assert_close(mask, F.interpolate(hard[:, None], size=(28, 28), mode=upsample)[:, 0])
    soft = bool(((mask > 0) & (mask < 1)).any())
    assert soft == (upsample == "bilinear" and method != "mean_std")


def test_bilinear_upsampling_is_a_weighted_mean_at_half_pixel_centres():
    hard = masking.create_mask(MAPS[:1], "threshold", 0.5)
    source = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    low = np.clip(np.floor(source).astype(int), 0, 7)
    high = np.clip(low + 1, 0, 7)
    weight = np.clip(source, 0, 7) - low
    matrix = np.zeros((28, 8))
    np.add.at(matrix, (np.arange(28), low), 1 - weight)
    np.add.at(matrix, (np.arange(28), high), weight)
    expected = matrix @ hard[0].numpy() @ matrix.T
    np.testing.assert_allclose(masking.image_masks(MAPS[:1], "threshold", 0.5)[0], expected, atol=1e-6)


def test_images_are_multiplied_by_what_is_not_hidden():
    images = torch.rand(50, 3, 28, 28)
    mask = masking.create_mask(MAPS, "top_k", 0.3)
    soft = F.interpolate(mask[:, None].float(), size=(28, 28), mode="bilinear")
    torch.testing.assert_close(masking.apply_mask(images, mask), images * (1 - soft))
    torch.testing.assert_close(masking.apply_mask(images, soft[:, 0]), images * (1 - soft))
    torch.testing.assert_close(masking.apply_mask(images[4], mask[4]), (images * (1 - soft))[4])
    whole = torch.full((2, 3, 28, 28), 200, dtype=torch.uint8)
    assert masking.apply_mask(whole, torch.eye(28)[None].bool()).unique().tolist() == [0, 200]


@pytest.mark.parametrize("upsample", masking.UPSAMPLES)
def test_masked_dataset_masks_batch_by_batch(splits, upsample):
    maps = torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(1))
    masked = masking.mask_dataset(splits.train, maps, "mean", 0.9, upsample)
    index = torch.tensor([17, 150, 3])
    images, labels = masked.batch(index)
    mask = masking.image_masks(maps[index], "mean", 0.9, upsample)
    torch.testing.assert_close(images, splits.train.images[index] / 255 * (1 - mask[:, None]))
    assert torch.equal(labels, splits.train.labels[index]) and len(masked) == 200
    assert torch.equal(masked.labels, splits.train.labels)


@pytest.mark.parametrize(("method", "param"), [("mean_std", 1.0), ("random", 0.2)])
def test_images_of_any_size_are_masked_at_that_size(method, param):
    images = torch.full((4, 3, 20, 32), 200, dtype=torch.uint8)
    split = data.Split(images, torch.zeros(4, dtype=torch.long), torch.zeros(4), torch.zeros(4, dtype=torch.bool))
    masked = masking.mask_dataset(split, torch.rand(4, 4, 6), method, param)
    assert masked.masks(slice(None)).shape == (4, 20, 32)
    assert masked.batch(slice(None))[0].shape == images.shape


def test_hidden_shares_of_known_masks(splits):
    maps = torch.zeros(200, 8, 8)
    maps[:, :4, :] = 1  # the upper half of the image
    masked = masking.mask_dataset(splits.train, maps, "threshold", 0.5, "nearest")
    shares = masking.hidden_shares(masked, square_size=6)
    assert shares["square"] == shares["square_whole"] == 1
    assert shares["rest"] == pytest.approx((14 * 28 - 36) / (28 * 28 - 36))
    ink = splits.train.images[splits.train.has_square].double().mean(1)
    ink[:, :6, :6] = 0
    assert shares["digit"] == pytest.approx((ink[:, :14].sum((1, 2)) / ink.sum((1, 2))).mean().item(), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "param", "message"),
    [
        ("foo", 0.1, "method is 'foo'; allowed: 'threshold', 'top_k', 'mean', 'mean_std'"),
        ("top_k", 7, "param is 7; allowed for method 'top_k': 0 to 1"),
        ("threshold", -0.1, "param is -0.1; allowed for method 'threshold': 0 to 1"),
        ("mean", float("nan"), "param is nan; allowed for method 'mean': 0 to 64"),
    ],
)
def test_bad_rules_are_refused(method, param, message, splits):
    with pytest.raises(ValueError, match=message):
        masking.create_mask(MAPS, method, param)
    with pytest.raises(ValueError, match=message):
        masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), method, param)


def test_bad_upsampling_and_too_few_maps_are_refused(splits):
    with pytest.raises(ValueError, match="upsample is 'cubic'; allowed: 'bilinear', 'nearest', 'map'"):
        masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), "mean", 0.1, "cubic")
    with pytest.raises(ValueError, match="200 images and 3 saliency maps"):
        masking.mask_dataset(splits.train, torch.zeros(3, 8, 8), "mean", 0.1)


def test_grown_masks_are_dilated_by_so_many_pixels():
    mask = torch.zeros(28, 28)
    mask[10, 20] = mask[0, 0] = 1
    grown = masking.image_masks(mask, "threshold", 0.5, grow=2)
    expected = torch.zeros(28, 28)
    expected[8:13, 18:23] = expected[:3, :3] = 1
    assert torch.equal(grown, expected)
    soft = masking.image_masks(MAPS, "top_k", 0.1)
    assert (masking.image_masks(MAPS, "top_k", 0.1, grow=1) >= soft).all()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.3, 0.5])
def test_random_patches_are_squares_inside_the_image_and_hide_the_share_on_average(share):
    patches = masking.random_patches(20_000, share, seed=4)
    assert patches.float().mean().item() == pytest.approx(share, abs=0.01)
    heights, widths = patches.any(2).sum(1), patches.any(1).sum(1)
    assert torch.equal(heights, widths) and torch.equal(heights * widths, patches.sum((1, 2)))
    assert torch.equal(patches, masking.random_patches(20_000, share, seed=4))
    if share:
        assert heights.unique().numel() > 5
        places = patches.any(2).int().argmax(1)[heights == 4]
        assert places.unique().tolist() == list(range(25))
        assert not torch.equal(patches, masking.random_patches(20_000, share, seed=5))


def test_random_masks_ask_no_map(splits):
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), "random", 0.2, seed=7)
    assert torch.equal(masked.masks(slice(None)), masking.random_patches(200, 0.2, seed=7).float())
    with pytest.raises(ValueError, match="method is 'random'; allowed: 'threshold', 'top_k', 'mean', 'mean_std'"):
        masking.create_mask(MAPS, "random", 0.2)


def test_what_an_earlier_masking_hides_stays_hidden(splits):
    maps = torch.rand(2, 200, 8, 8, generator=torch.Generator().manual_seed(1))
    first = masking.mask_dataset(splits.train, maps[0], "top_k", 0.1, "nearest")
    alone = masking.mask_dataset(splits.train, maps[1], "top_k", 0.1, "nearest")
    both = masking.mask_dataset(splits.train, maps[1], "top_k", 0.1, "nearest", earlier=first)
    index = torch.tensor([5, 199])
    assert torch.equal(both.masks(index), torch.maximum(first.masks(index), alone.masks(index)))
