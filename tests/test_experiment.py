"""Models, maps and results are loaded if they are saved, else made."""

import copy
import dataclasses
from unittest.mock import Mock

import pytest
import torch

from masktune_utils import experiment, masking, results, saliency, store, training
from masktune_utils.choice import score
from masktune_utils.experiment import (
    Trained,
    base_model,
    chosen_model,
    load_or_train,
    record,
    training_saliency,
)
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError


@pytest.fixture
def masked(splits) -> MaskedDataset:
    maps = splits.train.images[:, 0] / 255
    return masking.mask_dataset(splits.train, maps, "top_k", 0.1)


@pytest.fixture
def base(settings, model, splits) -> Trained:
    """A base model as if it had been loaded."""
    return as_base(model, settings, splits.train)


def as_base(model, settings, train):
    weights = sha256(model)
    return Trained(model, settings.base, "base", train, [], weights, weights, None)


def sha256(model):
    return store.sha256(model.state_dict())


def changed(base):
    """Another base model, which always predicts class 0."""
    model = copy.deepcopy(base.model)
    model.linear[3].bias.data[0] = 1e6
    return as_base(model, base.settings, base.images)


def test_base_model_is_trained_once(settings, splits):
    path = settings.checkpoint_path("base")
    first = base_model(settings, splits.train)
    assert first.sha256 == first.base_sha256 == sha256(first.model)
    assert first.seconds > 0
    assert not first.model.training
    assert store.read(path)["settings"] == settings.base.identity
    written = path.stat().st_mtime_ns
    second = base_model(settings, splits.train)
    assert second.seconds is None
    assert second.history == first.history
    assert second.history[0].keys() == {"epoch", "lr", "loss", "accuracy"}
    assert path.stat().st_mtime_ns == written


def test_a_finetuned_model_of_another_base_model_is_refused(settings, base, masked):
    start = (settings, settings.configuration, masked)
    first = load_or_train(*start, base)
    assert sha256(base.model) == first.base_sha256 == base.sha256
    assert sha256(first.model) == first.sha256 != base.sha256
    with pytest.raises(CheckpointError, match="was made with base_sha256 = "):
        load_or_train(*start, changed(base))


def test_weights_that_do_not_fit_are_refused_by_name(settings, splits):
    path = settings.checkpoint_path("base")
    content = {"state_dict": {}}
    store.kept(path, settings.base.identity, lambda: content)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged, foreign"):
        base_model(settings, splits.train)


def test_a_choice_is_made_once_judged_anew_and_refused_by_name(
    base, splits, monkeypatch
):
    monkeypatch.setattr(score, "MOST_EPOCHS", 1)
    first = experiment.choose(base, splits.train)
    monkeypatch.setattr(score, "choose", Mock(side_effect=AssertionError))
    again = experiment.choose(base, splits.train)
    torch.testing.assert_close(vars(again.held_out), vars(first.held_out))
    assert again.verdict == score.judge(first.held_out)
    for name, mean_mask in first.held_out.mean_masks.items():
        masked = again.candidates[name]
        assert torch.equal(masked.own_masks.float().mean(0), mean_mask)
        assert f"{masked.rule}" == name
        assert masked.fill == masked.rule.fill
    monkeypatch.setattr(score, "CANDIDATES", score.CANDIDATES[:1])
    with pytest.raises(CheckpointError, match=r"CNN_choice.* with candidates"):
        experiment.choose(base, splits.train)


def test_a_chosen_model_is_refused_if_other_masks_are_chosen(base, masked, splits):
    """Also if the rule is the same: two choices may mask differently by one rule."""
    choice = Mock(is_kept=False, masked=masked)
    first = chosen_model(choice, base, splits.train)
    again = chosen_model(choice, base, splits.train)
    assert again.sha256 == first.sha256
    assert again.seconds is None
    other_masks = masked.own_masks.flip(2)
    choice.masked = dataclasses.replace(masked, own_masks=other_masks)
    with pytest.raises(CheckpointError, match="was made with masks_sha256 = "):
        chosen_model(choice, base, splits.train)


def test_if_erm_is_kept_it_is_the_chosen_model(base, splits):
    chosen = chosen_model(Mock(is_kept=True), base, splits.train)
    assert chosen.model is base.model
    row = record(chosen, splits)
    assert row["configuration"] == "chosen"
    assert row["rule"] == "ERM"


