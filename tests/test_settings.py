"""Settings: what is allowed, and where files go. More bad values: test_bad_input.py."""

import re

import pytest

from masktune_utils import experiment
from masktune_utils.settings import REPOSITORY, Settings


def test_names_of_files_tell_what_is_not_the_default(tmp_path):
    settings = Settings(directory=str(tmp_path), dataset="mnist")
    folder = tmp_path / "checkpoints/mnist/seed0"
    assert settings.checkpoint_path("base") == folder / "CNN_checkpoint_base.pth"
    of_base = {"dataset": "mnist5k", "limit": 200, "epochs": 1, "seed": 2}
    settings = Settings(**of_base, method="mean", dilation=1)
    folder = REPOSITORY / "runs/mnist5k_limit=200_epochs=1/seed2"
    assert settings.folder("runs") == folder
    assert settings.configuration == "mean_0.1_dilation=1"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": float("nan")}, "lr = nan: Input should be a finite number"),
        ({"param": 7}, "param = 7: Value error, top_k hides a share: at most 1"),
        ({"square_color": "rgb(1, 2, 3)"}, "square_color = 'rgb(1, 2, 3)': String"),
    ],
)
def test_a_bad_value_is_refused_in_one_line_with_what_is_allowed(values, message):
    for make in (Settings, Settings().replace):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}.*$"):
            make(**values)


def test_text_is_converted_and_numbers_have_four_digits():
    text = {"limit": "200", "lr": "0.12345", "shared": "True"}
    assert Settings(**text) == Settings(limit=200, lr=0.1235, shared=True)


def test_nothing_is_saved_as_of_a_data_set_that_is_not_known():
    with pytest.raises(ValueError, match=r"^dataset = 'auto': first use "):
        Settings().folder("checkpoints")


# A notebook's cell of parameters.
SHOWN = 'directory = "here"\ndataset = "mnist5k"\nseed = 0  # of all\n'


def run(*cells):
    """The names of a notebook after some cells."""
    namespace = {"In": ["", *cells]}
    exec("\n".join(cells), namespace)
    return namespace


def test_settings_of_a_notebook_are_its_names_when_it_asks():
    expected = Settings(directory="here", dataset="mnist5k")
    namespace = run(SHOWN, "lrs = [1]")
    assert experiment.from_notebook(namespace) == expected
    assert experiment.from_notebook(namespace, epochs=7) == expected.replace(epochs=7)
    by_hand = run(SHOWN, "seed = 3")
    assert experiment.from_notebook(by_hand) == expected.replace(seed=3)
    by_papermill = run(SHOWN, "# Parameters\nseed = 3\ndilation = 2\n")
    changed = expected.replace(seed=3, dilation=2)
    assert experiment.from_notebook(by_papermill) == changed


def test_unknown_parameters_are_refused_with_those_that_are_known():
    namespace = run(SHOWN, "# Parameters\nseed = 1\nx = 3\n")
    with pytest.raises(ValueError, match="x is not a parameter; known: batch_size, "):
        experiment.from_notebook(namespace)
