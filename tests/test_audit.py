"""The audit of a classifier that looks at a bar; classifiers as files."""

import numpy as np
import pytest
import torch
from torch import nn

from masktune_utils.choice import audit
from masktune_utils.data import Split
from masktune_utils.models import from_onnx

BAR = (..., slice(20, 26))  # on the right
MEANS = """
<ir_version: 8, opset_import: ["": 13]>
means (float[batch, 3, 8, 8] x) => (float[batch, 3] y) {
    y = ReduceMean <axes = [2, 3], keepdims = 0> (x)
}
"""


def toy(mistakes):
    """A hundred images of noise; a bar is bright in class 1, and in some of 0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 3, 28, 28, generator=generator) / 2
    labels = torch.arange(100) % 2
    is_bright = labels == 1
    is_bright[: 2 * mistakes : 2] = True
    images[BAR][is_bright] = 1
    return Split(images.numpy(), labels.tolist(), class_names=("dark", "bright"))


def logits(images):
    bars = images[BAR]
    brightness = bars.mean((1, 2, 3))
    darkness = 1 - brightness
    return 5 * torch.stack([darkness, brightness], 1)


def test_an_audit_names_the_part_with_which_mistakes_move():
    found = audit(logits, toy(mistakes=6))
    assert found.stands_out
    assert found.region[BAR].all()
    assert found.region.float().mean() < 0.5
    assert found.elsewhere == [0, 0, 0, 0]
    kind = found.kinds.loc["dark", "bright"]
    assert kind.tolist() == [6, 6]
    assert found.reason.startswith("6 of 6 mistakes move with the top right (")


def test_an_audit_takes_probabilities_of_a_network_as_well():
    class Network(nn.Module):  # which has no weights
        def forward(self, images):
            return logits(images).softmax(1)

    images = toy(mistakes=6)
    found = audit(Network(), images)
    assert found.reason == audit(logits, images).reason


def test_few_mistakes_and_another_number_of_classes_are_said():
    images = toy(mistakes=4)
    found = audit(logits, images)
    assert found.reason.startswith("4 mistakes of 100 images")
    with pytest.raises(ValueError, match="predicts 1 classes; allowed: the 2 of the"):
        audit(lambda images: logits(images)[:, :1], images)
    with pytest.raises(TypeError, match="allowed: logits, a tensor N×classes"):
        audit(lambda _: np.ones((100, 2)), images)
    with pytest.raises(TypeError, match="the images are a list; allowed: a Split"):
        audit(logits, [*images])


def test_a_classifier_that_looks_at_nothing_is_said_to_have_no_region():
    found = audit(lambda images: torch.ones(len(images), 2), toy(6), np.int64(0))
    assert not found.stands_out
    assert found.reason == "No part of the image lowers the loss of its mistakes."


def test_a_classifier_is_read_from_a_file_or_refused_by_its_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "network.onnx"
    model = onnx.parser.parse_model(MEANS)
    onnx.save(model, path)
    mean = [0.5, 0, 0]
    std = np.array([2, 1, 1])
    classify = from_onnx(path, 8, mean, std)
    white = torch.ones(1, 3, 8, 8)
    expected = torch.tensor([[0.25, 1, 1]])
    for images in (white, white.double()):
        torch.testing.assert_close(classify(images), expected)

    def refuse(size, reason):
        words = rf"network\.onnx does not classify images of 3×{size}×{size} \("
        with pytest.raises(ValueError, match=f"(?s){words}.*{reason}"):
            from_onnx(path, size, mean, std)

    refuse(9, "Expected: 8")
    fixed = MEANS.replace("batch", "1")
    onnx.save(onnx.parser.parse_model(fixed), path)
    refuse(8, "Expected: 1")
    path.write_bytes(b"no network")
    refuse(8, "Protobuf")
    path.unlink()
    refuse(8, "File doesn't exist")
