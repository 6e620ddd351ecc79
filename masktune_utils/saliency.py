"""What the model looks at: class activation maps at the last convolution, from the library torchcam."""

import copy
import warnings

import torch
from torch import Tensor, nn
from torchcam import methods

from masktune_utils import progress
from masktune_utils.data import check_choice, check_images, to_float

CAMS = ("XGradCAM", "GradCAM", "GradCAMpp", "SmoothGradCAMpp", "LayerCAM", "FinerCAM")


def saliency_maps(
    model: nn.Module, images: Tensor, labels: Tensor, cam: str = "XGradCAM", batch_size: int = 200
) -> Tensor:
    """Saliency of each image for the score of its own label (XGradCAM: Fu et al., 2020, equation 8).

    Args:
        model: a SmallCNN, or any network with a method `get_grad_cam_target_layer()`, which returns the module whose
            output is explained; it is explained in evaluation mode, and itself left alone.
        images: N×3×28×28, uint8 or float in [0, 1], on the model's device.
        labels: N; the class whose score is explained, one an image.
        cam: a gradient CAM of torchcam, one of `CAMS`.
        batch_size: images at a time; it changes nothing but the speed (SmoothGradCAMpp apart, which adds noise, drawn
            from a fixed seed).

    Returns:
        N×8×8 (the size of that output) float32, each map scaled to [0, 1] by its minimum and maximum. A map that is the same everywhere gives
        zeros; a warning says how many there are.

    Raises:
        TypeError: for a model without such a method, and as `data.check_images`.
        ValueError: for an unknown CAM, a label that the model has no logit for, and as `data.check_images`.
    """
    check_choice("cam", cam, CAMS)
    check_images(images, labels)
    explained = copy.deepcopy(model).eval().requires_grad_(False)
    layer = getattr(explained, "get_grad_cam_target_layer", lambda: None)()
    if not isinstance(layer, nn.Module):
        raise TypeError(
            f"{type(model).__name__} does not say which layer is to be explained: give it a method "
            "get_grad_cam_target_layer() that returns one of its modules, such as the last convolution."
        )
    layer.register_forward_hook(lambda module, inputs, output: output.requires_grad_())  # no graph before this layer
    starts = progress.bar(range(0, len(images), batch_size), desc=cam, unit="batch", disable=len(images) <= batch_size)
    maps = []
    with (
        getattr(methods, cam)(explained, layer) as extractor,
        torch.random.fork_rng(devices=[images.device] if images.is_cuda else []),
        torch.enable_grad(),
    ):
        torch.manual_seed(0)  # SmoothGradCAMpp draws noise
        for start in starts:
            part = slice(start, start + batch_size)
            scores = explained(to_float(images[part]))
            if start == 0 and labels.max() >= scores.shape[1]:
                raise ValueError(
                    f"a label is {labels.max()}; allowed: less than {scores.shape[1]}, the model's classes."
                )
            maps += extractor(labels[part].tolist(), scores)
    maps = torch.cat(maps) if maps else images.new_zeros((0, 8, 8), dtype=torch.float32)
    if empty := int((maps.amax(dim=(1, 2)) == 0).sum()):
        warnings.warn(f"{empty} of {len(maps)} saliency maps are zero everywhere: they hide nothing.", stacklevel=2)
    return maps
