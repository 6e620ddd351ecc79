import pytest
import torch
from pytorch_grad_cam import XGradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

from masktune_utils import saliency


@pytest.fixture
def few(splits):
    """Some images of both classes, with and without the square."""
    return splits.train[torch.randperm(len(splits.train), generator=torch.Generator().manual_seed(0))[:24]]


@pytest.mark.parametrize("cam", [cam for cam in saliency.CAMS if cam != "SmoothGradCAMpp"])
def test_batched_equals_one_by_one(model, few, cam):
    batched = saliency.saliency_maps(model, few.images, few.labels, cam)
    single = [saliency.saliency_maps(model, few[i : i + 1].images, few[i : i + 1].labels, cam) for i in range(len(few))]
    torch.testing.assert_close(batched, torch.cat(single), atol=1e-5, rtol=1e-5)
    assert batched.shape == (24, 8, 8)


def test_xgradcam_equals_that_of_the_package_grad_cam(model, few):
    ours = saliency.saliency_maps(model, few.images, few.labels)
    images, labels = few.batch(slice(None))
    with XGradCAM(model, [model.get_grad_cam_target_layer()]) as theirs:
        theirs(images, [ClassifierOutputTarget(label) for label in labels.tolist()])
        store = theirs.activations_and_grads
        maps = theirs.get_cam_image(
            images, model.get_grad_cam_target_layer(), None, store.activations[0].numpy(), store.gradients[0].numpy()
        )
    maps = torch.as_tensor(maps).clamp(min=0)
    maps -= maps.amin((1, 2), keepdim=True)
    torch.testing.assert_close(ours, maps / (maps.amax((1, 2), keepdim=True) + 1e-8), atol=1e-4, rtol=1e-4)


def test_smoothed_maps_are_reproducible_and_leave_the_global_generator_alone(model, few):
    state = torch.get_rng_state()
    first, second = (saliency.saliency_maps(model, few.images, few.labels, "SmoothGradCAMpp") for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(state, torch.get_rng_state())


def test_maps_explain_the_label_that_is_given(model, few):
    own = saliency.saliency_maps(model, few.images, few.labels)
    assert own.amin() >= 0 and own.amax() <= 1
    assert not torch.allclose(own, saliency.saliency_maps(model, few.images, 1 - few.labels))


def test_uint8_and_float_images_give_the_same_maps(model, few):
    floats, labels = few.batch(slice(None))
    assert torch.equal(saliency.saliency_maps(model, few.images, labels), saliency.saliency_maps(model, floats, labels))


def test_mode_is_restored_and_hooks_are_removed_even_after_an_error(model, few):
    model.train()
    saliency.saliency_maps(model, few.images, few.labels)
    with pytest.raises(RuntimeError):
        saliency.saliency_maps(model, few.images[:, :2], few.labels)
    assert model.training
    assert not any(module._forward_hooks for module in model.modules())


def test_maps_that_are_zero_everywhere_are_counted(model, few):
    with torch.no_grad():
        model.linear[3].weight.zero_()  # no evidence at all: every gradient is zero
    with pytest.warns(UserWarning, match="24 of 24 saliency maps are zero everywhere"):
        maps = saliency.saliency_maps(model, few.images, few.labels)
    assert torch.equal(maps, torch.zeros(24, 8, 8))


def test_bad_arguments_are_refused(model, few):
    with pytest.raises(ValueError, match="cam is 'ScoreCAM'; allowed: 'XGradCAM'"):
        saliency.saliency_maps(model, few.images, few.labels, "ScoreCAM")
    with pytest.raises(ValueError, match="24 images and 3 labels"):
        saliency.saliency_maps(model, few.images, few.labels[:3])
