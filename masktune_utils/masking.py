"""From saliency maps to masks, from masks to the masked images, and MaskTune itself.

MaskTune, section 3, equation 1. A mask is True, or 1, where the image is hidden.
"""

import copy
import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from masktune_utils.data import Split
from masktune_utils.saliency import saliency_maps

UPSAMPLES = ("bilinear", "nearest", "map")
FILLS = ("zero", "resample")


def threshold(maps: Tensor, param: float) -> Tensor:
    """Hide where `s > param`."""
    return maps > param


def top_k(maps: Tensor, param: float) -> Tensor:
    """Hide the share `param` of the pixels: where `s` exceeds a quantile."""
    if not len(maps):  # quantile refuses an empty batch
        return maps > 0
    pixels = maps.flatten(-2)
    limit = pixels.quantile(1 - param, dim=-1)
    return maps > limit[..., None, None]


def mean(maps: Tensor, param: float) -> Tensor:
    """Hide where `s > param · mean(s)`."""
    pixels = maps.flatten(-2)
    limit = param * pixels.mean(dim=-1)
    return maps > limit[..., None, None]


def mean_std(maps: Tensor, param: float) -> Tensor:
    """Hide where `s` exceeds mean + param · standard deviation of its positive values.

    The paper's rule, with param 2.
    """
    pixels = maps.flatten(-2)
    positive = pixels.where(pixels > 0, torch.nan)
    center = positive.nanmean(dim=-1)
    deviations = positive - center[..., None]
    std = deviations.square().nanmean(dim=-1).sqrt()
    limit = center + param * std
    return maps > limit[..., None, None]


RULES = {"threshold": threshold, "top_k": top_k, "mean": mean, "mean_std": mean_std}


def create_mask(saliency_map: Tensor, method: str, param: float) -> Tensor:
    """Turn saliency maps `s` into hard masks of the same size.

    Args:
        saliency_map: ...×H×W, in [0, 1]; a tensor or a NumPy array.
        method: name of one of the `RULES`.
        param: of the method.

    Returns:
        ...×H×W, bool, True where the image is hidden. A map that is zero everywhere
        hides nothing.

    Raises:
        ValueError: an unknown method.
    """
    if method not in RULES:
        raise ValueError(f"method is {method!r}; allowed: {', '.join(RULES)}.")
    return RULES[method](torch.as_tensor(saliency_map), param)


