"""Settings: what is allowed, and where files go. Most bad values are in test_bad_input.py."""

import re

import pytest

from masktune_utils import experiment, store
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings


def test_names_of_files_tell_what_is_not_the_default(tmp_path):
    settings = Settings(directory=str(tmp_path), dataset="mnist")
    folder = tmp_path / "checkpoints/mnist/seed0"
    assert settings.checkpoint_path("base") == folder / "CNN_checkpoint_base.pth"
    path = settings.checkpoint_path(settings.configuration)
    assert path == folder / "CNN_checkpoint_finetuned_top_k_0.1.pth"
    settings = Settings(
        dataset="mnist5k", limit=200, epochs=1, seed=2, method="mean", dilation=1
    )
    assert (
        settings.folder("runs") == REPOSITORY / "runs/mnist5k_limit=200_epochs=1/seed2"
    )
    assert settings.configuration == "mean_0.1_dilation=1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "0"}, "seed is '0'; allowed: a valid integer."),
        ({"seed": 3.0}, "seed is 3.0; allowed: a valid integer."),
        ({"lr": float("nan")}, "lr is nan; allowed: a finite number."),
        (
            {"method": "random", "param": 1},
            "param is 1; allowed: 0 to 0.5 for method 'random'.",
        ),
        ({"foo": 1}, f"foo is not a setting; allowed: {', '.join(DEFAULTS)}."),
    ],
)
def test_a_bad_value_is_refused_and_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**values)


def test_a_directory_that_cannot_be_written_to_is_refused_and_a_new_one_is_made(
    tmp_path,
):
    (tmp_path / "file").touch()
    for directory in (tmp_path / "file", tmp_path / "file" / "below", "/proc/new"):
        with pytest.raises(
            ValueError, match=f"^directory is '{directory}'; allowed: a folder to wr"
        ):
            store.check_writable(str(directory))
    store.check_writable(str(tmp_path / "a" / "b"))
    assert [*(tmp_path / "a").rglob("*")] == [tmp_path / "a" / "b"]


SHOWN = 'directory = ""  # where files go\ndataset = "mnist5k"\nseed = 0  # of every'


def test_settings_of_a_notebook_are_read_from_its_cells(tmp_path):
    shown = SHOWN.replace('""', repr(str(tmp_path)))
    cells = [
        "",
        shown,
        "# Parameters\nseed = 3\nrounds = 2\n",
        "import torch",
        "seed = 9",
    ]
    namespace = {"In": cells, "seed": 9, "lrs": [1]}
    expected = Settings(directory=str(tmp_path), dataset="mnist5k", seed=3, rounds=2)
    assert experiment.from_notebook(namespace) == expected
    cells.append(
        shown.replace("seed = 0", "seed = 5")
    )  # run once more, changed by hand
    assert experiment.from_notebook(namespace) == expected.replace(seed=5, rounds=1)
    assert experiment.from_notebook(namespace, epochs=2).epochs == 2


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("epoch = 3", "epoch is not a parameter; allowed: epochs."),
        ("zzz = 3", "zzz is not a parameter; allowed: directory, device, "),
        ("seed = -1", "seed is -1; allowed: greater than or equal to 0."),
    ],
)
def test_unknown_parameters_are_refused_with_the_nearest_known_one(injected, message):
    cells = ["", SHOWN, f"# Parameters\n{injected}\n"]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experiment.from_notebook({"In": cells})
