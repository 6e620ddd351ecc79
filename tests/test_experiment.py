"""Models, maps and results are loaded if they are saved, else made."""

import copy
import dataclasses
from unittest.mock import Mock

import pytest
import torch

from masktune_utils import experiment, masking, results, saliency, store, training
from masktune_utils.choice import score
from masktune_utils.data import Split
from masktune_utils.experiment import Trained
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError


@pytest.fixture
def masked(splits) -> MaskedDataset:
    maps = torch.arange(200 * 64).sin().view(200, 8, 8)
    return masking.mask_dataset(splits.train, maps, "top_k", 0.1)


@pytest.fixture
def base(settings, model, splits) -> Trained:
    """A base model as if it had been loaded."""
    return as_base(model, settings, splits.train)


def as_base(model: torch.nn.Module, settings: Settings, train: Split) -> Trained:
    weights = sha256(model)
    return Trained(
        model=model,
        settings=settings.base,
        configuration="base",
        images=train,
        history=[],
        sha256=weights,
        base_sha256=weights,
        seconds=None,
    )


def sha256(model: torch.nn.Module) -> str:
    return store.sha256(model.state_dict())


def changed(base: Trained) -> Trained:
    """Another base model, which always predicts class 0."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.linear[3].bias += torch.tensor([1e6, 0.0])
    return as_base(model, base.settings, base.images)


def test_base_model_is_trained_once(settings, splits):
    path = settings.checkpoint_path("base")
    first = experiment.base_model(settings, splits.train)
    assert first.sha256 == first.base_sha256 == sha256(first.model)
    assert first.seconds > 0
    assert not first.model.training
    assert store.read(path)["settings"] == settings.base.identity
    second = experiment.base_model(settings, splits.train)
    assert second.seconds is None
    assert second.history == first.history
    assert second.history[0].keys() == {"epoch", "lr", "loss", "accuracy"}


def test_a_finetuned_model_of_another_base_model_is_refused(settings, base, masked):
    before = sha256(base.model)
    start = (settings, settings.configuration, masked)
    first = experiment.load_or_train(*start, base)
    assert sha256(base.model) == before
    assert first.base_sha256 == before
    assert first.sha256 == sha256(first.model)
    with pytest.raises(CheckpointError, match="was made with base_sha256 = "):
        experiment.load_or_train(*start, changed(base))


def test_weights_that_do_not_fit_are_refused_by_name(settings, splits):
    path = settings.checkpoint_path("base")
    content = {"state_dict": {}}
    store.kept(path, settings.base.identity, lambda: content)
    with pytest.raises(CheckpointError, match=rf"{path.name} is damaged, foreign"):
        experiment.base_model(settings, splits.train)


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
    first = experiment.chosen_model(choice, base, splits.train)
    again = experiment.chosen_model(choice, base, splits.train)
    assert again.sha256 == first.sha256
    assert again.seconds is None
    flipped = masked.own_masks.flip(2)
    choice.masked = dataclasses.replace(masked, own_masks=flipped)
    with pytest.raises(CheckpointError, match="was made with masks_sha256 = "):
        experiment.chosen_model(choice, base, splits.train)


def test_if_erm_is_kept_it_is_the_chosen_model(base, splits):
    chosen = experiment.chosen_model(Mock(is_kept=True), base, splits.train)
    assert chosen.model is base.model
    row = experiment.record(chosen, splits)
    assert (row["configuration"], row["rule"]) == ("chosen", "ERM")


def test_finetuning_is_one_epoch_at_the_last_rate_of_the_base_model_unless_told():
    finetuning = Settings(epochs=50).training
    assert finetuning["epochs"] == 1
    assert finetuning["lr"] == 0.0025
    assert Settings(finetune_lr=0.1).training["lr"] == 0.1


MASKTUNE = {
    "seed": 3,
    "method": "mean",
    "param": 2,
    "upsample": "map",
    "dilation": 1,
    "rounds": 3,
    "finetune_schedule": "linear",
    "finetune_batch_size": 50,
}


def masked_round_by_round(settings, base, train) -> tuple[MaskedDataset, str]:
    """Masked images, and SHA-256 of the model, by calls that cache nothing."""
    rule = masking.Rule("mean", 2, "map", 1, fill=settings.fill)
    options = {
        "epochs": 1,
        "lr": settings.lr,
        "schedule": "linear",
        "batch_size": 50,
        "seed": 3,
    }
    images = train.images
    model = base.model
    masked = None
    for _ in range(3):
        maps = saliency.saliency_maps(model, images, train.labels)
        masked = rule.mask(train, maps, masked, 3)
        images = masked.images
        model = copy.deepcopy(base.model)
        training.train(model, masked, **options)
    return masked, sha256(model)


@pytest.mark.parametrize("fill", ["zero", "resample"])
def test_each_round_adds_what_the_model_before_looks_at(settings, splits, base, fill):
    settings = settings.replace(**MASKTUNE, fill=fill)
    masked, weights = masked_round_by_round(settings, base, splits.train)
    tuned = experiment.masktune(settings, base, splits.train)
    assert tuned.sha256 == weights
    assert tuned.seconds > 0
    assert torch.equal(tuned.images.own_masks, masked.own_masks)
    # the models of the rounds before are saved, and hide less
    shares = []
    for rounds in (1, 2, 3):
        of_round = settings.replace(rounds=rounds)
        again = experiment.masktune(of_round, base, splits.train)
        shares.append(again.images.own_masks.double().mean())
    assert shares[0] < shares[1] < shares[2]
    assert again.seconds is None


def test_saliency_is_computed_once_per_base_model(settings, splits, base, monkeypatch):
    compute = Mock(wraps=saliency.saliency_maps)
    monkeypatch.setattr(saliency, "saliency_maps", compute)
    first = experiment.training_saliency(settings, base, splits.train)
    again = experiment.training_saliency(settings, base, splits.train)
    assert torch.equal(again, first)
    compute.assert_called_once()
    with pytest.raises(CheckpointError, match=r"CNN_saliency\.pth was made with base_"):
        experiment.training_saliency(settings, changed(base), splits.train)


def test_a_result_tells_what_made_a_model_how_good_it_is_and_what_was_hidden(
    settings, splits, masked
):
    base = experiment.base_model(settings, splits.train)
    experiment.record(base, splits)
    tuned = experiment.load_or_train(settings, settings.configuration, masked, base)
    row = experiment.record(tuned, splits)
    hidden = results.hidden_shares(tuned.images)
    expected = {
        **settings.identity,
        "experiment": "mnist5k_limit=200_epochs=2_batch_size=20",
        "configuration": "top_k_0.1",
        "sha256": sha256(tuned.model),
        "base_sha256": base.sha256,
        "seconds": tuned.seconds,
        "device": "cpu",
        **results.evaluate(tuned.model, splits),
        "hidden_digit": hidden["digit"],
    }
    assert row.items() >= expected.items()
    path = settings.folder("results") / "top_k_0.1.json"
    assert results.read(path) == row
    table = results.collect(settings.directory)
    assert table["rule"].tolist() == ["ERM", "top_k 0.1"]


def test_a_result_is_made_anew_for_other_weights(splits, base):
    trained = base._replace(seconds=2.5)
    assert experiment.record(trained, splits)["seconds"] == 2.5
    assert experiment.record(base, splits)["seconds"] == 2.5
    row = experiment.record(changed(base), splits)
    assert row["seconds"] is None
    assert row["worst_group"] == 0


def test_rounds_end_when_they_hide_nothing_more(settings, splits, monkeypatch):
    base = experiment.base_model(settings, splits.train)
    train = Mock(wraps=training.train)
    monkeypatch.setattr(training, "train", train)
    weak = settings.replace(method="mean_std", param=28.0, rounds=4)
    tuned = experiment.masktune(weak, base, splits.train)
    assert train.call_count == 2  # the first round, and the last by its own name
    assert tuned.settings == weak
