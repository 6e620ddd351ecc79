"""Predictions, and their accuracy by group."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from masktune_utils.data import Split, group_members
from masktune_utils.models import in_float32

# a network, or a function: images in [0, 1], B×C×H×W → logits, B×classes
Network = nn.Module | Callable[[Tensor], Tensor]


@torch.no_grad()
def predict(
    model: Network,
    dataset: Dataset,
    batch_size: int = 100,
) -> Tensor:
    """Logits in evaluation mode, N×classes, float32 on the CPU.

    Args:
        model: the modes of its modules are restored. A function gets images where
            they are.
        dataset: a `Split` or a `masking.MaskedDataset`.
        batch_size: images at a time; it changes nothing but the speed.

    Raises:
        TypeError: the network returns no tensor, or one that is not N×classes.
        ValueError: a number that it predicts is not finite.
    """
    modes = {}
    device = None
    if isinstance(model, nn.Module):
        modes = {
            module: getattr(module, "training", False)  # frozen TorchScript has none
            for module in model.modules()
        }
        device = getattr(next(model.parameters(), None), "device", None)
        model.eval()
    logits = []
    try:
        with in_float32():
            for index in torch.arange(len(dataset)).split(batch_size):
                images, _ = dataset.batch(index, device)
                logits.append(model(images))
    finally:
        for module, was_training in modes.items():
            module.training = was_training
    first = logits[0]
    if not isinstance(first, Tensor) or first.ndim != 2:
        kind = getattr(first, "shape", type(first))
        raise TypeError(
            f"the network returns {kind}; allowed: logits, a tensor N×classes."
        )
    predicted = torch.cat(logits).float().cpu()
    if not predicted.isfinite().all():
        raise ValueError(
            "the network predicts numbers that are not finite; allowed: finite ones. Do "
            "its weights become infinite in training?"
        )
    return predicted


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """N, bool, on the CPU: whether the predicted class is that of the image.

    Args:
        logits: N×classes, see `predict`.
        labels: N, on any device.
    """
    return logits.argmax(1) == labels.cpu()


def group_accuracy(logits: Tensor, split: Split) -> dict[str, float]:
    """Accuracy of each group that has images, see `data.group_members`.

    Args:
        logits: N×classes.
        split: the images.
    """
    right = is_right(logits, split.labels).double()
    members = group_members(split)
    return {name: right[index].mean().item() for name, index in members.items()}
