"""Choices that are saved, judged again, killed, and made again."""

import dataclasses
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import TINY

from masktune_utils import (
    datasets,
    experiment,
    models,
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


class Made(NamedTuple):
    """A choice, and what it was made from."""

    train: Split
    base: Trained
    choice: Choice

    @property
    def path(self) -> Path:
        """Of what is saved of the choice."""
        return saved_as(self.base)


def saved_as(base: Trained) -> Path:
    return base.settings.folder("checkpoints") / "CNN_choice.npz"


@pytest.fixture(scope="module", autouse=True)
def small_rules():
    """Three candidates, which are quick to train."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "CANDIDATES", RULES)
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
    settings = made.base.settings
    shutil.copytree(settings.directory, tmp_path / "copy")
    settings = settings.replace(directory=str(tmp_path / "copy"))
    return made._replace(base=dataclasses.replace(made.base, settings=settings))


@pytest.fixture
def collect(monkeypatch) -> Mock:
    """Notes each choice that is made by training."""
    noted = Mock(wraps=selection.collect)
    monkeypatch.setattr(selection, "collect", noted)
    return noted


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


def files_of(directory: str) -> set[str]:
    return {path.name for path in Path(directory).rglob("*") if path.is_file()}


def test_all_candidates_are_fine_tuned_by_one_schedule():
    base = BaseSettings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    settings = experiment.choice_settings(base, 60_000)
    assert settings == Settings(
        **dict(base),
        finetune_schedule="linear",
        finetune_lr=0.02,
        finetune_batch_size=32,
        finetune_epochs=1,
    )


def test_a_choice_is_that_of_the_core_with_the_settings_of_the_base_model(made):
    settings = made.base.settings

    def fit(fold: Split) -> torch.nn.Module:
        network = models.new_model(settings.seed)
        training.train(network, fold, **settings.training)
        return network

    schedule = partial(selection.fine_tune, epochs=2)
    choice = selection.choose(made.train, fit, schedule, RULES, seed=settings.seed)
    assert_same(made.choice, choice)


def test_a_choice_is_saved_as_one_file_and_read_back_as_it_was(made):
    files = files_of(made.base.settings.directory)
    assert files == {"CNN_checkpoint_base.pth", "CNN_choice.npz"}
    masks = 4 * 200 * 28 * 4  # one bit for each pixel, four bytes for each row
    assert made.path.stat().st_size < masks + 20_000
    assert_same(experiment.saved_choice(made.base, made.train), made.choice)


def test_a_choice_is_made_once_for_a_base_model_its_candidates_and_schedule(
    copied, monkeypatch, collect
):
    train, base, _ = copied
    experiment.choose(base, train)
    collect.assert_not_called()
    other = dataclasses.replace(base, sha256="of another base model")
    assert experiment.saved_choice(other, train) is None
    with monkeypatch.context() as patch:
        patch.setattr(selection, "MOST_EPOCHS", 1)
        assert experiment.saved_choice(base, train) is None
    monkeypatch.setattr(selection, "CANDIDATES", RULES[1:])
    of_one = experiment.choose(base, train, jobs=2)
    assert [*of_one.candidates] == [NULL, f"{RULES[1]}"]
    experiment.choose(base, train)
    collect.assert_called_once()
    assert collect.call_args.args[4] == 2


def test_other_limits_of_the_rule_judge_again_and_train_nothing(
    copied, monkeypatch, collect
):
    train, base, _ = copied
    monkeypatch.setattr(selection, "BEHIND", 99.0)
    kept = experiment.choose(base, train)
    monkeypatch.setattr(selection, "BEHIND", 1e-9)
    monkeypatch.setattr(selection, "COST", 0)
    strict = experiment.choose(base, train)
    assert len(strict.verdict.left) < len(kept.verdict.left) == len(kept.candidates)
    collect.assert_not_called()


@pytest.mark.parametrize("kind", ["cut off", "changed", "foreign", "pickle"])
def test_a_choice_that_is_damaged_or_foreign_is_refused_until_it_is_made_again(
    kind, copied, collect
):
    """By name; and it is left as it is."""
    train, base, _ = copied
    whole = copied.path.read_bytes()
    middle = len(whole) // 2
    if kind == "cut off":
        copied.path.write_bytes(whole[:middle])
    elif kind == "changed":
        copied.path.write_bytes(whole[:middle] + b"changed" + whole[middle + 7 :])
    elif kind == "foreign":
        np.savez(copied.path, labels=3)
    else:
        np.savez(copied.path, made_with=np.array([print]))
    content = copied.path.read_bytes()
    with pytest.raises(CheckpointError, match=f"{copied.path} is damaged or foreign"):
        experiment.choose(base, train)
    assert copied.path.read_bytes() == content
    collect.assert_not_called()
    experiment.choose(base, train, retrain=True)
    collect.assert_called_once()
    assert copied.path.read_bytes() == whole


def test_the_chosen_model_is_fine_tuned_on_the_masks_that_were_judged(copied):
    train, base, choice = copied
    choice = choice.take(f"{RULES[0]}")
    tuned = experiment.chosen_model(choice, base, train)
    settings = experiment.choice_settings(base.settings, len(train))
    assert tuned.settings == settings.with_rule(RULES[0])
    assert tuned.configuration == "chosen"
    assert tuned.images is choice.candidates[f"{RULES[0]}"]
    own = choice.finetune(base.model)
    assert tuned.sha256 == store.weights_sha256(own.state_dict())
    assert tuned.seconds > 0
    assert experiment.chosen_model(choice, base, train).seconds is None
    assert experiment.chosen_model(choice, base, train, retrain=True).seconds > 0


def test_a_model_of_another_mask_is_refused_and_one_of_a_new_choice_made_anew(copied):
    train, base, choice = copied
    experiment.chosen_model(choice.take(f"{RULES[0]}"), base, train)
    other = choice.take(f"{RULES[1]}")
    message = r"chosen\.pth was made with param = 4\.0"
    with pytest.raises(CheckpointError, match=message):
        experiment.chosen_model(other, base, train)
    experiment.choose(base, train, retrain=True)
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
    experiment.choose(base, disguised)
    assert saved_as(base).read_bytes() == made.path.read_bytes()


def test_without_a_shortcut_erm_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CANDIDATES", RULES[1:])
    train, base = with_base(tmp_path, shortcut="none", limit=1000, epochs=10)
    choice = experiment.choose(base, train)
    assert choice.is_kept
    assert choice.held_out.is_mistake.any()


def test_a_choice_that_is_interrupted_leaves_nothing_and_is_made_by_the_next_call(
    made, tmp_path, monkeypatch
):
    train, base = with_base(tmp_path, conflicting_share=0.1)
    before = files_of(tmp_path)
    interrupted = Mock(side_effect=[None, None, None, KeyboardInterrupt])
    with monkeypatch.context() as patch:
        patch.setattr(training, "train", interrupted)
        with pytest.raises(KeyboardInterrupt):
            experiment.choose(base, train)
    assert files_of(tmp_path) == before
    experiment.choose(base, train)
    assert saved_as(base).read_bytes() == made.path.read_bytes()
