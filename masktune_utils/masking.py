"""From saliency maps to masks, and from masks to the masked images.

MaskTune, section 3, equation 1. A mask is True, or 1, where the image is hidden.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, Any, Literal, Self

import pydantic.dataclasses
import torch
import torch.nn.functional as F
from pydantic import AfterValidator, Field, ValidationInfo
from torch import Tensor
from torch.utils.data import Dataset

from masktune_utils.data import Split


def _top_k(maps: Tensor, share: float) -> Tensor:
    quantile = maps.flatten(-2).quantile(1 - share, dim=-1)
    return quantile[..., None, None]


def _mean_std(maps: Tensor, param: float) -> Tensor:
    positive = maps.where(maps > 0, torch.nan)
    center = positive.nanmean((-2, -1), keepdim=True)
    variance = (positive - center).square().nanmean((-2, -1), keepdim=True)
    return center + param * variance.sqrt()


RULES = {  # method → (maps, param) → the limit, which hidden pixels exceed
    "threshold": lambda _maps, param: param,
    "top_k": _top_k,
    "mean": lambda maps, param: param * maps.mean((-2, -1), keepdim=True),
    "mean_std": _mean_std,
}


def create_mask(saliency_map: Tensor, method: str, param: float) -> Tensor:
    """Turn saliency maps `s` into hard masks of the same size, by a limit.

    Args:
        saliency_map: ...×H×W, in [0, 1]; a tensor or a NumPy array.
        method: one of `RULES`: what `s` must exceed to be hidden. `threshold`: `param`.
            `top_k`: a quantile, so that the share `param` of the pixels is hidden.
            `mean`: param · mean(s). `mean_std`: mean + param · standard deviation of
            the positive values of `s`; the paper's rule, with param 2.
        param: of the method.

    Returns:
        ...×H×W, bool, True where the image is hidden. A map that is zero everywhere
        hides nothing.

    Raises:
        ValueError: an unknown method.
    """
    maps = torch.as_tensor(saliency_map)
    if method not in RULES:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(RULES)}.")
    return maps > RULES[method](maps, param)


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Bring masks or maps, ...×h×w, to the size of the images, ...×H×W, as float32.

    Args:
        maps: ...×h×w.
        size: H, W.
        mode: `bilinear` (half-pixel centres) or `nearest`; of no effect if they have
            this size.
    """
    if maps.shape[-2:] == size:
        return maps.float()
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    resized = F.interpolate(flat, size=size, mode=mode)
    return resized.reshape(*maps.shape[:-2], *size)


def apply_mask(images: Tensor, mask: Tensor, fill: Tensor | float = 0.0) -> Tensor:
    """Multiply images by 1 − mask, resized to them, and add mask · fill.

    Args:
        images: ...×C×H×W, float or uint8.
        mask: ...×h×w, bool or in [0, 1]; resized bilinearly.
        fill: what takes the place of what is hidden; a tensor of the shape of the
            images, or one that broadcasts to it.

    Returns:
        The masked images, of the same type.
    """
    resized = resize(mask, images.shape[-2:])
    hidden = resized.unsqueeze(-3)  # the same in all channels
    masked = images * (1 - hidden) + fill * hidden
    if not images.is_floating_point():
        masked = masked.round()
    return masked.to(images.dtype)


def mean_map(maps: Tensor) -> Tensor:
    """The mean of all maps, N×h×w, scaled to [0, 1]; 1×h×w."""
    average = maps.mean(0, keepdim=True)
    lowest, highest = average.aminmax()
    return (average - lowest) / (highest - lowest).clamp(min=1e-8)


