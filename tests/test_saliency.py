"""Saliency maps, against those of another library, and one by one."""

import pytest
import torch
from pytorch_grad_cam import XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from masktune_utils import data, saliency


@pytest.fixture
def few(splits) -> data.Split:
    """Some images of both classes, with and without the square."""
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(splits.train), generator=generator)
    return splits.train[order[:24]]


@pytest.mark.parametrize("cam", saliency.CAMS)
def test_batched_equals_one_by_one(model, few, cam):
    batched = saliency.saliency_maps(model, few.images, few.labels, cam)
    assert batched.shape == (24, 8, 8)
    alone = saliency.saliency_maps(model, few.images, few.labels, cam, batch_size=1)
    torch.testing.assert_close(batched, alone, atol=1e-5, rtol=1e-5)


def test_images_in_floating_point_have_the_same_maps(model, few):
    maps = saliency.saliency_maps(model, few.images, few.labels)
    images, labels = few.batch(slice(None))
    assert torch.equal(saliency.saliency_maps(model, images, labels), maps)


def test_xgradcam_equals_that_of_the_package_grad_cam(model, few):
    maps = saliency.saliency_maps(model, few.images, few.labels)
    images, labels = few.batch(slice(None))
    layer = model.get_grad_cam_target_layer()
    with XGradCAM(model, [layer]) as theirs:
        theirs(images, [ClassifierOutputTarget(label) for label in labels.tolist()])
        activations = theirs.activations_and_grads.activations[0].numpy()
        gradients = theirs.activations_and_grads.gradients[0].numpy()
        arrays = theirs.get_cam_image(images, layer, None, activations, gradients)
    expected = torch.as_tensor(arrays).clamp(min=0)
    expected -= expected.amin((1, 2), keepdim=True)
    expected /= expected.amax((1, 2), keepdim=True) + 1e-8
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_maps_explain_the_label_that_is_given(model, few):
    of_labels = saliency.saliency_maps(model, few.images, few.labels)
    assert of_labels.amin() >= 0
    assert of_labels.amax() <= 1
    of_others = saliency.saliency_maps(model, few.images, 1 - few.labels)
    assert not torch.allclose(of_labels, of_others)


def test_the_model_is_left_as_it_is(model, few):
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    saliency.saliency_maps(model, few.images, few.labels)
    assert model.training
    for module in model.modules():
        assert not module._forward_hooks  # torch has no public name for them
    for weights in model.parameters():
        assert weights.requires_grad
        assert weights.grad is None
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor)


def test_maps_that_are_zero_everywhere_are_counted(model, few):
    # without evidence every gradient is zero
    torch.nn.init.zeros_(model.linear[3].weight)
    with pytest.warns(UserWarning, match="24 of 24 maps are zero everywhere"):
        maps = saliency.saliency_maps(model, few.images, few.labels)
    assert torch.equal(maps, torch.zeros(24, 8, 8))


def test_a_model_without_a_layer_to_explain_is_refused(few):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 784, 2))
    message = "no layer of Sequential has a map; "
    message += "name one by layer=, or by a method get_grad"
    with pytest.raises(TypeError, match=message):
        saliency.saliency_maps(model, few.images, few.labels)


def test_an_unknown_cam_is_refused(model, few):
    with pytest.raises(ValueError, match=r"cam is 'GradCam'; allowed: .*XGradCAM"):
        saliency.saliency_maps(model, few.images, few.labels, "GradCam")
