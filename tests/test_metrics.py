"""Predictions."""

import pytest
import torch

from masktune_utils import metrics
from masktune_utils.data import Split


def test_predictions_are_made_in_evaluation_mode_in_any_batch(model, splits):
    expected = metrics.predict(model, splits.raw)
    model.train()
    model.backbone[1].eval()
    in_small_batches = metrics.predict(model, splits.raw, batch_size=7)
    torch.testing.assert_close(in_small_batches, expected)
    assert model.training
    assert not model.backbone[1].training


def test_what_is_predicted_must_be_finite_for_every_image():
    images = torch.ones(200, 3, 1, 1)
    images[-1] = 0  # whose logarithm is infinite
    split = Split(images, torch.arange(200))
    with pytest.raises(ValueError, match="predicts numbers that are not finite"):
        metrics.predict(lambda images: images.flatten(1).log(), split)
