"""Models, maps and results are loaded if they are saved, else made."""

import copy
import dataclasses
import json
import re

import pytest
import torch

from masktune_utils import (
    data,
    evaluation,
    experiment,
    masking,
    results,
    saliency,
    store,
    training,
)
from masktune_utils.experiment import Trained
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError, weights_sha256


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, epochs=1)


@pytest.fixture
def masked(splits) -> masking.MaskedDataset:
    maps = torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(0))
    return masking.mask_dataset(splits.train, maps, "top_k", 0.1)


@pytest.fixture
def base(settings, model) -> Trained:
    """A base model as if it had been loaded."""
    weights = sha256(model)
    return Trained(model, settings, "base", [], weights, weights, None)


def sha256(model: torch.nn.Module) -> str:
    return weights_sha256(model.state_dict())


def changed(base: Trained) -> Trained:
    """Another model, which always predicts class 0."""
    model = copy.deepcopy(base.model)
    with torch.no_grad():
        model.linear[3].bias += torch.tensor([1e6, 0.0])
    return dataclasses.replace(
        base, model=model, sha256=sha256(model), base_sha256=sha256(model)
    )


def test_base_model_is_trained_once(settings, splits):
    path = settings.checkpoint_path("base")
    first = experiment.base_model(settings, splits.train)
    assert (
        first.sha256 == first.base_sha256 == sha256(first.model) and first.seconds > 0
    )
    assert (
        first.configuration == "base"
        and not first.model.training
        and first.masked is None
    )
    assert store.load_checkpoint(path).settings == settings.identity(base=True)
    written = path.stat().st_mtime_ns
    second = experiment.base_model(settings, splits.train)
    assert second.sha256 == first.sha256 and second.history == first.history[:1]
    assert second.seconds is None and path.stat().st_mtime_ns == written
    experiment.base_model(settings, splits.train, retrain=True)
    assert path.stat().st_mtime_ns != written


def test_same_run_writes_the_same_bytes_and_another_seed_other_ones(
    settings, splits, masked
):
    contents = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        folder = f"{settings.directory}/{name}"
        one = settings.replace(directory=folder, seed=seed)
        base = experiment.base_model(one, splits.train)
        experiment.finetuned_model(one, base, masked)
        paths = [one.checkpoint_path(kind) for kind in ("base", one.configuration)]
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0] and contents[0][1] != contents[2][1]


