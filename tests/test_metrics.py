"""Predictions."""

import torch

from masktune_utils import metrics


def test_predictions_are_made_in_evaluation_mode_in_any_batch(model, splits):
    expected = metrics.predict(model, splits.raw)
    model.train()
    model.backbone[1].eval()
    in_small_batches = metrics.predict(model, splits.raw, batch_size=7)
    torch.testing.assert_close(in_small_batches, expected)
    assert model.training
    assert not model.backbone[1].training