def test_finetuning_is_one_epoch_at_the_last_rate_of_the_base_model():
    finetuning = Settings(epochs=50).training
    assert finetuning["epochs"] == 1
    assert finetuning["lr"] == 0.0025


@pytest.mark.parametrize("fill", ["zero", "resample"])
def test_each_round_adds_what_the_model_before_looks_at(settings, splits, base, fill):
    """By `masking.masktune`, which caches nothing; test_held_out.py checks it."""
    settings = settings.replace(
        method="mean",
        param=2,
        upsample="map",
        dilation=1,
        fill=fill,
        rounds=3,
        finetune_schedule="linear",
        finetune_batch_size=50,
        seed=3,
    )
    train = splits.train

    def finetune(network, masked):
        options = {"lr": settings.lr, "schedule": "linear", "batch_size": 50}
        training.train(network, masked, epochs=1, seed=3, **options)
        return network

    rule = Rule("mean", 2, "map", 1, fill=fill, rounds=3)
    maps = saliency.saliency_maps(base.model, train.images, train.labels)
    steps = [*masking.masktune(base.model, train, rule, finetune, maps, seed=3)]
    # the last one first; the models of the rounds before are saved with it
    for rounds in (3, 2, 1):
        tuned = experiment.masktune(settings.replace(rounds=rounds), base, train)
        model, masked = steps[rounds - 1]
        assert tuned.sha256 == sha256(model)
        assert torch.equal(tuned.images.own_masks, masked.own_masks)
        assert (tuned.seconds is None) == (rounds < 3)


def test_saliency_is_computed_once_per_base_model(settings, splits, base, monkeypatch):
    compute = Mock(wraps=saliency.saliency_maps)
    monkeypatch.setattr(saliency, "saliency_maps", compute)
    first = training_saliency(settings, base, splits.train)
    again = training_saliency(settings, base, splits.train)
    assert torch.equal(again, first)
    compute.assert_called_once()
    with pytest.raises(CheckpointError, match=r"CNN_saliency\.pth was made with base_"):
        training_saliency(settings, changed(base), splits.train)


def test_a_result_tells_what_made_a_model_how_good_it_is_and_what_was_hidden(
    settings, splits, masked
):
    base = base_model(settings, splits.train)
    record(base, splits)
    tuned = load_or_train(settings, settings.configuration, masked, base)
    row = record(tuned, splits)
    shares = results.hidden_shares(tuned.images)
    expected = {
        **settings.identity,
        "experiment": "mnist5k_limit=200_epochs=2_batch_size=20",
        "rule": "top_k 0.1",
        "sha256": sha256(tuned.model),
        "base_sha256": base.sha256,
        "seconds": tuned.seconds,
        "device": "cpu",
        "hidden_rest": shares["rest"],
        **results.evaluate(tuned.model, splits),
    }
    assert row.items() >= expected.items()
    assert results.read(settings.folder("results") / "top_k_0.1.json") == row
    table = results.collect(settings.directory)
    assert table["rule"].tolist() == ["ERM", "top_k 0.1"]


def test_a_result_is_made_anew_for_other_weights(splits, base):
    trained = base._replace(seconds=2.5)
    assert record(trained, splits)["seconds"] == 2.5
    assert record(base, splits)["seconds"] == 2.5
    row = record(changed(base), splits)
    assert row["seconds"] is None
    assert row["worst_group"] == 0


def test_rounds_end_when_they_hide_nothing_more(settings, splits, monkeypatch):
    base = base_model(settings, splits.train)
    train = Mock(wraps=training.train)
    monkeypatch.setattr(training, "train", train)
    weak = settings.replace(method="mean_std", param=28.0, rounds=4)
    tuned = experiment.masktune(weak, base, splits.train)
    assert train.call_count == 2  # the first round, and the last by its own name
    first, second = [weak.replace(rounds=rounds).configuration for rounds in (1, 2)]
    saved = experiment.with_weights(settings.checkpoint_path(first))
    assert sha256(saved) == tuned.sha256
    assert tuned.configuration == weak.configuration
    assert not settings.checkpoint_path(second).exists()