def test_a_base_model_of_other_settings_or_a_damaged_one_is_refused(
    settings, splits, model
):
    path = settings.checkpoint_path("base")
    identity = settings.identity(base=True)
    store.save_checkpoint(path, model, identity | {"momentum": 0.5}, [])
    other = path.read_bytes()
    for content, message in (
        (other, "was made with momentum = 0.5"),
        (other[:-5], "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} {message}"):
            experiment.base_model(settings, splits.train)
        assert path.read_bytes() == content


def test_a_finetuned_model_of_another_base_model_is_refused(settings, base, masked):
    before = sha256(base.model)
    first = experiment.finetuned_model(settings, base, masked)
    assert sha256(base.model) == before == first.base_sha256 != sha256(first.model)
    other = changed(base)
    with pytest.raises(CheckpointError, match="was made with base_sha256 = "):
        experiment.finetuned_model(settings, other, masked)
    second = experiment.finetuned_model(settings, other, masked, retrain=True)
    assert second.base_sha256 == sha256(other.model)


@pytest.mark.parametrize(
    ("values", "expected"),
    [({}, [0.0025]), ({"finetune_lr": 0.01, "finetune_epochs": 3}, [0.01, 0.01, 0.01])],
)
def test_finetuning_is_one_epoch_at_the_last_rate_of_the_base_model_unless_told(
    settings, base, masked, values, expected
):
    settings = settings.replace(epochs=50, **values)
    tuned = experiment.finetuned_model(settings, base, masked)
    assert [epoch["lr"] for epoch in tuned.history] == expected


def masked_round_by_round(settings, base, train):
    """Masked images and model of each round, by calls that cache nothing."""
    images, earlier, network = train.images, None, base.model
    for _ in range(settings.rounds):
        maps = saliency.saliency_maps(network, images, train.labels)
        rule = {
            "upsample": "map",
            "dilation": 1,
            "seed": settings.seed,
            "fill": settings.fill,
        }
        earlier = masking.mask_dataset(train, maps, "mean", 2, **rule, earlier=earlier)
        network, images = copy.deepcopy(base.model), earlier.images
        options = {
            "epochs": 2,
            "lr": settings.lr,
            "schedule": "linear",
            "batch_size": 50,
        }
        training.train(network, earlier, seed=settings.seed, **options)
    return earlier, network


HOW = {"method": "mean", "param": 2, "upsample": "map", "dilation": 1, "rounds": 3}
HOW |= {"finetune_schedule": "linear", "finetune_batch_size": 50, "finetune_epochs": 2}


@pytest.mark.parametrize("fill", ["zero", "resample"])
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_each_round_adds_what_the_model_before_looks_at(settings, splits, base, fill):
    settings = settings.replace(**HOW, fill=fill)
    expected, network = masked_round_by_round(settings, base, splits.train)
    tuned = experiment.masktune(settings, base, splits.train)
    assert tuned.sha256 == sha256(network) and tuned.base_sha256 == base.sha256
    assert torch.equal(tuned.masked.own_masks, expected.own_masks)
    assert tuned.configuration == settings.configuration
    again = [*experiment.masktune_rounds(settings, base, splits.train)]
    assert [one.settings.rounds for one in again] == [1, 2, 3]
    assert again[2].seconds is None and again[2].sha256 == tuned.sha256
    masks = [one.masked.own_masks for one in again]
    assert (masks[0] <= masks[1]).all() and (masks[1] <= masks[2]).all()


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_cross_fit_hands_over_the_masks_of_two_halves(settings, splits, base):
    settings = settings.replace(**HOW, cross_fit=True)
    tuned = experiment.masktune(settings, base, splits.train)
    network = copy.deepcopy(base.model)
    for half, index in enumerate(
        data.stratified_halves(splits.train.labels, settings.seed)
    ):
        of_half = settings.replace(half=half, cross_fit=False)
        train = splits.train[index]
        masked, _ = masked_round_by_round(
            of_half, experiment.base_model(of_half, train), train
        )
        assert torch.equal(tuned.masked.own_masks[index], masked.own_masks)
    training.train(network, tuned.masked, **settings.finetuning)
    assert tuned.sha256 == sha256(network)
    assert not [
        *settings.folder("checkpoints").glob("CNN_saliency*")
    ]  # of the whole: none needed


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_saliency_is_computed_once_per_base_model(settings, splits, base, monkeypatch):
    first = experiment.training_saliency(settings, base, splits.train)
    calls, compute = [], saliency.saliency_maps
    monkeypatch.setattr(
        saliency, "saliency_maps", lambda *a: calls.append(1) or compute(*a)
    )
    assert torch.equal(
        experiment.training_saliency(settings, base, splits.train), first
    )
    assert not calls
    (path,) = settings.folder("checkpoints").glob("CNN_saliency_XGradCAM.pth")
    path.write_bytes(b"damaged")
    assert torch.equal(
        experiment.training_saliency(settings, base, splits.train), first
    )
    assert len(calls) == 1
    other = changed(base)
    torch.nn.init.zeros_(other.model.linear[3].weight)
    assert not experiment.training_saliency(settings, other, splits.train).any()


def test_a_result_tells_what_made_it_and_how_good_it_is(settings, splits, masked):
    base = experiment.base_model(settings, splits.train)
    tuned = experiment.finetuned_model(settings, base, masked)
    experiment.record(base, splits)
    row = experiment.record(tuned, splits)
    assert (
        row["experiment"] == "mnist5k_limit=200_epochs=1"
        and row["configuration"] == "top_k_0.1"
    )
    assert row.items() >= settings.identity(base=False).items()
    assert row["sha256"] == sha256(tuned.model) and row["base_sha256"] == sha256(
        base.model
    )
    assert row["seconds"] == tuned.seconds > 0 and row["device"] == "cpu"
    assert row["metrics"] == evaluation.evaluate(tuned.model, splits)
    assert row["biased"] == row["metrics"]["biased"]["accuracy"]
    assert row["biased_class_1"] == row["metrics"]["biased"]["class_accuracy"][1]
    assert row["hidden_shortcut"] == masking.hidden_shares(masked)["shortcut"]
    path = settings.folder("results") / "top_k_0.1.json"
    assert json.loads(path.read_text()) == row
    table = results.collect(settings.directory)
    assert table["configuration"].tolist() == ["base", "top_k_0.1"]
    assert table["raw"].tolist()[1] == row["raw"]


def test_a_result_keeps_its_seconds_as_long_as_the_weights_are_the_same(splits, base):
    trained = dataclasses.replace(base, seconds=2.5)
    held_out = splits._replace(validation=splits.train)
    row = experiment.record(trained, held_out)
    accuracies = row["metrics"]["validation"]["class_accuracy"]
    assert row["validation_worst_class"] == min(accuracies) and row["seconds"] == 2.5
    assert experiment.record(base, splits)["seconds"] == 2.5
    row = experiment.record(changed(base), splits)
    assert row["seconds"] is None
    assert (row["raw_class_0"], row["raw_class_1"], row["worst_group"]) == (1, 0, 0)


def test_a_result_keeps_how_its_weights_were_trained(settings, splits, monkeypatch):
    first = experiment.record(experiment.base_model(settings, splits.train), splits)
    loaded = experiment.base_model(settings, splits.train)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    again = experiment.record(loaded, splits)
    names = ("seconds", "threads", "torch", "device")
    assert loaded.seconds is None and [again[n] for n in names] == [
        first[n] for n in names
    ]