def random_patches(
    count: int,
    share: float,
    seed: int,
    size: tuple[int, int],
) -> Tensor:
    """Masks that depend on no map, as a control: patches of random size and place.

    Args:
        count: N.
        share: mean share of the image that a patch hides; one patch hides up to twice
            as much.
        seed: decides sizes and places.
        size: H, W of the images.

    Returns:
        N×H×W, bool, True where the image is hidden.
    """
    height, width = size
    generator = torch.Generator().manual_seed(seed)
    area, row_place, column_place = torch.rand(3, count, 1, generator=generator)
    pixels = 2 * share * area * height * width
    side = pixels.sqrt().round()
    first_row = (row_place * (height - side + 1)).floor()
    first_column = (column_place * (width - side + 1)).floor()
    rows = torch.arange(height)
    columns = torch.arange(width)
    in_rows = (first_row <= rows) & (rows < first_row + side)
    in_columns = (first_column <= columns) & (columns < first_column + side)
    return in_rows[:, :, None] & in_columns[:, None, :]


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Bring masks or maps, ...×h×w, to the size of the images, ...×H×W, as float32.

    Args:
        maps: ...×h×w.
        size: H, W.
        mode: `bilinear` (half-pixel centres) or `nearest`.
    """
    if maps.shape[-2:] == size:
        return maps.float()
    batch_shape = maps.shape[:-2]
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    resized = F.interpolate(flat, size=size, mode=mode)
    return resized.reshape(*batch_shape, *size)


def apply_mask(
    images: Tensor,
    mask: Tensor,
    fill: Tensor | None = None,
) -> Tensor:
    """Multiply images by 1 − mask, resized to them; and add mask · fill, if given.

    Args:
        images: ...×C×H×W, float or uint8.
        mask: ...×h×w, bool or in [0, 1]; resized bilinearly.
        fill: what takes the place of what is hidden, of the shape of the images or
            one that broadcasts to it.

    Returns:
        The masked images, of the same type.
    """
    size = tuple(images.shape[-2:])
    resized = resize(torch.as_tensor(mask), size)
    hidden = resized.unsqueeze(-3)  # the same in all channels
    masked = images * (1 - hidden)
    if fill is not None:
        masked = masked + fill * hidden
    if images.is_floating_point():
        return masked
    return masked.round().to(images.dtype)


def image_masks(
    saliency_map: Tensor,
    size: tuple,
    method: str,
    param: float,
    upsample: str,
    dilation: int,
) -> Tensor:
    """Masks of the size of the images.

    Args:
        saliency_map: ...×h×w, in [0, 1].
        size: H, W of the images.
        method: see `create_mask`.
        param: see `create_mask`.
        upsample: how the mask gets from the map's size to the image's. `bilinear`: the
            mask is resized, with soft edges. `nearest`: the mask is resized, with hard
            edges. `map`: the map is resized bilinearly before the rule is applied, with
            hard edges, as in the authors' code. `mean_std` is always applied as in
            `map`.
        dilation: by which the mask is dilated, in all eight directions, in 28ths of the
            side.

    Returns:
        ...×H×W float32 in [0, 1], 1 where the image is hidden.
    """
    if upsample == "map" or method == "mean_std":
        mask = create_mask(resize(saliency_map, size), method, param).float()
    else:
        mask = resize(create_mask(saliency_map, method, param), size, upsample)
    pixels = round(dilation * size[0] / 28)
    if pixels:
        # Rows, then columns: quicker on a CPU than a square window.
        dilated_rows = _dilate_rows(mask, pixels)
        mask = _dilate_rows(dilated_rows.mT, pixels).mT
    return mask


def _dilate_rows(masks: Tensor, pixels: int) -> Tensor:
    """The maximum over as many pixels to the left and to the right."""
    padded = F.pad(masks, (pixels, pixels))
    return padded.unfold(-1, 2 * pixels + 1, 1).amax(-1)


def mean_map(maps: Tensor) -> Tensor:
    """The mean of all maps, N×h×w, scaled to [0, 1]; 1×h×w."""
    average = maps.mean(0, keepdim=True)
    lowest = average.min()
    highest = average.max()
    return (average - lowest) / (highest - lowest).clamp(min=1e-8)


@dataclass(frozen=True, eq=False)
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

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        image, label = self.split[index]
        mask = self.own_masks[index].float()
        if self.fill == "zero":
            return apply_mask(image, mask), label
        partner = torch.randint(len(self), ()).item()
        partner_image, _ = self.split[partner]
        mask = torch.maximum(mask, self.own_masks[partner].float())
        return apply_mask(image, mask, fill=partner_image), label

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
        return dataclasses.replace(self, epoch=epoch)

    def masks(self, index: Tensor | slice) -> Tensor:
        """What is hidden, B×H×W, float32 in [0, 1]."""
        masks = self.own_masks[index].float()
        if self.fill == "resample":
            of_partners = self.own_masks[self.partners[index]].float()
            masks = torch.maximum(masks, of_partners)
        return masks

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Masked images as float32 in [0, 1], B×C×H×W, and their labels, B."""
        images, labels = self.split.batch(index)
        masks = self.masks(index)
        if self.fill == "resample":
            partner_images, _ = self.split.batch(self.partners[index])
            return apply_mask(images, masks, fill=partner_images), labels
        return apply_mask(images, masks), labels

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


