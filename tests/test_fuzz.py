"""Properties that hold for whatever comes: 200 examples each, the same in every run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from masktune_utils import data, masking, metrics, shortcuts
from masktune_utils.settings import DEFAULTS, PARAM_LIMITS, RUNTIME, Settings

settings.register_profile(
    "properties", max_examples=200, derandomize=True, deadline=None
)
settings.load_profile("properties")

SIZE = (28, 28)
SHARES = st.floats(0, 1)
SALIENCY = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])
SHAPES = st.tuples(st.integers(1, 3), st.just(8), st.just(8))
MAPS = st_numpy.arrays(np.float32, SHAPES, elements=SALIENCY).map(torch.from_numpy)
UPSAMPLES = st.sampled_from(masking.UPSAMPLES)
HARD_UPSAMPLES = st.sampled_from(["nearest", "map"])
SEEDS = st.integers(0, 2**32 - 1)


def with_param(method: str) -> st.SearchStrategy[tuple[str, float]]:
    return st.tuples(st.just(method), st.floats(0, PARAM_LIMITS[method]))


RULES = st.sampled_from([*masking.RULES]).flatmap(with_param)


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


def split_of(labels: torch.Tensor, **options) -> data.Split:
    """Images of one pixel."""
    images = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return data.Split(images, labels, **options)


def image_masks(maps: torch.Tensor, size: tuple, *rule: object) -> torch.Tensor:
    """Masks by a rule: method, param, upsample, dilation."""
    return masking.Rule(*rule).image_masks(maps, size).float()


@given(MAPS, RULES, UPSAMPLES, st.integers(0, 26))
def test_masks_lie_in_0_1_and_are_monotone_in_dilation(maps, rule, upsample, dilation):
    masks = image_masks(maps, SIZE, *rule, upsample, dilation)
    assert masks.shape == (len(maps), *SIZE)
    assert masks.dtype == torch.float32
    assert masks.min() >= 0
    assert masks.max() <= 1
    if upsample != "bilinear":
        assert torch.equal(masks, masks.bool().float())
    wider = image_masks(maps, SIZE, *rule, upsample, dilation + 1)
    assert (masks <= wider).all()


@given(RULES, UPSAMPLES, st.integers(0, 27))
def test_maps_that_are_zero_everywhere_hide_nothing(rule, upsample, dilation):
    maps = torch.zeros(2, 8, 8)
    assert not image_masks(maps, SIZE, *rule, upsample, dilation).any()


@given(MAPS, RULES, SHARES, UPSAMPLES)
def test_masks_are_monotone_in_param(maps, rule, share, upsample):
    """More of `top_k` hides more; of the other methods it hides less."""
    method, high = rule
    low = share * high
    of_low = image_masks(maps, SIZE, method, low, upsample, 0)
    of_high = image_masks(maps, SIZE, method, high, upsample, 0)
    if method == "top_k":
        assert (of_low <= of_high + 1e-6).all()
    else:
        assert (of_low >= of_high - 1e-6).all()


@given(MAPS, RULES, HARD_UPSAMPLES, SEEDS)
def test_masking_twice_with_hard_edges_equals_once(maps, rule, upsample, seed):
    images = random_images(len(maps), seed)
    masks = image_masks(maps, SIZE, *rule, upsample, 0)
    once = masking.apply_mask(images, masks)
    assert torch.equal(masking.apply_mask(once, masks), once)
    is_shown = masks == 0
    assert torch.equal(once, images * is_shown[:, None])


@given(MAPS, RULES, UPSAMPLES, st.integers(0, 27), SEEDS)
def test_a_masked_image_is_the_same_in_any_batch(maps, rule, upsample, dilation, seed):
    split = data.Split(random_images(len(maps), seed), torch.arange(len(maps)))
    masked = masking.mask_dataset(split, maps, *rule, upsample, dilation)
    masks = image_masks(maps, SIZE, *rule, upsample, dilation)
    expected = split.images / 255 * (1 - masks[:, None])
    together, _ = masked.batch(slice(None))
    assert torch.equal(together, expected)
    for number in range(len(maps)):
        images, labels = masked.batch(torch.tensor([number]))
        assert torch.equal(images[0], expected[number])
        assert labels.tolist() == [number]


@given(integers(1, 60), SEEDS)
def test_groups_are_a_partition_and_their_accuracies_add_up(labels, seed):
    numbers = torch.rand(2, len(labels), generator=generator(seed))
    has_shortcut, predictions = numbers < 0.5
    split = split_of(labels, shortcut=has_shortcut.view(-1, 1, 1))
    groups = shortcuts.groups(split)
    everyone = torch.cat([*groups.values()]).sort().values
    assert everyone.tolist() == list(range(len(labels)))
    logits = torch.eye(2)[predictions.long()]
    accuracy = metrics.group_accuracy(logits, split)
    hits = sum(accuracy[name] * len(index) for name, index in groups.items())
    assert hits == pytest.approx((predictions == labels).sum().item())


# Values of each setting that are not the default, and of which some look alike.
VALUES = {
    "dataset": ["mnist5k"],
    "seed": [1, 11],
    "limit": [20, 200],
    "labels": ["digits"],
    "square_size": [1, 16],
    "square_color": ["red", "#0000ff"],
    "placement": ["ordered"],
    "shortcut": ["none", "frame", "two_squares"],
    "conflicting_share": [0.0, 0.1],
    "validation_share": [0.1],
    "epochs": [1, 10],
    "batch_size": [2],
    "lr": [0.1],
    "lr_decay_epochs": [1, 10],
    "method": ["mean", "mean_std"],
    "param": [0.11, 1e-7, 1],
    "upsample": ["map"],
    "dilation": [1, 11],
    "shared": [True],
    "fill": ["resample"],
    "rounds": [2, 12],
    "finetune_optimizer": ["adam"],
    "finetune_lr": [0.01, 0.1],
    "finetune_schedule": ["linear"],
    "finetune_batch_size": [3, 32],
    "finetune_epochs": [2, 10],
}
FIELDS = {}
for setting, others in VALUES.items():
    FIELDS[setting] = st.sampled_from([DEFAULTS[setting], *others])
FIELDS["dataset"] = st.sampled_from(["mnist", "mnist5k"])


SETTINGS = st.builds(Settings, **FIELDS)


def test_every_setting_is_tried_below():
    assert VALUES.keys() == {*Settings.model_fields} - {*RUNTIME}


@given(SETTINGS, SETTINGS, st.sampled_from([*FIELDS]))
def test_two_settings_share_a_file_only_if_they_are_the_same(first, other, name):
    with_one_change = first.replace(**{name: getattr(other, name)})
    for second in (other, with_one_change):
        bases = [settings.checkpoint_path("base") for settings in (first, second)]
        is_same = first.identity(base=True) == second.identity(base=True)
        assert (bases[0] == bases[1]) == is_same
        tuned = [
            settings.checkpoint_path(settings.configuration)
            for settings in (first, second)
        ]
        is_same = first.identity(base=False) == second.identity(base=False)
        assert (tuned[0] == tuned[1]) == is_same
        for path in bases + tuned:
            assert len(path.name.encode()) <= 200
            assert len(path.parts[-3].encode()) <= 200
