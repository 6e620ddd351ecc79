"""Choices that are saved, judged again, killed, and made again."""

import copy
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import TINY

from masktune_utils import (
    datasets,
    experiment,
    models,
    results,
    selection,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.experiment import Trained
from masktune_utils.held_out import ERM, NULL
from masktune_utils.masking import Rule
from masktune_utils.selection import Choice
from masktune_utils.settings import BaseSettings, Settings
from masktune_utils.store import CheckpointError

SMALL = TINY | {"epochs": 4, "seed": 3}
RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*zero everywhere")


CHOOSE = selection.choose


def use_candidates(patch: pytest.MonkeyPatch, rules: tuple[Rule, ...]) -> None:
    """As if these were ours."""
    patch.setattr(selection, "CANDIDATES", rules)


class Made(NamedTuple):
    """A choice, and what it was made from."""

    train: Split
    base: Trained
    choice: Choice

    @property
    def settings(self) -> Settings:
        return self.base.settings

    @property
    def path(self) -> Path:
        """Of what is saved of the choice."""
        return self.settings.folder("checkpoints") / "CNN_choice.npz"


@pytest.fixture(scope="module", autouse=True)
def small_rules():
    """Three candidates, which are quick to train."""
    with pytest.MonkeyPatch.context() as patch:
        use_candidates(patch, RULES)
        patch.setattr(selection, "MOST_EPOCHS", 2)
        yield


def with_base(directory: Path, **values) -> tuple[Split, Trained]:
    """Training images, and a base model."""
    settings = Settings(**(SMALL | values), directory=str(directory))
    train = datasets.load(settings).train
    return train, experiment.base_model(settings, train)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Made:
    """A choice where a tenth of the digits conflict with the square."""
    directory = tmp_path_factory.mktemp("made")
    train, base = with_base(directory, conflicting_share=0.1)
    return Made(train, base, experiment.choose(base, train))


@pytest.fixture
def copied(made, tmp_path) -> Made:
    """The same in a directory of its own, to do things to."""
    shutil.copytree(made.settings.directory, tmp_path / "copy")
    settings = made.settings.replace(directory=str(tmp_path / "copy"))
    return made._replace(base=dataclasses.replace(made.base, settings=settings))


@pytest.fixture
def asked(monkeypatch) -> list:
    """Numbers of processes of the choices that are made by training."""
    calls = []
    collect = selection.collect

    def counted(train, fit, finetune, candidates, jobs, *others):
        calls.append(jobs)
        return collect(train, fit, finetune, candidates, jobs, *others)

    monkeypatch.setattr(selection, "collect", counted)
    return calls


def assert_same(first: Choice, second: Choice) -> None:
    assert first.reason == second.reason
    arrays = second.held_out.to_arrays()
    for name, array in first.held_out.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name])
    assert [*first.candidates] == [*second.candidates]
    for name, masked in first.candidates.items():
        other = second.candidates[name]
        assert torch.equal(masked.own_masks, other.own_masks)
        assert torch.equal(masked.images, other.images)
        assert masked.seed == other.seed


def files_of(directory: str) -> set[str]:
    return {path.name for path in Path(directory).rglob("*") if path.is_file()}


def test_all_candidates_are_fine_tuned_by_one_schedule():
    base = BaseSettings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    settings = experiment.choice_settings(base, 60_000)
    assert settings.identity(base=True) == Settings(**dict(base)).identity(base=True)
    assert settings.finetune_schedule == "linear"
    assert settings.finetune_lr == 0.02
    assert settings.finetune_batch_size == 32
    assert settings.finetune_epochs == 1


def test_a_choice_is_that_of_the_core_with_the_settings_of_the_base_model(made):
    settings = made.settings

    def fit(fold: Split) -> torch.nn.Module:
        network = models.new_model(settings.seed)
        training.train(network, fold, **settings.training)
        return network

    schedule = partial(selection.fine_tune, epochs=2)
    assert_same(
        made.choice, CHOOSE(made.train, fit, schedule, RULES, seed=settings.seed)
    )