@dataclass(eq=False)
class MaskedDataset(Dataset):
    """A split that is masked batch by batch.

    Float images of the whole set never exist. It is a data set of torch: `masked[3]` is
    a masked image, C×H×W in [0, 1], and its label. With `resample` its partner is drawn
    anew each time, from the global random generator, so that a DataLoader gives each
    epoch its own partners; `batch` has those of `epoch`.

    With `zero`, hidden pixels become black: x · (1 − m). With `resample`, they become
    those of a partner, a random image of any class: x_i · (1 − M) + x_j · M, where M =
    max(m_i, m_j) hides what the mask of either image hides. The pixels inside M then
    come from an image of any class. The shape of M still says something about the class
    of i, but less than m_i does.

    Attributes:
        split: the images.
        own_masks: N×H×W, True, or up to 1 in float32, where the image's own mask hides
            it.
        fill: `zero` or `resample`.
        seed: of the partners. Those of an epoch are drawn from `seed` + `epoch`, so
            seeds that are closer than the number of epochs share some.
        epoch: from 1; each has its own partners.
        rule: what made the masks, if a `Rule` did.
    """

    split: Split
    own_masks: Tensor
    fill: str = "zero"
    seed: int = 0
    epoch: int = 1
    rule: "Rule | None" = None

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        partner = torch.randint(len(self), (1,))
        images, labels = self.pairs(torch.tensor([index]), partner).batch(slice(1))
        return images[0], labels.item()

    @property
    def labels(self) -> Tensor:
        """N."""
        return self.split.labels

    @cached_property
    def partners(self) -> Tensor:
        """Index of each image's partner, N: a permutation by `seed` and `epoch`."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        partners = torch.randperm(len(self), generator=generator)
        return partners.to(self.labels.device)

    def in_epoch(self, epoch: int) -> Self:
        """The same images with the partners of another epoch."""
        return replace(self, epoch=epoch)

    def pairs(self, index: Tensor, partners: Tensor) -> Self:
        """Images, and then their partners; each is the partner of the other.

        Args:
            index: B, which images.
            partners: B, the index of the partner of each.
        """
        both = torch.cat([index, partners])
        pairs = replace(
            self,
            split=self.split[both],
            own_masks=self.own_masks[both],
        )
        pairs.partners = torch.arange(len(both)).roll(len(index))
        return pairs

    def masks(self, index: Tensor | slice) -> Tensor:
        """What is hidden, B×H×W, float32 in [0, 1]."""
        masks = self.own_masks[index].float()
        if self.fill == "resample":
            of_partners = self.own_masks[self.partners[index]]
            masks = torch.maximum(masks, of_partners.float())
        return masks

    def batch(
        self,
        index: Tensor | slice,
        device: torch.device | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Masked images as floating point in [0, 1], B×C×H×W, and their labels, B.

        Args:
            index: which images.
            device: where to put them; by default they stay where they are.
        """
        images, labels = self.split.batch(index, device)
        masks = self.masks(index).to(device)
        fill = 0.0
        if self.fill == "resample":
            fill, _ = self.split.batch(self.partners[index], device)
        return apply_mask(images, masks, fill), labels

    @property
    def images(self) -> Tensor:
        """The masked images, N×C×H×W, of the type of the images."""
        parts = []
        for index in torch.arange(len(self)).split(1000):
            images, _ = self.batch(index)
            if not self.split.images.is_floating_point():
                images = (255 * images).round().byte()
            parts.append(images)
        return torch.cat(parts)


def _check_param(param: float, others: ValidationInfo) -> float:
    if param > 1 and others.data.get("method") == "top_k":
        raise ValueError("top_k hides a share: at most 1")
    return param


