"""Models, maps and results are loaded if they are saved, else made."""

import copy
import dataclasses
from unittest.mock import Mock

import pytest
import torch

from masktune_utils import (
    experiment,
    masking,
    models,
    results,
    saliency,
    store,
    training,
)
from masktune_utils.choice import Choice, chosen
from masktune_utils.experiment import (
    Trained,
    base_model,
    chosen_model,
    load_or_train,
    record,
    training_saliency,
)
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError


@pytest.fixture
def masked(splits) -> MaskedDataset:
    maps = splits.train.images[:, 0] / 255
    return masking.mask_dataset(splits.train, maps, "top_k", 0.1)


@pytest.fixture
def base(settings, model, splits) -> Trained:
    """A base model as if it had been loaded."""
    weights = sha256(model)
    train = splits.train
    return Trained(model, settings.base, train, [], weights, weights, None, "base")


def sha256(model):
    return store.sha256(model.state_dict())


def changed(base):
    """Another base model, which always predicts class 0."""
    model = copy.deepcopy(base.model)
    model.linear[3].bias.data[0] = 1e6
    weights = sha256(model)
    return base._replace(model=model, sha256=weights, base_sha256=weights)


def test_base_model_is_trained_once(settings, splits):
    first = base_model(settings, splits.train)
    assert first.sha256 == first.base_sha256 == sha256(first.model)
    assert first.seconds > 0
    assert not first.model.training
    saved = store.read(settings.checkpoint_path("base"))
    assert saved["settings"] == settings.base.identity
    second = base_model(settings, splits.train)
    assert second.seconds is None
    assert second.history == first.history


def test_a_finetuned_model_of_another_base_model_is_refused(settings, base, masked):
    first = load_or_train(settings, masked, base)
    assert sha256(base.model) == first.base_sha256 == base.sha256
    assert sha256(first.model) == first.sha256 != base.sha256
    with pytest.raises(CheckpointError, match="was made with base_sha256 = "):
        load_or_train(settings, masked, changed(base))


def test_weights_that_do_not_fit_are_refused_by_name(settings, splits):
    path = settings.checkpoint_path("base")
    content = {"state_dict": {}}
    store.load_or_make(path, settings.base.identity, lambda: content)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged, foreign"):
        base_model(settings, splits.train)


def test_the_choice_of_an_experiment_is_kept_and_refused_for_another_base_model(
    base, monkeypatch, few_windows
):
    monkeypatch.setattr(chosen, "MOST_EPOCHS", 1)
    base = base._replace(images=base.images[::4])
    first = experiment.choose_mask(base)
    monkeypatch.setattr(chosen, "choose", Mock(side_effect=AssertionError))
    again = experiment.choose_mask(base)
    assert again.verdict == first.verdict
    with pytest.raises(CheckpointError, match=r"CNN_choice.* with base_sha256"):
        experiment.choose_mask(changed(base))


def test_a_chosen_model_is_fine_tuned_as_by_the_choice_and_refused_for_other_masks(
    base, masked
):
    """Also if the rule is the same: two choices may mask differently by one rule."""
    base = base._replace(settings=base.settings.replace(seed=1))
    masked.seed = 1
    choice = Choice(masked, chosen.default_schedule(base.images), "")
    first = chosen_model(choice, base)
    assert sha256(choice.finetune(base.model)) == first.sha256
    again = chosen_model(choice, base)
    assert again.sha256 == first.sha256
    assert again.seconds is None
    other_masks = dataclasses.replace(masked, own_masks=masked.own_masks.flip(2))
    with pytest.raises(CheckpointError, match="was made with masks_sha256 = "):
        chosen_model(dataclasses.replace(choice, masked=other_masks), base)


def test_if_erm_is_kept_it_is_the_chosen_model(base, splits):
    kept = chosen_model(Mock(keeps_erm=True), base)
    assert kept.model is base.model
    row = record(kept, splits)
    assert row["configuration"] == "chosen"
    assert row["rule"] == "ERM"


@pytest.mark.parametrize(("epochs", "early_epochs"), [(100, 80), (80, 0)])
def test_a_choice_looks_first_once_each_half_has_trained_on_8000_images(
    epochs, early_epochs, base, monkeypatch
):
    """Of 200; unless this is the whole training. With the seed of the experiment."""
    choose, train = Mock(), Mock()
    monkeypatch.setattr(experiment, "load_or_choose", choose)
    monkeypatch.setattr(training, "train", train)
    settings = base.settings.replace(epochs=epochs, seed=7)
    experiment.choose_mask(base._replace(settings=settings))
    _, images, fit, _ = choose.call_args.args
    options = choose.call_args.kwargs
    assert options["seed"] == 7
    network = fit(images[::2], options["early"])
    assert train.call_args.kwargs["epochs"] == early_epochs
    assert sha256(network) == sha256(models.new_model(7))


def test_finetuning_is_one_epoch_at_the_last_rate_of_the_base_model():
    """That of a chosen mask has its own."""
    finetuning = Settings(epochs=50).finetuning
    assert finetuning["epochs"] == 1
    assert finetuning["lr"] == 0.0025
    of_chosen = experiment.chosen_settings(Settings().base, 10_000).finetuning
    assert of_chosen["epochs"] == 3
    assert chosen.default_epochs(1000) == 6
    assert of_chosen["lr"] == 0.02
    assert of_chosen["schedule"] == "linear"


def test_saliency_is_computed_once_per_base_model(settings, base, monkeypatch):
    compute = Mock(wraps=saliency.saliency_maps)
    monkeypatch.setattr(saliency, "saliency_maps", compute)
    first = training_saliency(base)
    again = training_saliency(base)
    assert torch.equal(again, first)
    tuned = experiment.masktune(settings.replace(seed=1), base)
    assert tuned.images.seed == 1
    compute.assert_called_once()
    with pytest.raises(CheckpointError, match=r"CNN_saliency\.pth was made with base_"):
        training_saliency(changed(base))


def test_a_result_tells_what_made_a_model_how_good_it_is_and_what_was_hidden(
    settings, splits, masked
):
    base = base_model(settings, splits.train)
    record(base, splits)
    tuned = load_or_train(settings, masked, base)
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
