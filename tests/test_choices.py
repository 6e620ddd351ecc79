"""Choices that are saved, handed over, killed, and made again."""

import copy
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import torch
from conftest import TINY

from masktune_utils import (
    datasets,
    experiment,
    results,
    selection,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.experiment import Trained
from masktune_utils.masking import Rule
from masktune_utils.selection import ERM
from masktune_utils.settings import BaseSettings, Settings

SMALL = TINY | {"epochs": 4}
RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)
pytestmark = pytest.mark.filterwarnings("ignore:.*zero everywhere")


class Made(NamedTuple):
    """A choice, and what it was made from."""

    train: Split
    base: Trained
    choice: dict

    @property
    def settings(self) -> Settings:
        return self.base.settings


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
    shutil.copytree(made.settings.directory, tmp_path / "copy")
    settings = made.settings.replace(directory=str(tmp_path / "copy"))
    return made._replace(base=dataclasses.replace(made.base, settings=settings))


def path_of_choice(settings: Settings) -> Path:
    return settings.folder("results") / "chosen.json"


def chosen_in_core(made: Made) -> selection.Choice:
    """The same choice by the core, from the models that are saved."""
    settings = experiment.choice_settings(made.settings, len(made.train))
    saved = experiment.Saved(settings)
    return selection.choose(made.train, saved.fit, saved.finetune, RULES)


def test_all_candidates_are_fine_tuned_by_one_schedule():
    base = BaseSettings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    settings = experiment.choice_settings(base, 60_000)
    assert settings.identity(base=True) == Settings(**dict(base)).identity(base=True)
    assert settings.cross_fit
    assert settings.finetune_schedule == "linear"
    assert settings.finetune_lr == 0.02
    assert settings.finetune_batch_size == 32


def test_the_choice_is_saved_as_the_verdict_says(copied):
    choice = copied.choice
    core = chosen_in_core(copied)
    assert choice["chosen"] == core.verdict.chosen
    assert choice["rule"] == vars(core.masked.rule)
    assert choice["reason"] == core.reason
    assert choice["images"] == 200
    mistakes = core.is_mistake.nonzero()[:, 0].tolist()
    assert choice["mistake_numbers"] == mistakes != []
    assert choice["candidates"] == [f"{rule}" for rule in RULES]
    pd.testing.assert_frame_equal(
        pd.DataFrame(choice["accuracy"]).T, core.verdict.accuracy, check_names=False
    )
    assert json.loads(path_of_choice(copied.settings).read_text()) == choice


def count_calls(monkeypatch, module: object, name: str) -> list:
    calls = []
    function = getattr(module, name)

    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(
    copied, monkeypatch
):
    train, base, choice = copied
    calls = count_calls(monkeypatch, selection, "choose")
    assert experiment.choose(base, train) == choice
    assert not calls
    monkeypatch.setattr(selection, "CANDIDATES", RULES[:1])
    of_one = experiment.choose(base, train)
    assert of_one["candidates"] == [f"{RULES[0]}"]
    assert experiment.choose(base, train) == of_one
    assert len(calls) == 1
    of_another = of_one | {"base_sha256": "of another base model"}
    path_of_choice(base.settings).write_text(json.dumps(of_another))
    assert experiment.choose(base, train, jobs=2) == of_one
    assert len(calls) == 2


@pytest.fixture
def handed_over(copied, monkeypatch) -> Made:
    """The first rule was chosen in two rounds, whatever the verdict."""
    verdict = selection.Verdict(
        f"{RULES[0]}", "", pd.DataFrame(), pd.DataFrame(), left=[]
    )
    monkeypatch.setattr(selection, "judge", lambda _: verdict)
    path_of_choice(copied.settings).unlink()
    choice = experiment.choose(copied.base, copied.train)
    return copied._replace(choice=choice)


