"""A property that holds for whatever comes: 200 examples, the same in every run."""

from hypothesis import given, settings
from hypothesis import strategies as st

from masktune_utils.settings import DEFAULTS, RUNTIME, Settings

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


@settings(max_examples=200, derandomize=True, deadline=None)
@given(SETTINGS, SETTINGS, st.sampled_from([*FIELDS]))
def test_two_settings_share_a_file_only_if_they_are_the_same(first, other, name):
    with_one_change = first.replace(**{name: getattr(other, name)})
    for second in (other, with_one_change):
        for one, two in ((first, second), (first.base, second.base)):
            is_one_path = path_of(one) == path_of(two)
            assert is_one_path == (one.identity == two.identity)
        assert max(map(len, path_of(second).parts)) <= 220


def path_of(settings):
    return settings.checkpoint_path(settings.configuration)
