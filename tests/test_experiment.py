"""Models, maps and results are loaded if they are saved, else made."""

import copy
import dataclasses
import json
import re

import pytest
import torch

from masktune_utils import evaluation, experiment, masking, saliency, store, training
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError, weights_sha256


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, epochs=1)


@pytest.fixture
def masked(splits) -> masking.MaskedDataset:
    maps = torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(0))
    return masking.mask_dataset(splits.train, maps, "top_k", 0.1)


def sha256(model: torch.nn.Module) -> str:
    return weights_sha256(model.state_dict())


def change(model: torch.nn.Module) -> None:
    """Make it another model, which always predicts class 0."""
    with torch.no_grad():
        model.linear[3].bias += torch.tensor([1e6, 0.0])


def test_base_model_is_trained_once(settings, splits):
    path = settings.checkpoint_path("base")
    first, about = experiment.base_model(settings, splits.train)
    assert about["sha256"] == sha256(first) and about["seconds"] > 0 and not first.training
    assert about["settings"] == settings.identity(base=True)
    written = path.stat().st_mtime_ns
    second, again = experiment.base_model(settings, splits.train)
    assert sha256(second) == sha256(first) and again == about | {"seconds": None}
    assert path.stat().st_mtime_ns == written
    experiment.base_model(settings, splits.train, retrain=True)
    assert path.stat().st_mtime_ns != written


def test_same_run_writes_the_same_bytes_and_another_seed_other_ones(settings, splits, masked):
    contents = []
    for name, seed in {"a": 0, "b": 0, "c": 1}.items():
        folder = f"{settings.directory}/{name}"
        one = dataclasses.replace(settings, directory=folder, seed=seed)
        base, _ = experiment.base_model(one, splits.train)
        experiment.finetuned_model(one, base, masked)
        paths = [one.checkpoint_path(kind) for kind in ("base", one.configuration)]
        contents.append([path.read_bytes() for path in paths])
    assert contents[0] == contents[1]
    assert contents[0][0] != contents[2][0] and contents[0][1] != contents[2][1]


def test_a_base_model_of_other_settings_or_a_damaged_one_is_refused(settings, splits, model):
    path = settings.checkpoint_path("base")
    identity = settings.identity(base=True)
    store.save_checkpoint(path, model, identity | {"momentum": 0.5}, [])
    other = path.read_bytes()
    for content, message in ((other, "was made with momentum = 0.5"), (other[:-5], "is damaged")):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f"{re.escape(str(path))} {message}"):
            experiment.base_model(settings, splits.train)
        assert path.read_bytes() == content


def test_a_finetuned_model_of_another_base_model_is_refused(settings, model, masked):
    before = sha256(model)
    first, about = experiment.finetuned_model(settings, model, masked)
    assert sha256(model) == before == about["settings"]["base_sha256"] != sha256(first)
    change(model)
    with pytest.raises(CheckpointError, match="was made with base_sha256 = "):
        experiment.finetuned_model(settings, model, masked)
    _, about = experiment.finetuned_model(settings, model, masked, retrain=True)
    assert about["settings"]["base_sha256"] == sha256(model)


