"""What the model looks at: class activation maps, from the library torchcam."""

import copy

import torch
from torch import Tensor, nn
from torchcam.methods import XGradCAM

from masktune_utils import data, models, progress


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    batch_size: int = 100,
    layer: str = "",
) -> Tensor:
    """Saliency of each image for the score of its own label.

    XGradCAM: Fu et al., 2020, equation 8.

    Args:
        model: a SmallCNN, or any network of images. It is explained in evaluation mode,
            and is itself left as it is.
        images: N×C×H×W, uint8 or float in [0, 1], on any device.
        labels: N, on any device; the class whose score is explained, one per image.
        batch_size: images at a time. It only changes the speed.
        layer: name of the layer to explain; by default see `models.target_layer`.

    Returns:
        N×h×w float32, where the images are, of the size of the layer's output
        (SmallCNN: 8×8), each map scaled to [0, 1] by its minimum and maximum. A map
        that is the same everywhere gives zeros.

    Raises:
        NoMapsError: no layer of the model has a map, and none is named; or the layer is
            computed without gradients.
        TypeError: what the layer gives is no map of the image.
    """
    explained = copy.deepcopy(model).eval().requires_grad_(False)
    target = models.target_layer(explained, images.shape[1:], layer)

    def start_graph(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        """The gradient starts at this layer; those before it need no graph."""
        if not torch.is_grad_enabled():
            raise models.NoMapsError("the layer is computed without gradients.")
        if not models.is_map(output.shape, images.shape):
            raise TypeError(
                f"the layer gives {tuple(output.shape)}; allowed: N×C×h×w, in the "
                "proportions of the image. Name another by layer=."
            )
        return output.requires_grad_()

    device = next(explained.parameters()).device
    batches = torch.arange(len(images)).split(batch_size)
    maps = []
    with (
        target.register_forward_hook(start_graph),
        XGradCAM(explained, target) as extractor,
        # What follows may change it in place, as a ReLU does.
        target.register_forward_hook(lambda _layer, _inputs, output: output.clone()),
        torch.enable_grad(),
        models.in_float32(),
    ):
        for index in progress.bar(batches, desc="saliency maps"):
            scores = explained(data.to_float(images[index].to(device)))
            maps += extractor(labels[index].tolist(), scores)
    return torch.cat(maps).to(images.device)
