"""What the model looks at: class activation maps, from the library torchcam."""

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchcam import methods

from masktune_utils import data, models, progress

CAMS = ("XGradCAM", "GradCAM", "GradCAMpp", "LayerCAM", "FinerCAM")


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    cam: str = "XGradCAM",
    batch_size: int = 100,
    layer: str = "",
    reshape: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Saliency of each image for the score of its own label.

    XGradCAM: Fu et al., 2020, equation 8.

    Args:
        model: a SmallCNN, or any network of images. It is explained in evaluation mode,
            and is itself left as it is.
        images: N×C×H×W, uint8 or float in [0, 1], on any device.
        labels: N, on any device; the class whose score is explained, one per image.
        cam: one of `CAMS`, named as the classes of torchcam.
        batch_size: images at a time. It only changes the speed.
        layer: name of the layer to explain; by default see `models.target_layer`.
        reshape: from the output of a layer that is given, which has tokens or channels
            last, to N×C×h×w.

    Returns:
        N×h×w float32, the size of the layer's output (SmallCNN: 8×8), each map scaled
        to [0, 1] by its minimum and maximum. A map that is the same everywhere gives
        zeros; a warning counts these.

    Raises:
        TypeError: the model does not name a layer to explain; or what the layer gives
            is no map of the image.
        ValueError: an unknown CAM.
    """
    if cam not in CAMS:
        raise ValueError(f"cam is {cam!r}; allowed: {', '.join(CAMS)}.")
    explained = copy.deepcopy(model).eval().requires_grad_(False)
    target = models.target_layer(explained, tuple(images.shape[1:]), layer)

    def start_graph(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        """The gradient starts at this layer; those before it need no graph."""
        _check_map(reshape(output) if reshape else output, images)
        return output.requires_grad_().clone()

    target.register_forward_hook(start_graph)
    device = next(explained.parameters()).device
    batches = list(zip(images.split(batch_size), labels.split(batch_size), strict=True))
    maps = []
    with (
        getattr(methods, cam)(
            explained, target, reshape_transform=reshape
        ) as extractor,
        torch.enable_grad(),
    ):
        for batch, classes in progress.bar(batches, desc=cam):
            scores = explained(data.to_float(batch.to(device)))
            maps += extractor(classes.tolist(), scores)
    maps = torch.cat(maps)
    empty = int((maps.amax(dim=(1, 2)) == 0).sum())
    if empty:
        warnings.warn(f"{empty} of {len(maps)} maps are zero everywhere.", stacklevel=2)
    return maps


@torch.no_grad()
def exchange_map(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    window: int = 4,
    step: int = 2,
    seed: int = 0,
) -> Tensor:
    """Where the mistakes of a network come from: any network, without gradients.

    A window is taken from another image of the same class. Where this lowers the loss
    of a mistake, the window is what misled the network. Each kind of mistake (class,
    prediction) counts the same. Ours; permuting a feature to see what a model needs:
    Breiman, 2001.

    Args:
        model: it is explained in evaluation mode, and is itself left as it is.
        images: N×C×H×W, uint8 or float in [0, 1], which the model has not seen.
        labels: N.
        window: side of a window in pixels.
        step: from a window to the next one, in pixels.
        seed: of the other images.

    Returns:
        h×w float32, on the CPU: the mean fall of the cross-entropy, in nats, for each
        window.

    Raises:
        ValueError: the model makes no mistake.
    """
    model = copy.deepcopy(model).eval()
    device = next(model.parameters()).device
    parts = [model(data.to_float(part.to(device))) for part in images.split(100)]
    predicted = torch.cat(parts).argmax(1).to(labels.device)
    mistakes = (predicted != labels).nonzero()[:, 0]
    if not len(mistakes):
        raise ValueError(
            "the model makes no mistake; allowed: images that it gets wrong."
        )
    generator = torch.Generator().manual_seed(seed)
    partners = data.class_partners(labels, generator)[mistakes]
    kinds = torch.stack([labels[mistakes], predicted[mistakes]])
    _, kind, sizes = kinds.unique(dim=1, return_inverse=True, return_counts=True)
    weights = (1 / sizes[kind] / len(sizes)).to(device)
    own = data.to_float(images[mistakes].to(device))
    others = data.to_float(images[partners].to(device))
    classes = labels[mistakes].to(device)

    def loss(batch: Tensor) -> float:
        return (
            weights * F.cross_entropy(model(batch), classes, reduction="none")
        ).sum()

    before = loss(own)
    height, width = images.shape[-2:]
    rows = []
    for top in progress.bar(range(0, height - window + 1, step), desc="exchanging"):
        row = []
        for left in range(0, width - window + 1, step):
            exchanged = own.clone()
            place = (..., slice(top, top + window), slice(left, left + window))
            exchanged[place] = others[place]
            row.append(before - loss(exchanged))
        rows.append(torch.stack(row))
    return torch.stack(rows).cpu()


def _check_map(features: Tensor, images: Tensor) -> None:
    """Refuse features, N×C×h×w, that are not about as wide and high as the images."""
    height, width = features.shape[-2:]
    ratio = height * images.shape[-1] / (width * images.shape[-2])
    if features.ndim != 4 or max(height, width) == 1 or not 0.5 <= ratio <= 2:
        size = "×".join(map(str, features.shape[1:]))
        raise TypeError(
            f"the layer gives N×{size}; allowed: N×C×h×w, in the proportions of the "
            "image. Name another by layer=, or make it a map by reshape=."
        )
