"""From saliency maps to masks, and from masks to the masked training set (MaskTune, section 3, equation 1).

A mask is True, or 1, where the image is hidden.
"""

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from masktune_utils.data import Split


def create_mask(saliency_map: Tensor, method: str, param: float) -> Tensor:
    """Turn saliency maps `s` into hard masks of the same size.

    Args:
        saliency_map: ...×H×W, in [0, 1]; a tensor or a NumPy array.
        method: `threshold` hides where `s > param`; `top_k` where `s` exceeds its (1 − param)
            quantile (linear interpolation), which is about the share `param` of the pixels; `mean`
            where `s > param · mean(s)`; `mean_std` where `s` exceeds mean + param · standard
            deviation of its positive values (the paper's rule, with param 2).
        param: of the method.

    Returns:
        ...×H×W, bool, True where the image is hidden. A map that is zero everywhere hides nothing.

    Raises:
        ValueError: an unknown method.
    """
    saliency_map = torch.as_tensor(saliency_map)
    pixels = saliency_map.flatten(-2)
    if method == "threshold" or not len(pixels):  # quantile refuses an empty batch
        return saliency_map > param
    if method == "top_k":
        limit = pixels.quantile(1 - param, dim=-1)
    elif method == "mean":
        limit = param * pixels.mean(dim=-1)
    elif method == "mean_std":
        positive = pixels.where(pixels > 0, torch.nan)
        mean = positive.nanmean(dim=-1)
        std = (positive - mean[..., None]).square().nanmean(dim=-1).sqrt()
        limit = mean + param * std
    else:
        raise ValueError(f"method is {method!r}; allowed: threshold, top_k, mean or mean_std.")
    return saliency_map > limit[..., None, None]


