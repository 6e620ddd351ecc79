"""Predictions, their metrics by class and by group, and what a network relies on."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from masktune_utils.data import Split, class_partners
from masktune_utils.masking import MaskedDataset
from masktune_utils.models import in_float32
from masktune_utils.shortcuts import groups

MOST_MISTAKES = 100  # that are exchanged, window by window


@torch.no_grad()
def predict(model: nn.Module, dataset: Dataset, batch_size: int = 100) -> Tensor:
    """Logits in evaluation mode, N×classes, float32 on the CPU.

    Args:
        model: the modes of its modules are restored.
        dataset: a `Split` or a `masking.MaskedDataset`, on the model's device.
        batch_size: images at a time; it changes nothing but the speed.
    """
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
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
    return torch.cat(logits).float().cpu()


def report(logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """Metrics of predictions on one test set, as plain numbers.

    Args:
        logits: N×classes, N > 0.
        labels: N.

    Returns:
        `loss` (mean cross-entropy), `accuracy`, `class_accuracy` (one per class; NaN
        for a class without images), and `confusion_matrix` (rows: true class, columns:
        predicted class).
    """
    from sklearn.metrics import confusion_matrix  # slow

    labels = labels.cpu()
    predicted = logits.argmax(1)
    classes = range(logits.shape[1])
    confusion = torch.from_numpy(confusion_matrix(labels, predicted, labels=classes))
    return {
        "loss": F.cross_entropy(logits, labels).item(),
        "accuracy": confusion.trace().item() / len(labels),
        "class_accuracy": (confusion.diagonal().double() / confusion.sum(1)).tolist(),
        "confusion_matrix": confusion.tolist(),
    }


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """N, bool, on the CPU: whether the predicted class is that of the image.

    Args:
        logits: N×classes, see `predict`.
        labels: N, on any device.
    """
    return logits.argmax(1) == labels.cpu()


def group_accuracy(logits: Tensor, split: Split) -> dict[str, float]:
    """Accuracy of each group that has images, see `shortcuts.groups`.

    Args:
        logits: N×classes.
        split: the images.
    """
    right = is_right(logits, split.labels).double()
    return {name: right[index].mean().item() for name, index in groups(split).items()}


def explained(
    network: nn.Module, split: Split, masks: Tensor, predicted: Tensor, seed: int = 0
) -> Tensor:
    """Which mistakes of a network are explained by what the masks hide.

    These are right whenever this part comes from another image of the same class; three
    images are tried. What the mask of either image hides is exchanged.

    Args:
        network: any network.
        split: images that it has not seen.
        masks: N×H×W, True where the image is hidden.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of the other images.

    Returns:
        N, bool, on the CPU.
    """
    generator = torch.Generator().manual_seed(seed)
    is_explained = predicted != split.labels.cpu()
    mistakes = is_explained.nonzero()[:, 0].to(masks.device)
    resampled = MaskedDataset(split, masks, "resample")
    for _ in range(3 if len(mistakes) else 0):
        partners = class_partners(split.labels, generator)[mistakes]
        images, labels = resampled.batch(mistakes, partners=partners)
        logits = predict(network, Split(images.clamp(0, 1), labels))
        is_explained[mistakes.cpu()] &= is_right(logits, labels)
    return is_explained


def exchange_map(
    network: nn.Module, split: Split, predicted: Tensor, seed: int = 0
) -> Tensor:
    """Where the mistakes of a network come from: any network, without gradients.

    A window, a seventh of the image wide and high, is taken from another image of the
    same class. Where this lowers the loss of a mistake, the window has misled the
    network. Each kind of mistake (class, prediction) counts the same. Ours; permuting a
    feature to see what a model needs: Breiman, 2001.

    Args:
        network: any network.
        split: images that it has not seen.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of the other images; and of MOST_MISTAKES mistakes, if there are more.

    Returns:
        h×w float32, on the CPU: by how much the cross-entropy falls on average, in
        nats, for each window; neighbours overlap by half. Zero if there is no mistake.
    """
    labels = split.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    mistakes = (predicted != labels).nonzero()[:, 0]
    if len(mistakes) > MOST_MISTAKES:
        drawn = torch.randperm(len(mistakes), generator=generator)[:MOST_MISTAKES]
        mistakes = mistakes[drawn]
    partners = class_partners(labels, generator)[mistakes]
    rows, columns = map(_windows, split.images.shape[-2:])
    falls = torch.zeros(len(rows), len(columns))
    if not len(mistakes):
        return falls
    kinds = torch.stack([labels, predicted], 1)[mistakes]
    _, kind, sizes = kinds.unique(dim=0, return_inverse=True, return_counts=True)
    weights = 1 / (len(sizes) * sizes[kind])
    labels = labels[mistakes]
    images = split.images[mistakes]
    others = split.images[partners]

    def losses(images: Tensor) -> Tensor:
        logits = predict(network, Split(images, labels))
        return F.cross_entropy(logits, labels, reduction="none")

    before = losses(images)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            exchanged = images.clone()
            exchanged[..., row, column] = others[..., row, column]
            falls[i, j] = weights @ (before - losses(exchanged))
    return falls


def _windows(side: int) -> list[slice]:
    """A seventh of a side each; neighbours overlap by half."""
    size = max(1, side // 7)
    starts = range(0, side - size + 1, max(1, size // 2))
    return [slice(start, start + size) for start in starts]


def diagnose(
    network: nn.Module, split: Split, masks: Tensor, seed: int = 0
) -> dict[str, float]:
    """Does a trained network rely on what the masks hide?

    What is hidden is taken from another image, at random (see `MaskedDataset`). A
    network that relies on it is less accurate if that image is of another class.

    Args:
        network: any network.
        split: images, best such that it has not seen, of two classes or more.
        masks: N×H×W, True where the image is hidden.
        seed: of the other images.

    Returns:
        Accuracy in [0, 1]: `as it is`; and with the hidden part from the `same class`,
        or from `another class`.

    Raises:
        ValueError: nothing is hidden, or the number of masks is not that of the images.
    """
    if len(masks) != len(split):
        raise ValueError(f"{len(masks)} masks; allowed: {len(split)}, one per image.")
    if not masks.any():
        raise ValueError("the masks hide nothing; allowed: masks that hide something.")
    resampled = MaskedDataset(split, masks, "resample", seed)
    right = is_right(predict(network, resampled), split.labels)
    is_same = (split.labels == split.labels[resampled.partners]).cpu()
    parts = {
        "as it is": is_right(predict(network, split), split.labels),
        "same class": right[is_same],
        "another class": right[~is_same],
    }
    return {name: part.double().mean().item() for name, part in parts.items()}