def mask_dataset(
    split: Split,
    saliency_map: Tensor,
    method: str,
    param: float,
    upsample: str = "bilinear",
    dilation: int = 0,
    shared: bool = False,
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
        shared: hide the same in all images, what the mean of their maps points at. Then
            a mask says nothing about the class of its image. Not for `random`.
        seed: of `random`, and of the partners of `resample`.
        fill: what takes the place of what is hidden, `zero` or `resample`, see
            `MaskedDataset`.
        earlier: a masked dataset of the same split; what its own masks hide stays
            hidden.

    Raises:
        ValueError: the number of maps is not that of the images; or an unknown method
            or fill.
    """
    size = tuple(split.images.shape[-2:])
    if fill not in FILLS:
        raise ValueError(f"fill is {fill!r}; allowed: {', '.join(FILLS)}.")
    if upsample not in UPSAMPLES:
        raise ValueError(f"upsample is {upsample!r}; allowed: {', '.join(UPSAMPLES)}.")
    if len(split) != len(saliency_map):
        raise ValueError(
            f"{len(saliency_map)} maps; allowed: {len(split)}, one per image."
        )
    is_soft = upsample == "bilinear" and method not in ("mean_std", "random")
    if method == "random":  # a patch is a map of the image's size
        patches = random_patches(len(split), param, seed, size)
        saliency_map = patches.to(split.labels.device)
        method = "threshold"
        param = 0.0
    if shared:
        saliency_map = mean_map(saliency_map)
    parts = []
    for maps in saliency_map.split(1000):
        masks = image_masks(maps, size, method, param, upsample, dilation)
        parts.append(masks if is_soft else masks.bool())
    own_masks = torch.cat(parts).expand(len(split), *size)
    if earlier is not None:
        own_masks = torch.maximum(own_masks, earlier.own_masks)
    return MaskedDataset(split, own_masks, fill, seed)


@dataclass(frozen=True)
class Rule:
    """How masks are made; the fields are those of `mask_dataset`.

    Attributes:
        rounds: of masking; each adds to what is hidden, see `masktune`.
    """

    method: str = "mean_std"
    param: float = 2.0
    upsample: str = "bilinear"
    dilation: int = 0
    shared: bool = False
    fill: str = "zero"
    rounds: int = 1

    def __str__(self) -> str:
        """In words."""
        words = f"{self.method} {self.param:g}"
        if self.upsample != "bilinear":
            words += f" {self.upsample}"
        if self.dilation:
            words += f" dilated by {self.dilation:.0f}"
        if self.shared:
            words += ", shared"
        if self.fill == "resample":
            words += ", resampled"
        if self.rounds > 1:
            words += f", {self.rounds:.0f} rounds"
        return words

    def mask(
        self,
        split: Split,
        maps: Tensor,
        seed: int = 0,
        earlier: MaskedDataset | None = None,
    ) -> MaskedDataset:
        """The masked images, see `mask_dataset`; of one round."""
        fields = dataclasses.asdict(self)
        del fields["rounds"]
        masked = mask_dataset(split, maps, **fields, seed=seed, earlier=earlier)
        return dataclasses.replace(masked, rule=self)


class Tuned(NamedTuple):
    """A network, and the masked images on which it was fine-tuned."""

    network: nn.Module
    masked: MaskedDataset


def masktune(
    network: nn.Module,
    split: Split,
    rule: Rule,
    finetune: Callable[[nn.Module, MaskedDataset], nn.Module],
    maps: Tensor | None = None,
    explain: Callable[[nn.Module, Tensor, Tensor], Tensor] = saliency_maps,
    seed: int = 0,
) -> Iterator[Tuned]:
    """MaskTune with 1, 2, … `rounds` of masking: the outcome of each.

    Each round explains the network of the round before on the images that it was
    fine-tuned on (with `resample`, those of the first epoch), adds what it looks at to
    what is hidden, and fine-tunes the trained network anew. The rounds end when one
    hides nothing more. The paper has one round.

    Args:
        network: the trained one (ERM); it is left as it is.
        split: the training images.
        rule: how masks are made.
        finetune: (a copy of the network, masked images) → the fine-tuned network.
        maps: of the network, N×h×w; by default they are computed.
        explain: (network, images, labels) → maps, see `saliency.saliency_maps`.
        seed: see `mask_dataset`.
    """
    if maps is None:
        maps = explain(network, split.images, split.labels)
    masked = None
    for number in range(1, rule.rounds + 1):
        earlier = masked
        this_round = dataclasses.replace(rule, rounds=number)
        masked = this_round.mask(split, maps, seed, earlier)
        has_earlier = earlier is not None
        if has_earlier and torch.equal(masked.own_masks, earlier.own_masks):
            return
        tuned = finetune(copy.deepcopy(network), masked)
        yield Tuned(tuned, masked)
        if number < rule.rounds:
            # A map that is zero everywhere hides nothing more.
            with warnings.catch_warnings(action="ignore"):
                maps = explain(tuned, masked.images, split.labels)


def hidden_shares(dataset: MaskedDataset) -> dict[str, float]:
    """How much of the shortcut and of the rest is hidden, in images that have one.

    Args:
        dataset: the masked images.

    Returns:
        `shortcut`: mean share of the shortcut's area that is hidden; `shortcut_whole`:
        share of the images whose shortcut is hidden to more than 99 %; `rest`: mean
        share of the area outside; `digit`: mean share of the digit's ink (grey value
        outside the shortcut). All are NaN if no image has a shortcut. With `resample`,
        what is hidden is the union with the mask of the partner in the first epoch.
    """
    shares = {"shortcut": [], "rest": [], "digit": []}
    with_shortcut = dataset.split.has_shortcut.nonzero()[:, 0]
    for index in with_shortcut.split(1000):
        split = dataset.split[index]
        hidden = dataset.masks(index)
        inside = split.shortcut.float().expand_as(hidden)
        ink = split.images.sum(1, dtype=torch.float32) * (1 - inside)
        areas = {"shortcut": inside, "rest": 1 - inside, "digit": ink}
        for name, area in areas.items():
            hidden_area = (hidden * area).sum((1, 2))
            share = hidden_area / area.sum((1, 2))
            shares[name] += share.tolist()
    shares["shortcut_whole"] = [float(share > 0.99) for share in shares["shortcut"]]
    # An image without any ink outside the shortcut has no share of it.
    return {
        name: torch.tensor(values).nanmean().item() for name, values in shares.items()
    }
