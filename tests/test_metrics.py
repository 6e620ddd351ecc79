"""Predictions."""

import pytest
import torch

from masktune_utils import metrics


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
