from typing import get_args

import pytest
import torch
from pytorch_grad_cam import XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from masktune_utils import data, saliency
from masktune_utils.settings import Cam


@pytest.fixture
def few(splits) -> data.Split:
    """Some images of both classes, with and without the square."""
    order = torch.randperm(
        len(splits.train), generator=torch.Generator().manual_seed(0)
    )
    return splits.train[order[:24]]


@pytest.mark.parametrize("cam", set(get_args(Cam)) - {"SmoothGradCAMpp"})
def test_batched_equals_one_by_one(model, few, cam):
    batched = saliency.saliency_maps(model, few.images, few.labels, cam)
    parts = zip(few.images.split(1), few.labels.split(1), strict=True)
    single = [saliency.saliency_maps(model, *one, cam) for one in parts]
    torch.testing.assert_close(batched, torch.cat(single), atol=1e-5, rtol=1e-5)
    assert batched.shape == (24, 8, 8)
    floats, labels = few.batch(slice(None))
    assert torch.equal(saliency.saliency_maps(model, floats, labels, cam), batched)


def test_xgradcam_equals_that_of_the_package_grad_cam(model, few):
    ours = saliency.saliency_maps(model, few.images, few.labels)
    images, labels = few.batch(slice(None))
    layer = model.get_grad_cam_target_layer()
    with XGradCAM(model, [layer]) as theirs:
        theirs(images, [ClassifierOutputTarget(label) for label in labels.tolist()])
        kept = theirs.activations_and_grads
        arrays = kept.activations[0].numpy(), kept.gradients[0].numpy()
        maps = torch.as_tensor(
            theirs.get_cam_image(images, layer, None, *arrays)
        ).clamp(min=0)
    maps -= maps.amin((1, 2), keepdim=True)
    maps /= maps.amax((1, 2), keepdim=True) + 1e-8
    torch.testing.assert_close(ours, maps, atol=1e-4, rtol=1e-4)


def test_smoothed_maps_are_reproducible_whatever_the_global_generator(model, few):
    first = saliency.saliency_maps(model, few.images, few.labels, "SmoothGradCAMpp")
    state = torch.manual_seed(99).get_state()
    again = saliency.saliency_maps(model, few.images, few.labels, "SmoothGradCAMpp")
    assert torch.equal(first, again) and torch.equal(state, torch.get_rng_state())


def test_maps_explain_the_label_that_is_given(model, few):
    own = saliency.saliency_maps(model, few.images, few.labels)
    assert own.amin() >= 0 and own.amax() <= 1
    assert not torch.allclose(
        own, saliency.saliency_maps(model, few.images, 1 - few.labels)
    )


def test_the_model_is_left_as_it_is(model, few):
    model.train()
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    saliency.saliency_maps(model, few.images, few.labels)
    assert model.training and not any(
        module._forward_hooks for module in model.modules()
    )
    assert all(
        weights.requires_grad and weights.grad is None for weights in model.parameters()
    )
    assert all(
        torch.equal(before[name], now) for name, now in model.state_dict().items()
    )


def test_maps_that_are_zero_everywhere_are_counted(model, few):
    torch.nn.init.zeros_(
        model.linear[3].weight
    )  # no evidence at all: every gradient is zero
    with pytest.warns(UserWarning, match="24 of 24 maps are zero everywhere"):
        maps = saliency.saliency_maps(model, few.images, few.labels)
    assert torch.equal(maps, torch.zeros(24, 8, 8))


def test_a_model_without_a_layer_to_explain_is_refused(few):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 784, 2))
    message = (
        "no layer of Sequential has a map; it needs a method get_grad_cam_target_layer"
    )
    with pytest.raises(TypeError, match=message):
        saliency.saliency_maps(model, few.images, few.labels)


def test_an_unknown_cam_is_refused(model, few):
    with pytest.raises(ValueError, match=r"cam is 'GradCam'; allowed: .*XGradCAM"):
        saliency.saliency_maps(model, few.images, few.labels, "GradCam")
