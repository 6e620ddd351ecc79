"""What becomes of a prediction if a part of the image comes from another one.

Any network, without gradients. A mistake that moves with a part of the image is
explained by this part: cut the part out, and the mistake is gone; paste it into another
image of the class, and the mistake is there. Counting predictions that change if a part
is replaced: SPIRE (Plumb et al., 2022); replacing it by that of another class: Goyal et
al., 2019; permuting a feature to see what a model needs: Breiman, 2001.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.metrics import Network, predict

FEW = 5  # fewer mistakes do not tell which evidence misleads
SWAPS = 5  # other images with which each mistake swaps the part
MOST_IMAGES = 100  # of which a map is made, window by window
PAIR_SWAPS = 60  # of a class with each other one, at least: its images are repeated


def class_partners(labels: Tensor, generator: Generator) -> Tensor:
    """Index of another image of the same class for each image, at random, N.

    The only image of a class is its own partner.

    Args:
        labels: N, on the CPU.
        generator: source of the random choice.
    """
    partners = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=generator)
        circle = members[order]
        partners[circle] = circle.roll(1)
    return partners


class Swaps(NamedTuple):
    """What becomes of mistakes if a part is swapped with other images of the class.

    Attributes:
        mistakes: M, which images.
        partners: `SWAPS`×M, the other image of each swap.
        moves: `SWAPS`×M, bool: whether the mistake moves with the part.
    """

    mistakes: Tensor
    partners: Tensor
    moves: Tensor

    @property
    def moving(self) -> Tensor:
        """The mistakes that move in half of the swaps or more."""
        return self.mistakes[self.moves.float().mean(0) >= 0.5]


def swap(network: Network, masked: MaskedDataset, predicted: Tensor) -> Swaps:
    """Swap what masks hide between each mistake and other images of its class.

    A mistake moves with this part if the image is then right, and the other one is
    mistaken for the same wrong class. What either mask hides is swapped.

    Args:
        network: any network.
        masked: images that it has not seen, with their masks.
        predicted: N, the classes that the network predicts for them, on the CPU.
    """
    generator = Generator().manual_seed(masked.seed)
    labels = masked.labels.cpu()
    mistakes = (predicted != labels).nonzero()[:, 0]
    resampled = replace(masked, fill="resample")
    partners = torch.zeros(SWAPS, len(mistakes), dtype=torch.int64)
    moves = torch.zeros_like(partners, dtype=torch.bool)
    if not len(mistakes):
        return Swaps(mistakes, partners, moves)
    for number in range(SWAPS):
        partners[number] = class_partners(labels, generator)[mistakes]
        pairs = resampled.pairs(mistakes, partners[number])
        cut_out, pasted = predict(network, pairs).argmax(1).chunk(2)
        is_right = cut_out == labels[mistakes]
        is_mistaken = pasted == predicted[mistakes]
        moves[number] = is_right & is_mistaken
    return Swaps(mistakes, partners, moves)


def explained(network: Network, masked: MaskedDataset, predicted: Tensor) -> Tensor:
    """How far mistakes are explained by what masks hide, N float32, on the CPU.

    Args:
        network: see `swap`, as for the others.
        masked: the images.
        predicted: N.

    Returns:
        The share of swaps by which the mistake moves; 0 where the network is right.
    """
    swaps = swap(network, masked, predicted)
    shares = torch.zeros(len(masked))
    shares[swaps.mistakes] = swaps.moves.float().mean(0)
    return shares


class ClassSwaps(NamedTuple):
    """How accurate a network is if a part comes from images of another class.

    Attributes:
        classes: K, the numbers of the classes that have images.
        accuracy: K×K, by class of the image, and class of the part; NaN on the
            diagonal.
        swaps: K, how many images of each class each of these numbers is based on.
        changed: share of the right predictions that change.
    """

    classes: Tensor
    accuracy: Tensor
    swaps: Tensor
    changed: float

    @property
    def by_class(self) -> Tensor:
        """K, the mean over the harder half of the other classes.

        An image of another class often has the same shortcut, if there are many
        classes; with two classes there is nothing to choose.
        """
        return self._harder_half.mean(1)

    @property
    def worst(self) -> float:
        """The lowest `by_class`: an estimate of the worst group, without its labels."""
        return self.by_class.min().item()

    @property
    def worst_class(self) -> int:
        """Its number."""
        return self.classes[self.by_class.argmin()].item()

    @property
    def error(self) -> float:
        """The standard error of `worst`."""
        worst = self.by_class.argmin()
        return (self.worst * (1 - self.worst) / self.swaps[worst].item()) ** 0.5

    @property
    def _harder_half(self) -> Tensor:
        count = max(1, len(self.classes) // 2)
        return self.accuracy.sort().values[:, :count]  # NaN is last


def swap_classes(
    network: Network,
    split: Split,
    region: Tensor,
    predicted: Tensor,
    seed: int = 0,
) -> ClassSwaps:
    """Replace a part of images by that of images of each other class.

    Ours. If a class is not about this part, the network should not care.

    Args:
        network: any network.
        split: images that it has not seen, of two classes or more.
        region: H×W, bool, the part.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of the images.
    """
    generator = Generator().manual_seed(seed)
    labels = split.labels.cpu()
    region = region.to(split.images.device)
    classes = labels.unique()
    members = []
    for label in classes:
        of_class = (labels == label).nonzero()[:, 0]
        members.append(of_class.repeat(math.ceil(PAIR_SWAPS / len(of_class))))
    accuracy = torch.full((len(classes), len(classes)), torch.nan)
    right_before = 0
    changed = 0
    for row, own in enumerate(members):
        was_right = predicted[own] == classes[row]
        for column in range(len(classes)):
            if row == column:
                continue
            other = _draw(members[column], len(own), generator)
            swapped = torch.where(region, split.images[other], split.images[own])
            outcome = predict(network, Split(swapped, labels[own])).argmax(1)
            is_right = outcome == classes[row]
            accuracy[row, column] = is_right.float().mean()
            right_before += was_right.sum().item()
            changed += (was_right & ~is_right).sum().item()
    swaps = torch.tensor([len(index) for index in members])
    return ClassSwaps(classes, accuracy, swaps, changed / max(1, right_before))


def _draw(members: Tensor, count: int, generator: Generator) -> Tensor:
    return members[torch.randint(len(members), (count,), generator=generator)]


def exchange_map(
    network: Network,
    split: Split,
    predicted: Tensor,
    seed: int = 0,
) -> Tensor:
    """Where the mistakes of a network come from.

    A window, a seventh of the image wide and high, is taken from another image of the
    same class. Where this lowers the loss of a mistake, the window has misled the
    network. Each kind of mistake (class, prediction) counts the same. Ours.

    Args:
        network: any network.
        split: images that it has not seen.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of the other images; and of MOST_IMAGES mistakes, if there are more.

    Returns:
        h×w float32, on the CPU: by how much the cross-entropy falls on average, in
        nats, for each window; neighbours overlap by half. Zero if there is no mistake.
        Resized to the image, it is up to 3% of a side too close to the edges.
    """
    labels = split.labels.cpu()
    generator = Generator().manual_seed(seed)
    mistakes = (predicted != labels).nonzero()[:, 0]
    if len(mistakes) > MOST_IMAGES:
        drawn = torch.randperm(len(mistakes), generator=generator)
        mistakes = mistakes[drawn[:MOST_IMAGES]]
    partners = class_partners(labels, generator)[mistakes]
    kinds = torch.stack([labels, predicted], 1)[mistakes]
    _, kind, sizes = kinds.unique(
        dim=0,
        return_inverse=True,
        return_counts=True,
    )
    weights = 1 / (len(sizes) * sizes[kind])
    labels = labels[mistakes]

    def loss(images: Tensor) -> Tensor:
        outputs = predict(network, Split(images, labels))
        return F.nll_loss(_log_shares(outputs), labels, reduction="none")

    return mean_falls(loss, split.images[mistakes], split.images[partners], weights)


def reliance_map(
    network: Network,
    split: Split,
    predicted: Tensor,
    seed: int = 0,
) -> Tensor:
    """Where the predictions of a network come from; labels are not used. Ours.

    A window is taken from an image that the network predicts as another class. Where
    this moves the log-odds to that class, the network relies on the window.

    Args:
        network: any network.
        split: images, best such that it has not seen.
        predicted: N, the classes that the network predicts for them, on the CPU.
        seed: of at most MOST_IMAGES images, and of the others.

    Returns:
        h×w float32, on the CPU: by how many nats the log-odds move, as in
        `exchange_map`. Zero if one class is predicted for all.
    """
    generator = Generator().manual_seed(seed)
    index = torch.randperm(len(split), generator=generator)[:MOST_IMAGES]
    partners = torch.empty_like(index)
    for label in predicted.unique():
        others = (predicted != label).nonzero()[:, 0]
        is_label = predicted[index] == label
        if not len(others):
            index = index[:0]
            partners = index
            break
        partners[is_label] = _draw(others, int(is_label.sum()), generator)
    own = predicted[index][:, None]
    other = predicted[partners][:, None]

    def odds(images: Tensor) -> Tensor:
        logarithms = _log_shares(predict(network, Split(images, own[:, 0])))
        return (logarithms.gather(1, own) - logarithms.gather(1, other))[:, 0]

    weights = torch.full((len(index),), 1 / max(1, len(index)))
    return mean_falls(odds, split.images[index], split.images[partners], weights)


def mean_falls(
    measure: Callable[[Tensor], Tensor],
    images: Tensor,
    others: Tensor,
    weights: Tensor,
) -> Tensor:
    """How far a measure of images falls if a window comes from others, h×w.

    Args:
        measure: images → M.
        images: M×C×H×W.
        others: M×C×H×W.
        weights: M, of the mean.
    """
    rows, columns = map(_windows, images.shape[-2:])
    falls = torch.zeros(len(rows), len(columns))
    if not len(images):
        return falls
    before = measure(images)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            with_window = images.clone()
            with_window[..., row, column] = others[..., row, column]
            falls[i, j] = weights @ (before - measure(with_window))
    return falls


def _log_shares(outputs: Tensor) -> Tensor:
    """Logarithms of probabilities, of these or of logits."""
    sums = outputs.sum(1)
    if outputs.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return outputs.clamp(min=1e-12).log()
    return outputs.log_softmax(1)


def name_ninth(mask: Tensor) -> str:
    """The ninth of the image where most is hidden, in words.

    Args:
        mask: H×W.
    """
    ninths = F.adaptive_avg_pool2d(mask[None].float(), 3)
    ninth = ninths.argmax().item()
    row = ("top", "middle", "bottom")[ninth // 3]
    column = ("left", "centre", "right")[ninth % 3]
    return f"{row} {column}"


def _windows(side: int) -> list[slice]:
    """At most thirteen, a seventh of a side each, from edge to edge."""
    size = max(1, side // 7)
    starts = {round(number * (side - size) / 12) for number in range(13)}
    return [slice(start, start + size) for start in sorted(starts)]
