"""What the model looks at: class activation maps, from the library torchcam."""

import copy
import warnings
from typing import get_args

import torch
from torch import Tensor, nn
from torchcam import methods

from masktune_utils import data, models, progress
from masktune_utils.settings import Cam


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    cam: str = "XGradCAM",
    batch_size: int = 100,
) -> Tensor:
    """Saliency of each image for the score of its own label.

    XGradCAM: Fu et al., 2020, equation 8.

    Args:
        model: a SmallCNN, or any network of images, see `models.target_layer`. It is
            explained in evaluation mode, and is itself left as it is.
        images: N×C×H×W, uint8 or float in [0, 1], on any device.
        labels: N, on any device; the class whose score is explained, one per image.
        cam: one of `settings.Cam`, named as the classes of torchcam.
        batch_size: images at a time. It only changes the speed, except for
            SmoothGradCAMpp, which adds noise from a fixed seed.

    Returns:
        N×h×w float32, the size of the layer's output (SmallCNN: 8×8), each map scaled
        to [0, 1] by its minimum and maximum. A map that is the same everywhere gives
        zeros; a warning counts these.

    Raises:
        TypeError: the model does not name a layer to explain.
        ValueError: an unknown CAM.
    """
    if cam not in get_args(Cam):
        raise ValueError(f"cam is {cam!r}; allowed: {', '.join(get_args(Cam))}.")
    explained = copy.deepcopy(model).eval().requires_grad_(False)
    layer = models.target_layer(explained, tuple(images.shape[1:]))
    # The gradient starts at this layer; the layers before it need no graph.
    layer.register_forward_hook(
        lambda _module, _inputs, output: output.requires_grad_().clone()
    )
    device = next(explained.parameters()).device
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    maps = []
    with (
        getattr(methods, cam)(explained, layer) as extractor,
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        torch.enable_grad(),
    ):
        torch.manual_seed(0)  # SmoothGradCAMpp draws noise
        for batch, classes in progress.bar(
            batches, desc=cam, disable=len(batches) <= 1
        ):
            scores = explained(data.to_float(batch.to(device)))
            maps += extractor(classes.tolist(), scores)
    maps = torch.cat(maps)
    empty = int((maps.amax(dim=(1, 2)) == 0).sum())
    if empty:
        warnings.warn(f"{empty} of {len(maps)} maps are zero everywhere.", stacklevel=2)
    return maps
