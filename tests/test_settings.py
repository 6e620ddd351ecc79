"""Settings: what is allowed, and where files go. More bad values: test_bad_input.py."""

import re
from typing import get_args

import pytest

from masktune_utils import experiment, masking, shortcuts, store
from masktune_utils.settings import DEFAULTS, REPOSITORY, Method, Settings, Shortcut


def test_names_of_files_tell_what_is_not_the_default(tmp_path):
    settings = Settings(directory=str(tmp_path), dataset="mnist")
    folder = tmp_path / "checkpoints/mnist/seed0"
    assert settings.checkpoint_path("base") == folder / "CNN_checkpoint_base.pth"
    path = settings.checkpoint_path(settings.configuration)
    assert path == folder / "CNN_checkpoint_finetuned_top_k_0.1.pth"
    of_base = {"dataset": "mnist5k", "limit": 200, "epochs": 1, "seed": 2}
    settings = Settings(**of_base, method="mean", dilation=1)
    folder = REPOSITORY / "runs/mnist5k_limit=200_epochs=1/seed2"
    assert settings.folder("runs") == folder
    assert settings.configuration == "mean_0.1_dilation=1"


def test_folders_that_end_alike_have_experiments_of_their_own(tmp_path):
    experiments = set()
    for name in ("a", "b"):
        folder = tmp_path / name / "birds" / "train"
        folder.mkdir(parents=True)
        paths = {"train_folder": str(folder), "test_folder": str(folder)}
        settings = Settings(dataset="folder", **paths)
        with_slash = {name: f"{path}/" for name, path in paths.items()}
        assert settings == Settings(dataset="folder", **with_slash)
        assert settings.experiment.startswith("folder-birds-train")
        experiments.add(settings.experiment)
    assert len(experiments) == 2


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "0"}, "seed is '0'; allowed: a valid integer."),
        ({"seed": 3.0}, "seed is 3.0; allowed: a valid integer."),
        ({"lr": float("nan")}, "lr is nan; allowed: a finite number."),
        (
            {"method": "random", "shared": True},
            "shared is True; allowed: False with method 'random', which uses no maps.",
        ),
        (
            {"method": "random", "param": 1},
            "param is 1; allowed: 0 to 0.5 for method 'random'.",
        ),
        (
            {"method": "random", "rounds": 2},
            "rounds is 2; allowed: 1 with method 'random', which uses no maps.",
        ),
        (
            {"half": 0, "cross_fit": True},
            "cross_fit is True; allowed: False with half, which has no halves of its own.",
        ),
        ({"foo": 1}, f"foo is not a setting; allowed: {', '.join(DEFAULTS)}."),
    ],
)
def test_a_bad_value_is_refused_and_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**values)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings().replace(**values)


def test_the_names_that_are_allowed_are_those_of_the_functions():
    assert {*get_args(Method)} == {*masking.RULES, "random"}
    assert {*get_args(Shortcut)} == {*shortcuts.SHORTCUTS, "none"}


def test_a_directory_is_made_unless_it_cannot_be_written_to(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for directory in (file, file / "below", "/proc/new"):
        message = f"^directory is '{directory}'; allowed: a folder to write to"
        with pytest.raises(ValueError, match=message):
            store.check_writable(str(directory))
    store.check_writable(str(tmp_path / "a" / "b"))
    assert [*(tmp_path / "a").rglob("*")] == [tmp_path / "a" / "b"]


@pytest.fixture
def shown(tmp_path) -> str:
    """A notebook's cell of parameters."""
    return f'directory = "{tmp_path}"\ndataset = "mnist5k"\nseed = 0  # of all\n'


@pytest.fixture
def expected(tmp_path) -> Settings:
    """What that cell stands for."""
    return Settings(directory=str(tmp_path), dataset="mnist5k")


def test_settings_of_a_notebook_are_read_from_its_cells(shown, expected):
    cells = ["", shown, "# Parameters\nseed = 3\nrounds = 2\n", "import torch"]
    namespace = {"In": cells, "seed": 9, "lrs": [1]}
    injected = expected.replace(seed=3, rounds=2)
    assert experiment.from_notebook(namespace) == injected
    assert experiment.from_notebook(namespace, epochs=7) == injected.replace(epochs=7)
    # the first cell, changed by hand and run once more
    cells.append(shown.replace("seed = 0", "seed = 5"))
    assert experiment.from_notebook(namespace) == expected.replace(seed=5)


def test_a_parameter_that_is_no_literal_is_refused_and_not_passed_over(shown):
    computed = shown.replace("seed = 0", "seed = 2 * 5")
    message = "^The cell of parameters is not read; allowed: literals, such as"
    injected = "# Parameters\nlr = float('nan')\nepochs = 3\n"  # by papermill
    for cells in ([computed], [shown, computed], [shown, injected]):
        with pytest.raises(ValueError, match=message):
            experiment.from_notebook({"In": cells})
    assert experiment.from_notebook({"In": [computed, shown]}).seed == 0


@pytest.mark.parametrize(
    "later",
    [
        "images, labels = sets.train.batch(slice(0, 10))",
        "labels = 3\nprint(labels)",
        "labels = 3",
        "for seed in range(3):\n    print(seed)",
        "seed = [settings.seed]\ndirectory = textures / 'train'",
        "%matplotlib inline",
    ],
)
def test_later_cells_may_use_the_names_of_parameters(shown, expected, later):
    names = {"labels": 3, "seed": 2, "directory": "/nowhere"}
    namespace = {"In": ["", shown, later], **names}
    assert experiment.from_notebook(namespace) == expected
    namespace["In"] += [shown, later]
    assert experiment.from_notebook(namespace) == expected


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("epoch = 3", "epoch is not a parameter; allowed: epochs."),
        ("zzz = 3", "zzz is not a parameter; allowed: directory, device, "),
        ("seed = -1", "seed is -1; allowed: greater than or equal to 0."),
    ],
)
def test_unknown_parameters_are_refused_with_the_nearest_known_one(
    injected, message, shown
):
    by_papermill = ["", shown, f"# Parameters\n{injected}\n"]
    by_hand = ["", f"{shown}{injected}\n"]
    for cells in (by_papermill, by_hand):
        with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
            experiment.from_notebook({"In": cells})


def test_a_notebook_may_have_parameters_that_are_no_settings(shown, expected):
    cells = ["", f'{shown}path = "a.pth"\n']
    assert experiment.from_notebook({"In": cells}, ["path"]) == expected


def test_where_no_cells_are_kept_the_names_count(expected):
    names = {"directory": expected.directory, "dataset": "mnist5k", "seed": 4}
    namespace = {"In": [""], "pd": None, **names}
    assert experiment.from_notebook(namespace) == expected.replace(seed=4)


def test_a_cell_of_parameters_that_is_not_recognized_is_not_passed_over(shown):
    message = "^No cell of parameters was run; allowed: a cell whose first line is"
    with pytest.raises(ValueError, match=message):
        experiment.from_notebook({"In": ["", f"# my run\n{shown}", "import torch"]})
