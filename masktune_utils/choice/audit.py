"""Where do the mistakes of a classifier come from? Forward passes alone tell.

Ours; see `exchange` for what it builds on.
"""

from dataclasses import dataclass

import pandas as pd
import torch
from torch import Tensor

from masktune_utils.choice.exchange import FEW, Swaps, exchange_map, place, swap
from masktune_utils.data import Split, check_split
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.metrics import Network, predict

# Where the exchange map is above half of its maximum.
REGION = Rule("threshold", 0.5, "map", dilation=3, shared=True, exchange=True)


@dataclass(frozen=True, eq=False)
class Audit:
    """Where the mistakes of a classifier come from.

    Attributes:
        images: that the classifier has not seen.
        predicted: N, their predicted classes.
        mistake_map: h×w, see `exchange.exchange_map`.
        region: H×W, bool, where it points.
        swaps: of the region, see `exchange.swap`.
        elsewhere: how many mistakes move with a region of the same shape at four other
            places.
    """

    images: Split
    predicted: Tensor
    mistake_map: Tensor
    region: Tensor
    swaps: Swaps
    elsewhere: list[int]

    @property
    def stands_out(self) -> bool:
        """Whether more than twice as many mistakes move with it as with other places.

        Never if there are fewer than `FEW` mistakes.
        """
        has_enough = len(self.swaps.mistakes) >= FEW
        return has_enough and len(self.swaps.moving) > max(1, 2 * max(self.elsewhere))

    @property
    def kinds(self) -> pd.DataFrame:
        """Of each class and prediction: how many mistakes, and how many move."""
        mistakes = self.swaps.mistakes
        names = self.images.class_names
        labels = self.images.labels[mistakes]
        table = pd.DataFrame(
            {
                "class": [names[number] for number in labels],
                "prediction": [names[number] for number in self.predicted[mistakes]],
                "moves": torch.isin(mistakes, self.swaps.moving),
            }
        )
        by_kind = table.groupby(["class", "prediction"])["moves"]
        kinds = by_kind.agg(mistakes="size", move="sum")
        return kinds.sort_values("mistakes", ascending=False)

    @property
    def reason(self) -> str:
        """What was found, in words. A person says what it means."""
        count = len(self.swaps.mistakes)
        if count < FEW:
            return (
                f"{count} mistakes of {len(self.images)} images: too few to tell where "
                f"they come from ({FEW} are needed)."
            )
        if not self.region.any():
            return "No part of the image lowers the loss of its mistakes."
        words = (
            f"{len(self.swaps.moving)} of {count} mistakes move with the "
            f"{place(self.region)} ({self.region.float().mean():.0%} of the image);\n"
            f"with this shape at other places, {min(self.elsewhere)} to "
            f"{max(self.elsewhere)}.\n"
        )
        if not self.stands_out:
            return f"{words}No place stands out: no conclusion."
        return (
            f"{words}Look at the pictures: if your classes are not about this part, the "
            "network is misled there."
        )


def audit(network: Network, images: Split, seed: int = 0) -> Audit:
    """Find the part of the image with which the mistakes of a classifier move.

    It names a place. Whether the classes are about it, a person says: evidence
    misleads, too.

    Args:
        network: any network, or a function (of a network in evaluation mode): images
            in [0, 1], B×C×H×W → logits or probabilities, B×classes.
        images: with labels; images that it was not trained on.
        seed: of random choices.

    Raises:
        TypeError: `images` are no `Split`; or see `metrics.predict`.
        ValueError: it predicts a number of classes other than that of the images.
    """
    check_split(images)
    outputs = predict(network, images)
    count = len(images.class_names)
    if outputs.shape[1] != count:
        raise ValueError(
            f"the classifier predicts {outputs.shape[1]} classes; allowed: the {count} "
            "of the images' class_names, which may name classes without an image."
        )
    predicted = outputs.argmax(1)
    seed = int(seed)  # of NumPy, too
    falls = exchange_map(network, images, predicted, seed)
    maps = falls.clamp(min=0).expand(len(images), -1, -1)
    region = REGION.mask(images, maps).own_masks[0]

    def swap_region(where: Tensor) -> Swaps:
        masks = where.expand(len(images), -1, -1)
        return swap(network, MaskedDataset(images, masks, seed=seed), predicted)

    # Moved by quarters of a side, so that no thin bar falls onto itself, be it upright,
    # level or diagonal. What leaves the image comes in at the other edge.
    height, width = region.shape
    elsewhere = []
    for down, right in ((1, 2), (2, 1), (2, 3), (3, 2)):
        moved = region.roll((down * height // 4, right * width // 4), (0, 1))
        elsewhere.append(len(swap_region(moved).moving))
    return Audit(images, predicted, falls, region.cpu(), swap_region(region), elsewhere)
