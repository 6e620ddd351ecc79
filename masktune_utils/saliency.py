"""What the model looks at: class activation maps, from the library torchcam."""

import copy
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchcam.methods import XGradCAM

from masktune_utils import data, models, progress
from masktune_utils.data import Split

MOST_MISTAKES = 100  # that are exchanged, window by window


def saliency_maps(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
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
        batch_size: images at a time. It only changes the speed.
        layer: name of the layer to explain; by default see `models.target_layer`.
        reshape: from the output of a layer that is given, which has tokens or channels
            last, to N×C×h×w.

    Returns:
        N×h×w float32, where the images are, of the size of the layer's output
        (SmallCNN: 8×8), each map scaled to [0, 1] by its minimum and maximum. A map
        that is the same everywhere gives zeros; a warning counts these.

    Raises:
        TypeError: the model does not name a layer to explain; or what the layer gives
            is no map of the image.
    """
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
        XGradCAM(explained, target, reshape_transform=reshape) as extractor,
        torch.enable_grad(),
        models.in_float32(),
    ):
        for batch, classes in progress.bar(batches, desc="saliency maps"):
            scores = explained(data.to_float(batch.to(device)))
            maps += extractor(classes.tolist(), scores)
    maps = torch.cat(maps).to(images.device)
    empty = int((maps.amax(dim=(1, 2)) == 0).sum())
    if empty:
        warnings.warn(f"{empty} of {len(maps)} maps are zero everywhere.", stacklevel=2)
    return maps


def exchange_map(
    network: nn.Module, split: Split, predicted: Tensor, seed: int = 0
) -> Tensor:
    """Where the mistakes of a network come from: any network, without gradients.

    A window, a seventh of the image wide and high, is taken from another image of the
    same class. Where this lowers the loss of a mistake, the window has misled the
    network. Each kind of mistake (class, prediction) counts the same. Ours; permuting a
    feature to see what a model needs: Breiman, 2001.

    Args:
        network: any network; it is left as it is.
        split: images that it has not seen.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of the other images; and of MOST_MISTAKES mistakes, if there are more.

    Returns:
        h×w float32, on the CPU: by how much the cross-entropy falls on average, in
        nats, for each window; neighbours overlap by half. Zero if there is no mistake.
    """
    network = copy.deepcopy(network).eval()
    images = split.images
    labels = split.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    mistakes = (predicted != labels).nonzero()[:, 0]
    if len(mistakes) > MOST_MISTAKES:
        drawn = torch.randperm(len(mistakes), generator=generator)[:MOST_MISTAKES]
        mistakes = mistakes[drawn]
    kinds = torch.stack([labels, predicted], 1)[mistakes]
    _, kind, sizes = kinds.unique(dim=0, return_inverse=True, return_counts=True)
    weights = 1 / (len(sizes) * sizes[kind])
    partners = data.class_partners(labels, generator)
    rows, columns = map(_windows, images.shape[-2:])
    falls = torch.zeros(len(rows), len(columns))
    if not len(mistakes):
        return falls
    others = images[partners[mistakes]]
    before = _losses(network, images[mistakes], labels[mistakes])
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            exchanged = images[mistakes]
            exchanged[..., row, column] = others[..., row, column]
            after = _losses(network, exchanged, labels[mistakes])
            falls[i, j] = weights @ (before - after)
    return falls


def _windows(side: int) -> list[slice]:
    """A seventh of a side each; neighbours overlap by half."""
    size = max(1, side // 7)
    starts = range(0, side - size + 1, max(1, size // 2))
    return [slice(start, start + size) for start in starts]


@torch.no_grad()
def _losses(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each image, on the CPU."""
    device = next(network.parameters()).device
    with models.in_float32():
        logits = network(data.to_float(images.to(device)))
    return F.cross_entropy(logits.float().cpu(), labels, reduction="none")


def _check_map(features: Tensor, images: Tensor) -> None:
    """Refuse features that are no map of the images."""
    if not models.is_map(features.shape, images.shape):
        raise TypeError(
            f"the layer gives {tuple(features.shape)}; allowed: N×C×h×w, in the "
            "proportions of the image. Name another by layer=, or make it a map by "
            "reshape=."
        )