def test_the_chosen_model_is_fine_tuned_on_the_masks_that_were_judged(handed_over):
    train, base, choice = handed_over
    tuned = experiment.chosen_model(choice, base, train)
    settings = experiment.choice_settings(base.settings, len(train))
    assert tuned.settings == settings.replace(**vars(RULES[0]))
    assert tuned.configuration == choice["configuration"]
    core = chosen_in_core(handed_over)
    assert torch.equal(tuned.images.own_masks, core.masks)
    network = copy.deepcopy(base.model)
    training.train(network, core.masked, **tuned.settings.finetuning)
    assert tuned.sha256 == store.weights_sha256(network.state_dict())
    assert tuned.seconds > 0
    assert experiment.chosen_model(choice, base, train).seconds is None
    assert experiment.chosen_model(choice, base, train, retrain=True).seconds > 0


def test_masks_that_are_damaged_or_missing_are_refused_until_chosen_again(handed_over):
    train, base, choice = handed_over
    settings = experiment.chosen_model(choice, base, train).settings
    own_masks = experiment.handed_over(settings, base, train).own_masks
    (path,) = settings.folder("checkpoints").glob("CNN_masks_*rounds=2*")
    assert path.stat().st_size < 200 * 784 / 8 + 2000
    other = dataclasses.replace(base, sha256="of another base model")
    with pytest.raises(ValueError, match=r"has no masks \(they are of another base"):
        experiment.handed_over(settings, other, train)
    for content in (b"damaged", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Choose again: masktune choose --retrain"):
            experiment.handed_over(settings, base, train)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no masks .*No such file"):
        experiment.handed_over(settings, base, train)
    experiment.choose(base, train, retrain=True)
    again = experiment.handed_over(settings, base, train)
    assert torch.equal(again.own_masks, own_masks)


def test_where_erm_is_kept_the_chosen_model_is_the_base_model(made):
    kept = {"configuration": "base"}
    assert experiment.chosen_model(kept, made.base, made.train) is made.base


def test_neither_groups_nor_the_shortcut_are_known_to_the_choice(made, tmp_path):
    train, base = with_base(tmp_path, conflicting_share=0.1)
    disguised = dataclasses.replace(
        train,
        shortcut=torch.rand(len(train), 28, 28) < 0.5,
        groups=torch.randint(10, (len(train),)),
    )
    assert experiment.choose(base, disguised) == made.choice


def test_without_a_shortcut_erm_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(selection, "CANDIDATES", RULES[1:])
    train, base = with_base(tmp_path, shortcut="none", limit=1000)
    experiment.record(base, datasets.load(base.settings))
    choice = experiment.choose(base, train)
    assert choice["configuration"] == "base"
    assert choice["chosen"] == ERM
    assert choice["mistake_numbers"]
    table = results.collect(str(tmp_path))
    assert table["chosen"].tolist() == [True]


CHOOSE = """
from masktune_utils import datasets, experiment, selection
from masktune_utils.masking import Rule
from masktune_utils.settings import Settings
selection.CANDIDATES = {rules}
selection.MOST_EPOCHS = 2
settings = Settings(**{values})
train = datasets.load(settings).train
base = experiment.base_model(settings, train)
experiment.choose(base, train)
"""


def times_of(directory: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob(pattern)}


def test_a_choice_that_is_killed_goes_on(made, tmp_path):
    train, base = with_base(tmp_path, conflicting_share=0.1)
    code = CHOOSE.format(rules=RULES, values=dict(base.settings))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not [*tmp_path.glob("checkpoints/*half=0*/seed0/*finetuned*rounds=2*.pth")]:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not path_of_choice(base.settings).exists()
    before = times_of(tmp_path, "CNN_checkpoint_*")
    assert experiment.choose(base, train) == made.choice
    after = times_of(tmp_path, "CNN_checkpoint_*")
    assert after.items() > before.items()


def test_one_candidate_is_enough_and_to_retrain_is_to_train_both_folds_again(
    tmp_path, monkeypatch
):
    train, base = with_base(tmp_path, limit=40, epochs=1)
    monkeypatch.setattr(selection, "CANDIDATES", [Rule(fill="resample")])
    experiment.choose(base, train)
    before = times_of(tmp_path, "CNN_checkpoint_*")
    experiment.choose(base, train, retrain=True)
    after = times_of(tmp_path, "CNN_checkpoint_*")
    again = {path for path in before if before[path] != after[path]}
    expected = {path for path in before if "half=" in path.parts[-3]}
    assert again == expected
    assert len(again) == 6  # of each fold: ERM, nothing masked, the candidate