def test_a_choice_is_saved_as_one_file(made):
    files = files_of(made.settings.directory)
    assert files == {"CNN_checkpoint_base.pth", "CNN_choice.npz"}
    masks = 4 * 200 * 28 * 4  # one bit for each pixel, four bytes for each row
    assert made.path.stat().st_size < masks + 20_000


def test_what_is_saved_is_read_back_as_it_was(made):
    assert_same(experiment.saved_choice(made.base, made.train), made.choice)


def test_a_choice_is_made_once_for_a_base_model_its_candidates_and_schedule(
    copied, monkeypatch, asked
):
    train, base, choice = copied
    assert_same(experiment.choose(base, train), choice)
    assert not asked
    other = dataclasses.replace(base, sha256="of another base model")
    assert experiment.saved_choice(other, train) is None
    with monkeypatch.context() as patch:
        patch.setattr(selection, "MOST_EPOCHS", 1)
        assert experiment.saved_choice(base, train) is None
    use_candidates(monkeypatch, RULES[1:])
    assert experiment.saved_choice(base, train) is None
    of_one = experiment.choose(base, train, jobs=2)
    assert [*of_one.candidates] == [NULL, f"{RULES[1]}"]
    assert asked == [2]
    assert_same(experiment.choose(base, train), of_one)
    assert asked == [2]


def test_without_a_file_there_is_no_saved_choice(copied):
    copied.path.unlink()
    assert experiment.saved_choice(copied.base, copied.train) is None


def test_other_limits_of_the_rule_judge_again_and_train_nothing(
    copied, monkeypatch, asked
):
    train, base, _ = copied
    monkeypatch.setattr(selection, "BEHIND", 99.0)
    kept = experiment.choose(base, train)
    assert kept.verdict.left == [*kept.candidates]
    assert kept.is_kept
    monkeypatch.setattr(selection, "BEHIND", 1e-9)
    monkeypatch.setattr(selection, "COST", 0)
    strict = experiment.choose(base, train)
    assert len(strict.verdict.left) < len(kept.verdict.left)
    assert strict.reason != kept.reason
    assert not asked


@pytest.mark.parametrize("kind", ["text", "cut off", "changed", "foreign", "pickle"])
def test_a_choice_that_is_damaged_or_foreign_is_refused_by_name_and_left(
    kind, copied, asked
):
    whole = copied.path.read_bytes()
    middle = len(whole) // 2
    if kind == "foreign":
        store.write_arrays(copied.path, {"labels": np.arange(3)})
    elif kind == "pickle":
        np.savez(copied.path, made_with=np.array([print], dtype=object))
    else:
        contents = {
            "text": b"damaged",
            "cut off": whole[:middle],
            "changed": whole[:middle] + b"changed" + whole[middle + 7 :],
        }
        copied.path.write_bytes(contents[kind])
    content = copied.path.read_bytes()
    for call in (experiment.choose, experiment.saved_choice):
        with pytest.raises(CheckpointError, match=f"{copied.path} is damaged or fore"):
            call(copied.base, copied.train)
    assert copied.path.read_bytes() == content
    assert not asked
    again = experiment.choose(copied.base, copied.train, retrain=True)
    assert_same(again, copied.choice)
    assert asked == [1]


def test_the_chosen_model_is_fine_tuned_on_the_masks_that_were_judged(copied):
    train, base, choice = copied
    choice = choice.take(f"{RULES[0]}")
    tuned = experiment.chosen_model(choice, base, train)
    settings = experiment.choice_settings(base.settings, len(train))
    assert tuned.settings == settings.replace(**vars(RULES[0]))
    assert tuned.configuration == "chosen"
    assert tuned.images is choice.candidates[f"{RULES[0]}"]
    network = copy.deepcopy(base.model)
    training.train(network, choice.masked, **tuned.settings.finetuning)
    sha256 = store.weights_sha256(network.state_dict())
    assert tuned.sha256 == sha256
    own = choice.finetune(base.model)
    assert store.weights_sha256(own.state_dict()) == sha256
    assert tuned.seconds > 0
    assert experiment.chosen_model(choice, base, train).seconds is None
    assert experiment.chosen_model(choice, base, train, retrain=True).seconds > 0


