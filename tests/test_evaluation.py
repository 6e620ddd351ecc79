"""Predictions, their metrics, and the evaluation of a saved model."""

import json
import math
from pathlib import Path
from unittest.mock import Mock, call

import numpy as np
import pytest
import torch
from sklearn import metrics as sk

from masktune_utils import datasets, evaluation, metrics, models, store
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError


def test_metrics_equal_scikit_learns():
    """The last of six classes neither occurs nor is predicted."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, 6, generator=generator)
    logits[:, 5] = -9
    labels = torch.randint(5, (500,), generator=generator)
    predicted = logits.argmax(1)
    report = metrics.report(logits, labels)
    shares = logits.double().softmax(1)
    loss = sk.log_loss(labels, shares, labels=range(6))
    assert report["loss"] == pytest.approx(loss, rel=1e-5)
    assert report["accuracy"] == sk.accuracy_score(labels, predicted)
    recalls = sk.recall_score(labels, predicted, average=None)
    np.testing.assert_allclose(report["class_accuracy"], [*recalls, math.nan])
    matrix = sk.confusion_matrix(labels, predicted, labels=range(6))
    assert report["confusion_matrix"] == matrix.tolist()


def test_report_over_both_test_sets(model, splits):
    report = evaluation.evaluate(model, splits)
    for name, split in splits.tests.items():
        predicted = model(split.images / 255).argmax(1)
        accuracy = sk.accuracy_score(split.labels, predicted)
        assert report[name]["accuracy"] == pytest.approx(accuracy)
    assert report["groups"] == {
        "low, no shortcut": report["raw"]["class_accuracy"][0],
        "high, no shortcut": report["raw"]["class_accuracy"][1],
        "high, shortcut": report["biased"]["class_accuracy"][1],
    }
    assert report["worst_group"] == min(report["groups"].values())


def test_predictions_are_made_in_evaluation_mode_in_any_batch(model, splits):
    expected = metrics.predict(model, splits.raw)
    model.train()
    in_small_batches = metrics.predict(model, splits.raw, batch_size=7)
    torch.testing.assert_close(in_small_batches, expected)


def test_an_error_leaves_each_module_in_its_mode(model, splits):
    model.train()
    model.backbone[1].eval()
    model.linear[3] = torch.nn.Linear(3, 2)  # it fits no other layer
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        metrics.predict(model, splits.raw)
    assert model.training
    assert not model.backbone[1].training


def evaluated(model: models.SmallCNN, **settings) -> str:
    """A report as text, in which NaN equals NaN."""
    sets = datasets.load(Settings(dataset="mnist5k", **settings))
    return json.dumps(evaluation.evaluate(model, sets))


@pytest.fixture
def path(tmp_path) -> Path:
    """Of a checkpoint."""
    return tmp_path / "saved.pth"


def save(path: Path, model: models.SmallCNN, **settings) -> None:
    """As a base model of an experiment."""
    identity = Settings(**{"dataset": "mnist5k", **settings}).identity(base=True)
    store.save_checkpoint(path, model, identity, [])


@pytest.mark.parametrize(("classes", "labels"), [(2, "halves"), (10, "digits")])
def test_a_plain_state_dict_is_evaluated_on_its_classes(classes, labels, path):
    model = models.new_model(0, num_classes=classes)
    torch.save(model.state_dict(), path)
    report = evaluation.evaluate_checkpoint(path, dataset="mnist5k")
    assert json.dumps(report) == evaluated(model, labels=labels)


OWN_SETTINGS = [
    {"square_size": 9, "square_color": "red"},
    {"labels": "digits"},
    {"limit": 200, "validation_share": 0.2},
]


@pytest.mark.parametrize("values", OWN_SETTINGS)
def test_our_checkpoint_is_evaluated_by_its_own_settings(values, path):
    model = models.new_model(0, num_classes=10 if "labels" in values else 2)
    save(path, model, **values)
    report = evaluation.evaluate_checkpoint(path, dataset="mnist5k")
    assert json.dumps(report) == evaluated(model, **values)
    assert sum(map(sum, report["raw"]["confusion_matrix"])) == 1000


def test_a_checkpoint_that_names_its_data_set_is_evaluated_on_it(
    model, path, monkeypatch
):
    save(path, model)
    resolve = Mock(wraps=datasets.resolve_dataset)
    monkeypatch.setattr(datasets, "resolve_dataset", resolve)
    assert json.dumps(evaluation.evaluate_checkpoint(path)) == evaluated(model)
    assert call("auto") not in resolve.mock_calls  # it might ask the network for MNIST


def test_a_checkpoint_of_another_data_set_is_not_evaluated(model, path):
    save(path, model, dataset="mnist")
    message = r"saved\.pth was trained on 'mnist'; use dataset='mnist'"
    with pytest.raises(CheckpointError, match=message):
        evaluation.evaluate_checkpoint(path, dataset="mnist5k")
