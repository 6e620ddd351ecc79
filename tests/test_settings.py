"""Settings: what is allowed, and where files go. More bad values: test_bad_input.py."""

import dis
import re
from typing import get_args

import nbformat
import pytest

from masktune_utils import experiment, masking, shortcuts
from masktune_utils.settings import DEFAULTS, PARAM_LIMITS, REPOSITORY, Settings


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"seed": "0"}, "seed is '0'; allowed: a valid integer."),
        ({"lr": float("nan")}, "lr is nan; allowed: a finite number."),
        (
            {"method": "mean", "param": 65},
            "param is 65; allowed: 0 to 64 for method 'mean'.",
        ),
    ],
)
def test_a_bad_value_is_refused_and_named_with_what_is_allowed(values, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings(**values)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        Settings().replace(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"shortcut": "none", "placement": "ordered", "conflicting_share": 0.2},
        {"shortcut": "frame", "square_size": 9},
        {"method": "mean_std", "upsample": "map"},
    ],
)
def test_settings_that_make_the_same_are_the_same(values):
    name = next(iter(values))
    plain = Settings(dataset="mnist", **{name: values[name]})
    assert Settings(dataset="mnist", **values) == plain
    assert plain.replace(**values) == plain


def test_nothing_is_saved_as_of_a_data_set_that_is_not_known():
    message = r"^dataset is 'auto'; allowed: what datasets.resolve_dataset makes of it"
    with pytest.raises(ValueError, match=message):
        Settings().folder("checkpoints")


def test_the_names_that_are_allowed_are_those_of_the_functions():
    allowed = {}
    for name in ("method", "shortcut", "fill", "upsample"):
        allowed[name] = {*get_args(Settings.model_fields[name].annotation)}
    assert allowed["method"] == {*masking.RULES} == {*PARAM_LIMITS}
    assert allowed["shortcut"] == {*shortcuts.SHORTCUTS, "none"}
    assert allowed["fill"] == {*masking.FILLS}
    assert allowed["upsample"] == {*masking.UPSAMPLES}


@pytest.fixture
def shown(tmp_path) -> str:
    """A notebook's cell of parameters."""
    return f'directory = "{tmp_path}"\ndataset = "mnist5k"\nseed = 0  # of all\n'


@pytest.fixture
def expected(tmp_path) -> Settings:
    """What that cell stands for."""
    return Settings(directory=str(tmp_path), dataset="mnist5k")


def test_settings_of_a_notebook_are_its_names_when_it_asks(shown, expected):
    namespace = {"In": ["", shown], "lrs": [1], "pd": None}
    exec(shown, namespace)
    assert experiment.from_notebook(namespace) == expected
    assert experiment.from_notebook(namespace, epochs=7) == expected.replace(epochs=7)
    # in a cell of its own, or by papermill
    for cell in ("seed = 3", "# Parameters\nseed = 3\nrounds = 2\n"):
        exec(cell, namespace)
        namespace["In"].append(cell)
        changed = expected.replace(seed=3, rounds=namespace.get("rounds", 1))
        assert experiment.from_notebook(namespace) == changed


def test_no_notebook_uses_the_name_of_a_setting_for_something_else():
    """Else it would be read as the setting once its first cells are run again."""
    for path in REPOSITORY.glob("notebooks/*.ipynb"):
        for cell in nbformat.read(path, as_version=4).cells:
            is_first = "parameters" in cell.metadata.get("tags", [])
            if cell.cell_type == "code" and not is_first:
                assert not names_assigned(cell.source) & DEFAULTS.keys(), path


def names_assigned(source: str) -> set[str]:
    """Global names that a cell assigns."""
    instructions = dis.get_instructions(compile(source, "cell", "exec"))
    return {step.argval for step in instructions if step.opname == "STORE_NAME"}


@pytest.mark.parametrize(
    ("injected", "message"),
    [
        ("x = 3\nmodel = 'a'", "x is not a parameter; allowed: batch_size, "),
        ("seed = -1", "seed is -1; allowed: greater than or equal to 0."),
    ],
)
def test_unknown_parameters_are_refused_with_those_that_are_known(
    injected, message, shown
):
    cell = f"# Parameters\n{injected}\n"
    namespace = {"In": ["", shown, cell]}
    exec(shown + cell, namespace)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        experiment.from_notebook(namespace)


def test_a_notebook_may_have_parameters_that_are_no_settings(shown, expected):
    cell = '# Parameters\npath = "a.pth"\n'
    namespace = {"In": ["", shown, cell]}
    exec(shown + cell, namespace)
    assert experiment.from_notebook(namespace, ["path"]) == expected