def test_a_model_of_another_mask_is_refused_and_one_of_a_new_choice_made_anew(copied):
    train, base, choice = copied
    experiment.chosen_model(choice.take(f"{RULES[0]}"), base, train)
    other = choice.take(f"{RULES[1]}")
    with pytest.raises(
        CheckpointError, match=r"chosen\.pth was made with param = 4\.0"
    ):
        experiment.chosen_model(other, base, train)
    result = base.settings.folder("results") / "chosen.json"
    store.write_bytes(result, b"of the earlier choice")
    experiment.choose(base, train, retrain=True)
    assert not result.exists()
    assert experiment.chosen_model(other, base, train).seconds > 0


def test_where_erm_is_kept_the_chosen_model_is_the_base_model(made):
    kept = made.choice.take(ERM)
    chosen = experiment.chosen_model(kept, made.base, made.train)
    assert chosen == dataclasses.replace(made.base, configuration="chosen")


def test_neither_groups_nor_the_shortcut_are_known_to_the_choice(made, tmp_path):
    train, base = with_base(tmp_path, conflicting_share=0.1)
    disguised = dataclasses.replace(
        train,
        shortcut=torch.rand(len(train), 28, 28) < 0.5,
        groups=torch.randint(10, (len(train),)),
    )
    assert_same(experiment.choose(base, disguised), made.choice)


def test_without_a_shortcut_erm_is_kept(tmp_path, monkeypatch):
    use_candidates(monkeypatch, RULES[1:])
    train, base = with_base(tmp_path, shortcut="none", limit=1000, epochs=10)
    choice = experiment.choose(base, train)
    assert choice.is_kept
    assert choice.held_out.is_mistake.any()
    sets = datasets.load(base.settings)
    experiment.record(base, sets)
    experiment.record(experiment.chosen_model(choice, base, train), sets)
    table = results.collect(str(tmp_path))
    assert table["configuration"].tolist() == ["base", "chosen"]
    assert table["rule"].tolist() == ["ERM", "ERM"]
    assert table["worst_group"].nunique() == 1


KILLED = """
from functools import partial
from masktune_utils import datasets, experiment, selection
from masktune_utils.masking import Rule
from masktune_utils.settings import Settings

fine_tune = selection.fine_tune
def announced(*arguments, **options):
    print("fine-tuning", flush=True)
    return fine_tune(*arguments, **options)

selection.fine_tune = announced
selection.CANDIDATES = {rules}
selection.MOST_EPOCHS = 2
settings = Settings(**{values})
train = datasets.load(settings).train
experiment.choose(experiment.base_model(settings, train), train)
"""


def test_a_choice_that_is_killed_leaves_nothing_and_is_made_by_the_next_call(
    made, tmp_path
):
    train, base = with_base(tmp_path, conflicting_share=0.1)
    before = files_of(tmp_path)
    code = KILLED.format(rules=RULES, values=dict(base.settings))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    for _ in range(5):  # of the eight
        assert process.stdout.readline() == "fine-tuning\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert files_of(tmp_path) == before
    assert_same(experiment.choose(base, train), made.choice)


def test_to_retrain_is_to_make_the_choice_again(copied, asked):
    train, base, choice = copied
    written = copied.path.stat().st_mtime_ns
    again = experiment.choose(base, train, retrain=True)
    assert asked == [1]
    assert copied.path.stat().st_mtime_ns != written
    assert_same(again, choice)
