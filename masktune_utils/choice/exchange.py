"""What becomes of a prediction if a part of the image comes from another one.

Any network, without gradients. A mistake that moves with a part of the image is
explained by this part: cut the part out, and the mistake is gone; paste it into another
image of the class, and the mistake is there. Counting predictions that change if a part
is replaced: SPIRE (Plumb et al., 2022); permuting a feature to see what a model needs:
Breiman, 2001.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.metrics import Network, predict

FEW = 5  # fewer mistakes do not tell which evidence misleads
SWAPS = 5  # other images with which each mistake swaps the part
MOST_MISTAKES = 100  # that are exchanged, window by window


def class_partners(labels: Tensor, generator: torch.Generator) -> Tensor:
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
    generator = torch.Generator().manual_seed(masked.seed)
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
        seed: of the other images; and of MOST_MISTAKES mistakes, if there are more.

    Returns:
        h×w float32, on the CPU: by how much the cross-entropy falls on average, in
        nats, for each window; neighbours overlap by half. Zero if there is no mistake.
        Resized to the image, it is up to 3% of a side too close to the edges.
    """
    labels = split.labels.cpu()
    generator = torch.Generator().manual_seed(seed)
    mistakes = (predicted != labels).nonzero()[:, 0]
    if len(mistakes) > MOST_MISTAKES:
        drawn = torch.randperm(len(mistakes), generator=generator)
        mistakes = mistakes[drawn[:MOST_MISTAKES]]
    partners = class_partners(labels, generator)[mistakes]
    kinds = torch.stack([labels, predicted], 1)[mistakes]
    _, kind, sizes = kinds.unique(
        dim=0,
        return_inverse=True,
        return_counts=True,
    )
    weights = 1 / (len(sizes) * sizes[kind])
    labels = labels[mistakes]
    images = split.images[mistakes]
    others = split.images[partners]

    def loss(images: Tensor) -> Tensor:
        outputs = predict(network, Split(images, labels))
        return F.nll_loss(_log_shares(outputs), labels, reduction="none")

    rows, columns = map(_windows, images.shape[-2:])
    falls = torch.zeros(len(rows), len(columns))
    if not len(mistakes):
        return falls
    before = loss(images)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            with_window = images.clone()
            with_window[..., row, column] = others[..., row, column]
            falls[i, j] = weights @ (before - loss(with_window))
    return falls


def _log_shares(outputs: Tensor) -> Tensor:
    """Logarithms of probabilities, of these or of logits."""
    sums = outputs.sum(1)
    if outputs.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return outputs.clamp(min=1e-12).log()
    return outputs.log_softmax(1)


def place(mask: Tensor) -> str:
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