@pytest.mark.parametrize(("finetune_lr", "expected"), [(None, 0.0025), (0.01, 0.01)])
def test_finetuning_is_one_epoch_at_the_rate_the_base_model_ended_with_or_the_given_one(
    settings, model, masked, finetune_lr, expected
):
    settings = dataclasses.replace(settings, epochs=50, finetune_lr=finetune_lr)
    _, about = experiment.finetuned_model(settings, model, masked)
    assert [epoch["lr"] for epoch in about["history"]] == [expected]


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
def test_iterations_mask_again_by_what_the_finetuned_model_looks_at(
    settings, splits, model, accumulate, restart
):
    settings = dataclasses.replace(settings, method="mean", param=2, upsample="map", dilation=1)
    settings = dataclasses.replace(settings, finetune_schedule="linear", finetune_batch_size=50)
    finetuning = {"epochs": 1, "lr": settings.lr, "schedule": "linear", "batch_size": 50}

    def mask(explained, images, earlier=None):
        maps = saliency.saliency_maps(explained, images, splits.train.labels)
        return masking.mask_dataset(splits.train, maps, "mean", 2, "map", 1, earlier=earlier)

    expected, masked = copy.deepcopy(model), mask(model, splits.train.images)
    first = masked
    for iteration in range(3):
        if iteration:
            images = masked.images if restart else splits.train.images
            masked = mask(expected, images, masked if accumulate else None)
        expected = copy.deepcopy(model) if restart else expected
        training.train(expected, masked, seed=settings.seed, **finetuning)
    settings = dataclasses.replace(settings, iterations=3, accumulate=accumulate, restart=restart)
    tuned, about = experiment.finetuned_model(settings, model, first)
    assert sha256(tuned) == sha256(expected)
    assert torch.equal(about["masked"].images, masked.images)
    _, again = experiment.finetuned_model(settings, model, first)
    assert torch.equal(again["masked"].images, masked.images) and again["seconds"] is None


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_saliency_is_computed_once_per_base_model(settings, splits, model, monkeypatch):
    first = experiment.training_saliency(settings, model, splits.train)
    calls, compute = [], saliency.saliency_maps
    monkeypatch.setattr(saliency, "saliency_maps", lambda *a: calls.append(1) or compute(*a))
    assert torch.equal(experiment.training_saliency(settings, model, splits.train), first)
    assert not calls
    (path,) = settings.folder("checkpoints").glob("CNN_saliency_XGradCAM.pth")
    path.write_bytes(b"damaged")
    assert torch.equal(experiment.training_saliency(settings, model, splits.train), first)
    assert len(calls) == 1
    torch.nn.init.zeros_(model.linear[3].weight)
    assert not experiment.training_saliency(settings, model, splits.train).any()


def test_a_result_tells_what_made_it_and_how_good_it_is(settings, splits, masked):
    base, base_about = experiment.base_model(settings, splits.train)
    tuned, about = experiment.finetuned_model(settings, base, masked)
    experiment.record(settings, base, base_about, splits)
    row = experiment.record(settings, tuned, about, splits)
    assert row["experiment"] == "mnist5k_limit=200_epochs=1" and row["configuration"] == "top_k_0.1"
    assert row.items() >= settings.identity(base=False).items()
    assert row["sha256"] == sha256(tuned) and row["base_sha256"] == sha256(base)
    assert row["seconds"] == about["seconds"] > 0 and row["device"] == "cpu"
    assert row["metrics"] == evaluation.evaluate(tuned, splits)
    assert row["biased"] == row["metrics"]["biased"]["accuracy"]
    assert row["biased_class_1"] == row["metrics"]["biased"]["class_accuracy"][1]
    assert row["hidden_shortcut"] == masking.hidden_shares(masked)["shortcut"]
    path = settings.folder("results") / "top_k_0.1.json"
    assert json.loads(path.read_text()) == row
    table = store.collect(settings.directory)
    assert table["configuration"].tolist() == ["base", "top_k_0.1"]
    assert table["raw"].tolist()[1] == row["raw"]


def test_a_result_keeps_its_seconds_as_long_as_the_weights_are_the_same(settings, splits, model):
    trained = {"sha256": sha256(model), "settings": {}, "seconds": 2.5}
    loaded = trained | {"seconds": None}
    held_out = splits._replace(validation=splits.train)
    row = experiment.record(settings, model, trained, held_out)
    accuracies = row["metrics"]["validation"]["class_accuracy"]
    assert row["validation_worst_class"] == min(accuracies) and row["seconds"] == 2.5
    assert experiment.record(settings, model, loaded, splits)["seconds"] == 2.5
    change(model)
    row = experiment.record(settings, model, loaded | {"sha256": sha256(model)}, splits)
    assert row["seconds"] is None
    assert (row["raw_class_0"], row["raw_class_1"], row["worst_group"]) == (1, 0, 0)


def test_a_result_keeps_how_its_weights_were_trained(settings, splits, monkeypatch):
    base, about = experiment.base_model(settings, splits.train)
    first = experiment.record(settings, base, about, splits)
    _, loaded = experiment.base_model(settings, splits.train)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    again = experiment.record(settings, base, loaded, splits)
    names = ("seconds", "threads", "torch", "device")
    assert loaded["seconds"] is None and [again[n] for n in names] == [first[n] for n in names]
