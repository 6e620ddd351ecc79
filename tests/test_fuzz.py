"""Properties that hold for whatever comes: 50 examples each, the same in every run."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from masktune_utils import masking
from masktune_utils.settings import DEFAULTS, PARAM_LIMITS, RUNTIME, Settings

settings.register_profile(
    "properties", max_examples=50, derandomize=True, deadline=None
)
settings.load_profile("properties")

SIZE = (28, 36)
SALIENCY = st.floats(0, 1, width=32) | st.sampled_from([0.0, 0.5, 1.0])
SHAPES = st.tuples(st.integers(1, 3), st.just(8), st.just(8))
MAPS = st_numpy.arrays(np.float32, SHAPES, elements=SALIENCY).map(torch.from_numpy)
UPSAMPLES = st.sampled_from(masking.UPSAMPLES)


RULES = st.one_of(
    st.tuples(st.just(method), st.floats(0, most))
    for method, most in PARAM_LIMITS.items()
)


def image_masks(maps: torch.Tensor, size: tuple, *rule: object) -> torch.Tensor:
    """Masks by a rule: method, param, upsample, dilation."""
    return masking.Rule(*rule).image_masks(maps, size).float()


@given(MAPS, RULES, UPSAMPLES, st.integers(0, 26))
def test_masks_lie_in_0_1_and_are_monotone_in_dilation(maps, rule, upsample, dilation):
    masks = image_masks(maps, SIZE, *rule, upsample, dilation)
    assert masks.shape == (len(maps), *SIZE)
    assert masks.min() >= 0
    assert masks.max() <= 1
    wider = image_masks(maps, SIZE, *rule, upsample, dilation + 1)
    assert (masks <= wider).all()


@given(RULES, UPSAMPLES, st.integers(0, 27))
def test_maps_that_are_zero_everywhere_hide_nothing(rule, upsample, dilation):
    maps = torch.zeros(2, 8, 8)
    assert not image_masks(maps, SIZE, *rule, upsample, dilation).any()


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