@pydantic.dataclasses.dataclass(
    frozen=True, config={"extra": "forbid", "validate_default": True}
)
class Rule:
    """How masks are made.

    Attributes:
        method: see `create_mask`.
        param: of the method.
        upsample: how a mask gets from the map's size to the image's. `bilinear`: the
            mask is resized, with soft edges. `nearest`: the mask is resized, with hard
            edges. `map`: the map is resized bilinearly before the method is applied,
            with hard edges, as in the authors' code. `mean_std` is always applied as in
            `map`.
        dilation: by which the mask is dilated, in all eight directions, in 28ths of the
            shorter side.
        shared: hide the same in all images, what the mean of their maps points at. Then
            a mask says nothing about the class of its image.
        fill: what takes the place of what is hidden, see `MaskedDataset`.
        rounds: of masking; the paper has one. Each explains the network of the round
            before, adds what it looks at to what is hidden, and fine-tunes the trained
            network anew.
        exchange: the map is not that of the images, but `exchange.exchange_map`: where
            the mistakes on held-out images come from. Shared; for a choice.

    Raises:
        ValueError: an unknown method, upsample or fill, or a number that is too small.
    """

    method: Literal[*RULES] = "mean_std"
    param: Annotated[float, Field(ge=0), AfterValidator(_check_param)] = 2.0
    upsample: Literal["bilinear", "nearest", "map"] = "bilinear"
    dilation: Annotated[int, Field(ge=0)] = 0
    shared: bool = False
    fill: Literal["zero", "resample"] = "zero"
    rounds: Annotated[int, Field(ge=1)] = 1
    exchange: bool = False

    def __str__(self) -> str:
        """In words."""
        if self == NOTHING:
            return "nothing masked"
        param = f"{self.param!r}".removesuffix(".0")
        words = f"{self.method} {param}"
        if self.upsample != "bilinear":
            words += f" {self.upsample}"
        if self.dilation:
            words += f" dilated by {self.dilation:.0f}"
        if self.shared:
            words += ", shared"
        if self.exchange:
            words += ", by exchange"
        if self.fill == "resample":
            words += ", resampled"
        if self.rounds > 1:
            words += f", {self.rounds:.0f} rounds"
        return words

    def image_masks(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Masks of the size of the images, by maps.

        Args:
            maps: N×h×w, in [0, 1].
            size: H, W of the images.

        Returns:
            N×H×W, True where the image is hidden; with soft edges float32 in [0, 1].
        """
        upsample = "map" if self.method == "mean_std" else self.upsample
        if upsample == "map":
            maps = resize(maps, size)
        masks = create_mask(maps, self.method, self.param)
        masks = resize(masks, size, upsample)  # those of resized maps have it
        pixels = round(self.dilation * min(size) / 28)
        if pixels:
            side = 2 * pixels + 1
            # Rows, then columns: quicker on a CPU than a square window.
            masks = F.max_pool2d(masks, (1, side), 1, (0, pixels))
            masks = F.max_pool2d(masks, (side, 1), 1, (pixels, 0))
        return masks if upsample == "bilinear" else masks.bool()

    def mask(
        self,
        split: Split,
        maps: Tensor,
        earlier: MaskedDataset | None = None,
        seed: int = 0,
    ) -> MaskedDataset:
        """Hide in every image of a split what its saliency map points at, in one round.

        Args:
            split: the images.
            maps: N×h×w, one per image.
            earlier: a masked dataset of the same split; what its own masks hide stays
                hidden.
            seed: of the partners of `resample`.

        Raises:
            ValueError: the maps are not N×h×w, one per image.
        """
        size = split.images.shape[-2:]
        maps = torch.as_tensor(maps, device=split.images.device)
        if maps.ndim != 3 or len(split) != len(maps):
            raise ValueError(
                f"maps are {tuple(maps.shape)}; allowed: {len(split)}×h×w, one per image."
            )
        if self.shared or self.exchange:
            maps = mean_map(maps)
        parts = [self.image_masks(part, size) for part in maps.split(1000)]
        own_masks = torch.cat(parts).expand(len(split), *size)
        if earlier is not None:
            own_masks = torch.maximum(own_masks, earlier.own_masks)
        return MaskedDataset(split, own_masks, self.fill, int(seed), rule=self)


NOTHING = Rule("threshold", math.inf, "nearest", shared=True)


def mask_dataset(
    split: Split, saliency_map: Tensor, *rule: Any, seed: int = 0, **options: Any
) -> MaskedDataset:
    """Hide what saliency maps point at: `Rule.mask` in one call.

    Args:
        split: see `Rule.mask`, as for `saliency_map` and `seed`.
        saliency_map: N×h×w.
        *rule: see `Rule`: method, param, …
        seed: of the partners.
        **options: see `Rule`, by name.
    """
    return Rule(*rule, **options).mask(split, saliency_map, seed=seed)