def random_patches(count: int, share: float, seed: int, size: tuple[int, int]) -> Tensor:
    """Masks that do not depend on any map: a square patch of random size and place, as a control.

    Args:
        count: N.
        share: mean share of the image that a patch hides; one patch hides up to twice as much.
        seed: decides sizes and places.
        size: H, W of the images.

    Returns:
        N×H×W, bool, True where the image is hidden.
    """
    area, *places = torch.rand(3, count, 1, generator=torch.Generator().manual_seed(seed))
    side = (2 * share * area * size[0] * size[1]).sqrt().round()
    inside = []
    for place, length in zip(places, size, strict=True):
        first, pixels = (place * (length - side + 1)).floor(), torch.arange(length)
        inside.append((first <= pixels) & (pixels < first + side))
    return inside[0][:, :, None] & inside[1][:, None, :]


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Bring masks or maps, ...×h×w, to the size of the images, ...×H×W, as float32.

    Args:
        maps: ...×h×w.
        size: H, W.
        mode: `bilinear` (half-pixel centres) or `nearest`.
    """
    if maps.shape[-2:] == size:
        return maps.float()
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(flat, size=size, mode=mode).reshape(*maps.shape[:-2], *size)


def apply_mask(
    images: Tensor, mask: Tensor, upsample: str = "bilinear", fill: Tensor | None = None
) -> Tensor:
    """Multiply images by 1 − mask, after the mask is resized to them; and add mask · fill, if given.

    Args:
        images: ...×C×H×W, float or uint8.
        mask: ...×h×w, bool or in [0, 1].
        upsample: `bilinear` gives soft edges, `nearest` hard ones.
        fill: what takes the place of what is hidden, of the shape of the images or one that fits.

    Returns:
        The masked images, of the same type.
    """
    hidden = resize(torch.as_tensor(mask), tuple(images.shape[-2:]), upsample).unsqueeze(-3)
    masked = images * (1 - hidden)
    if fill is not None:
        masked = masked + fill * hidden
    return masked if images.is_floating_point() else masked.round().to(images.dtype)


def image_masks(
    saliency_map: Tensor, size: tuple, method: str, param: float, upsample: str, dilation: int
) -> Tensor:
    """Masks of the size of the images.

    Args:
        saliency_map: ...×h×w, in [0, 1].
        size: H, W of the images.
        method: see `create_mask`.
        param: see `create_mask`.
        upsample: how the mask gets from the map's size to the image's. `bilinear`: the mask is
            resized, with soft edges. `nearest`: the mask is resized, with hard edges. `map`: the
            map is resized bilinearly before the rule is applied, with hard edges, as in the
            authors' code. `mean_std` is always applied as in `map`.
        dilation: by which the mask is dilated, in all eight directions, in 28ths of the side.

    Returns:
        ...×H×W float32 in [0, 1], 1 where the image is hidden.
    """
    if upsample == "map" or method == "mean_std":
        mask = create_mask(resize(saliency_map, size), method, param).float()
    else:
        mask = resize(create_mask(saliency_map, method, param), size, upsample)
    pixels = round(dilation * size[0] / 28)
    for _ in range(2 if pixels else 0):  # along the rows, along the columns; quick on a CPU
        mask = F.pad(mask, (pixels, pixels)).unfold(-1, 2 * pixels + 1, 1).amax(-1).mT
    return mask


@dataclass(frozen=True)
class MaskedDataset:
    """A split that is masked batch by batch, so that float images of the whole set never exist.

    With `zero`, hidden pixels become black: x · (1 − m). With `resample`, they become those of a partner, a random image
    of any class: x_i · (1 − M) + x_j · M, where M = max(m_i, m_j) hides what the mask of either image hides. Then
    neither the pixels inside M nor its shape tell the class of i.

    Attributes:
        split: the images.
        own_masks: N×H×W, True, or up to 1 in float32, where the image's own mask hides it.
        fill: `zero` or `resample`.
        seed: of the partners.
        epoch: from 1; each has its own partners.
    """

    split: Split
    own_masks: Tensor
    fill: str = "zero"
    seed: int = 0
    epoch: int = 1

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """N."""
        return self.split.labels

    @cached_property
    def partners(self) -> Tensor:
        """Index of the partner of each image, N; a permutation that depends on `seed` and `epoch` alone."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return torch.randperm(len(self), generator=generator).to(self.labels.device)

    def in_epoch(self, epoch: int) -> Self:
        """The same images with the partners of another epoch."""
        return dataclasses.replace(self, epoch=epoch)

    def masks(self, index: Tensor | slice) -> Tensor:
        """What is hidden, B×H×W, float32 in [0, 1]."""
        own = self.own_masks[index].float()
        if self.fill == "zero":
            return own
        of_partners = self.own_masks[self.partners[index]].float()
        return torch.maximum(own, of_partners)

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Masked images as float32 in [0, 1], B×C×H×W, and their labels, B."""
        images, labels = self.split.batch(index)
        masks = self.masks(index)
        if self.fill == "zero":
            return apply_mask(images, masks), labels
        partner_images, _ = self.split.batch(self.partners[index])
        return apply_mask(images, masks, fill=partner_images), labels

    @property
    def images(self) -> Tensor:
        """The masked images, N×C×H×W, of the type of the images."""
        floating = self.split.images.is_floating_point()
        parts = (self.batch(index)[0] for index in torch.arange(len(self)).split(1000))
        return torch.cat([part if floating else (255 * part).round().byte() for part in parts])


def mask_dataset(
    split: Split,
    saliency_map: Tensor,
    method: str,
    param: float,
    upsample: str = "bilinear",
    dilation: int = 0,
    seed: int = 0,
    fill: str = "zero",
    earlier: MaskedDataset | None = None,
) -> MaskedDataset:
    """Hide in every image of a split what its saliency map points at.

    Args:
        split: the images.
        saliency_map: N×h×w, one per image; `random` does not use them.
        method: see `create_mask`; or `random`, see `random_patches`.
        param: of the method; for `random`, the share.
        upsample: see `image_masks`.
        dilation: see `image_masks`.
        seed: of `random`, and of the partners of `resample`.
        fill: what takes the place of what is hidden, `zero` or `resample`, see `MaskedDataset`.
        earlier: a masked dataset of the same split; what its own masks hide stays hidden.

    Raises:
        ValueError: the number of maps is not that of the images.
    """
    size = tuple(split.images.shape[-2:])
    if len(split) != len(saliency_map):
        raise ValueError(f"{len(saliency_map)} maps; allowed: {len(split)}, one per image.")
    soft = upsample == "bilinear" and method not in ("mean_std", "random")
    if method == "random":  # a patch is a map of the image's size
        saliency_map = random_patches(len(split), param, seed, size).to(split.labels.device)
        method, param = "threshold", 0.0
    parts = []
    for maps in saliency_map.split(1000):
        masks = image_masks(maps, size, method, param, upsample, dilation)
        parts.append(masks if soft else masks.bool())
    own_masks = torch.cat(parts)
    if earlier is not None:
        own_masks = torch.maximum(own_masks, earlier.own_masks)
    return MaskedDataset(split, own_masks, fill, seed)


def hidden_shares(dataset: MaskedDataset) -> dict[str, float]:
    """How much of the shortcut and of the rest is hidden, over the images that have one.

    Args:
        dataset: the masked images.

    Returns:
        `shortcut`: mean share of the shortcut's area that is hidden; `shortcut_whole`: share of the
        images whose shortcut is hidden to more than 99 %; `rest`: mean share of the area outside;
        `digit`: mean share of the digit's ink (grey value outside the shortcut). All are NaN if no
        image has a shortcut.
    """
    names, shares = ("shortcut", "rest", "digit", "shortcut_whole"), [torch.zeros(4, 0)]
    for index in dataset.split.has_shortcut.nonzero()[:, 0].split(1000):
        hidden, some = dataset.masks(index), dataset.split[index]
        inside = some.shortcut.float().expand_as(hidden)
        ink = some.images.sum(1, dtype=torch.float32) * (1 - inside)
        areas = torch.stack([inside, 1 - inside, ink])
        part = ((hidden * areas).sum((2, 3)) / areas.sum((2, 3))).cpu()
        shares.append(torch.cat([part, part[:1] > 0.99]))
    rows = zip(names, torch.cat(shares, 1), strict=True)
    return {name: row.mean().item() for name, row in rows}
