"""The audit of a classifier that looks at one corner; classifiers as files."""

import pytest
import torch
from torch import nn

from masktune_utils.choice import audit
from masktune_utils.data import Split
from masktune_utils.models import from_onnx


def toy(mistakes):
    """A hundred images of noise; a corner is bright in class 1, and in some of 0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 3, 28, 28, generator=generator) / 2
    labels = torch.arange(100) % 2
    is_bright = labels == 1
    is_bright[: 2 * mistakes : 2] = True
    images[is_bright, :, 20:26, 2:8] = 1
    return Split(images, labels, class_names=("dark", "bright"))


def logits(images):
    brightness = images[:, :, 20:26, 2:8].mean((1, 2, 3))
    return 10 * torch.stack([0.5 - brightness, brightness - 0.5], 1)


def test_an_audit_names_the_part_with_which_mistakes_move():
    found = audit(logits, toy(mistakes=6))
    assert found.stands_out
    assert found.region[20:26, 2:8].all()
    assert found.region.float().mean() < 0.3
    assert found.elsewhere == [0, 0, 0]
    assert found.kinds.loc[("dark", "bright")].tolist() == [6, 6]
    assert found.reason.startswith("6 of 6 mistakes move with the bottom left (")


def test_an_audit_takes_probabilities_of_a_network_and_leaves_its_mode():
    class Network(nn.Module):
        def forward(self, images):
            return logits(images).softmax(1)

    network = Network().train()
    found = audit(network, toy(mistakes=6))
    assert network.training
    assert found.reason == audit(logits, toy(mistakes=6)).reason


def test_few_mistakes_and_another_number_of_classes_are_said():
    assert audit(logits, toy(mistakes=4)).reason.startswith("4 mistakes of 100 images")
    with pytest.raises(ValueError, match="predicts 1 classes; allowed: the 2 of the"):
        audit(lambda images: logits(images)[:, :1], toy(mistakes=4))


def test_a_classifier_is_read_from_a_file_or_refused_by_its_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    path = tmp_path / "network.onnx"
    image = ["batch", 3, 8, 8]
    kind = onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)],
        "mean",
        [helper.make_tensor_value_info("x", kind, image)],
        [helper.make_tensor_value_info("y", kind, ["batch", 3])],
    )
    opset = helper.make_opsetid("", 13)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    onnx.save(model, path)
    classify = from_onnx(path, 8, [0.5, 0, 0], [2.0, 1, 1])
    expected = torch.tensor([[0.25, 1, 1]])
    torch.testing.assert_close(classify(torch.ones(1, 3, 8, 8)), expected)
    with pytest.raises(
        ValueError, match=r"network\.onnx takes \[\['batch', 3, 8, 8\]\]"
    ):
        from_onnx(path, 9, [0, 0, 0], [1, 1, 1])
    path.write_bytes(b"no network")
    with pytest.raises(ValueError, match=r"network\.onnx is no ONNX"):
        from_onnx(path, 8, [0, 0, 0], [1, 1, 1])
    with pytest.raises(FileNotFoundError, match=r"other\.onnx is no file"):
        from_onnx(tmp_path / "other.onnx", 8, [0, 0, 0], [1, 1, 1])
