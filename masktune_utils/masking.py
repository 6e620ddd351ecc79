"""From saliency maps to masks, and from masks to the masked training set (MaskTune, section 3, equation 1).

A mask is True, or 1, where the image is to be hidden.
"""

from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from masktune_utils.data import Split, check_choice, check_range

PARAM_RANGES = {  # the parameter of each method; at the upper end `threshold` and `mean` hide nothing
    "threshold": (0.0, 1.0),
    "top_k": (0.0, 1.0),
    "mean": (0.0, 64.0),
    "mean_std": (0.0, 28.0),
    "random": (0.0, 0.5),
}
METHODS = tuple(PARAM_RANGES)
UPSAMPLES = ("bilinear", "nearest", "map")
MOST_GROWTH = 27  # pixels; it covers any image here


def check_method(method: str, param: float) -> None:
    """Refuse an unknown method, or a parameter outside its range.

    Raises:
        TypeError: for a parameter that is no number.
        ValueError: both name the value and what is allowed.
    """
    check_choice("method", method, METHODS)
    check_range("param", param, *PARAM_RANGES[method], f" for method {method!r}")


def create_mask(saliency_map: Tensor, method: str, param: float) -> Tensor:
    """Turn saliency maps `s` into hard masks of the same size.

    Args:
        saliency_map: ...×H×W, in [0, 1]; a tensor or a NumPy array.
        method: `threshold` hides where `s > param`; `top_k` where `s` exceeds its (1 − param) quantile (linear
            interpolation), that is, about the share `param` of the pixels; `mean` where `s > param · mean(s)`;
            `mean_std` where `s` exceeds mean + param · standard deviation of its positive values (the paper's rule, with
            param 2).
        param: the method's parameter, see `PARAM_RANGES`.

    Returns:
        ...×H×W, bool, True where the image is to be hidden. A map that is zero everywhere hides nothing.

    Raises:
        TypeError: for maps that are neither floating point nor bool, or a parameter that is no number.
        ValueError: for a method that is unknown or asks no map (`random`), a parameter outside its range, or no map.
    """
    check_choice("method", method, tuple(name for name in METHODS if name != "random"))
    check_method(method, param)
    saliency_map = torch.as_tensor(saliency_map)
    if not saliency_map.is_floating_point() and saliency_map.dtype != torch.bool:
        raise TypeError(f"saliency maps are {saliency_map.dtype}; allowed: floating point, or bool.")
    if saliency_map.ndim < 2:
        raise ValueError(f"a saliency map has {saliency_map.ndim} dimensions; allowed: ...×H×W.")
    pixels = saliency_map.flatten(-2)
    if method == "threshold" or not len(pixels):  # quantile refuses an empty batch
        return saliency_map > param
    if method == "top_k":
        limit = pixels.quantile(1 - param, dim=-1)
    elif method == "mean":
        limit = param * pixels.mean(dim=-1)
    else:
        positive = pixels.where(pixels > 0, torch.nan)
        mean = positive.nanmean(dim=-1)
        limit = mean + param * (positive - mean[..., None]).square().nanmean(dim=-1).sqrt()
    return saliency_map > limit[..., None, None]


def random_patches(count: int, share: float, seed: int, size: tuple[int, int] = (28, 28)) -> Tensor:
    """Masks that ask no map: in each image a square patch of random size and place, as a control.

    Args:
        count: N.
        share: of an image that is hidden, on average over the patches; a patch hides from nothing to twice as much.
        seed: decides sizes and places.
        size: H, W of the images.

    Returns:
        N×H×W, bool, True where the image is to be hidden.
    """
    area, *places = torch.rand(3, count, 1, generator=torch.Generator().manual_seed(seed))
    side = (2 * share * area * size[0] * size[1]).sqrt().round()
    inside = []
    for place, length in zip(places, size, strict=True):
        first, pixels = (place * (length - side + 1)).floor(), torch.arange(length)
        inside.append((first <= pixels) & (pixels < first + side))
    return inside[0][:, :, None] & inside[1][:, None, :]


def resize(maps: Tensor, size: tuple[int, int], mode: str = "bilinear") -> Tensor:
    """Bring masks or maps, ...×h×w, to the size of the images, ...×H×W, as float32 (half-pixel centres)."""
    if maps.shape[-2:] == size:
        return maps.float()
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    return F.interpolate(flat, size=size, mode=mode).reshape(*maps.shape[:-2], *size)


def apply_mask(images: Tensor, mask: Tensor, upsample: str = "bilinear") -> Tensor:
    """Multiply images by 1 − mask, after bringing the mask to their size.

    Args:
        images: ...×C×H×W, float or uint8.
        mask: ...×h×w, bool or in [0, 1].
        upsample: `bilinear` gives soft edges, `nearest` hard ones; a mask of the images' own size is taken as it is.

    Returns:
        The masked images, of the same type.
    """
    check_choice("upsample", upsample, ("bilinear", "nearest"))
    hidden = resize(torch.as_tensor(mask), tuple(images.shape[-2:]), upsample).unsqueeze(-3)
    masked = images * (1 - hidden)
    return masked if images.is_floating_point() else masked.round().to(images.dtype)


def image_masks(
    saliency_map: Tensor,
    method: str,
    param: float,
    upsample: str = "bilinear",
    grow: int = 0,
    size: tuple[int, int] = (28, 28),
) -> Tensor:
    """Masks at the size of the images.

    Args:
        saliency_map: ...×h×w, in [0, 1].
        method: see `create_mask`.
        param: see `create_mask`.
        upsample: how the mask gets from the map's size to the image's. `bilinear`: the mask is resized, its edges are
            soft. `nearest`: the mask is resized, its edges are hard. `map`: the map is resized bilinearly and the rule
            applied to that, with hard edges (the order of the authors' code). `mean_std` is always applied like `map`.
        grow: pixels by which the mask is dilated, in all eight directions.
        size: H, W of the images.

    Returns:
        ...×H×W float32 in [0, 1], 1 where the image is hidden.
    """
    check_choice("upsample", upsample, UPSAMPLES)
    check_range("grow", grow, 0, MOST_GROWTH)
    if upsample == "map" or method == "mean_std":
        mask = create_mask(resize(saliency_map, size), method, param).float()
    else:
        mask = resize(create_mask(saliency_map, method, param), size, upsample)
    if grow:
        mask = F.max_pool2d(mask.reshape(-1, 1, *size), 2 * grow + 1, stride=1, padding=grow).reshape(mask.shape)
    return mask


@dataclass(frozen=True)
class MaskedDataset:
    """A split whose images are masked batch by batch, so that only the small saliency maps are kept; see `mask_dataset`."""

    split: Split
    saliency_map: Tensor
    method: str
    param: float
    upsample: str
    grow: int
    earlier: Self | None

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        return self.split.labels

    def masks(self, index: Tensor | slice) -> Tensor:
        """B×28×28 float32 in [0, 1], 1 where the image is hidden."""
        size = tuple(self.split.images.shape[-2:])
        masks = image_masks(self.saliency_map[index], self.method, self.param, self.upsample, self.grow, size)
        return masks if self.earlier is None else torch.maximum(masks, self.earlier.masks(index))

    def batch(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Masked images as float32 in [0, 1], B×3×28×28, and their labels, B."""
        images, labels = self.split.batch(index)
        return apply_mask(images, self.masks(index)), labels


def mask_dataset(
    split: Split,
    saliency_map: Tensor,
    method: str,
    param: float,
    upsample: str = "bilinear",
    grow: int = 0,
    seed: int = 0,
    earlier: MaskedDataset | None = None,
) -> MaskedDataset:
    """Hide in every image of a split what its saliency map points at.

    Args:
        split: the images.
        saliency_map: N×8×8, one an image; `random` asks none of them.
        method: see `create_mask`, or `random`, see `random_patches`.
        param: of the method, see `PARAM_RANGES`.
        upsample: see `image_masks`.
        grow: see `image_masks`.
        seed: of `random`.
        earlier: a masked dataset of the same split; what it hides stays hidden.

    Returns:
        A dataset whose `batch(index)` gives masked float images; float images of the whole set never exist.

    Raises:
        ValueError: for an unknown method or upsampling, a parameter outside its range, or too few or many maps.
    """
    check_method(method, param)
    check_choice("upsample", upsample, UPSAMPLES)
    check_range("grow", grow, 0, MOST_GROWTH)
    if len(split) != len(saliency_map):
        raise ValueError(f"{len(split)} images and {len(saliency_map)} saliency maps; give one map an image.")
    if method == "random":  # patches are maps of the images' size, with nothing between 0 and 1
        saliency_map = random_patches(len(split), param, seed, tuple(split.images.shape[-2:])).to(split.labels.device)
        method, param = "threshold", 0.0
    return MaskedDataset(split, saliency_map, method, param, upsample, grow, earlier)


def hidden_shares(dataset: MaskedDataset, square_size: int, batch_size: int = 1000) -> dict[str, float]:
    """How much of the square and how much of the rest a masking hides, in the images that carry the square.

    Args:
        dataset: the masked images.
        square_size: side of the square in pixels.
        batch_size: images at a time.

    Returns:
        `square`: mean share of the square's area that is hidden; `square_whole`: share of these images whose square
        is hidden to more than 99 %; `rest`: mean share of everything outside the square that is hidden;
        `digit`: mean share of the digit's ink (grey value outside the square) that is hidden. NaN where no image
        carries a square.
    """
    index = dataset.split.has_square.nonzero()[:, 0]
    shares = []
    for part in index.split(batch_size):
        hidden, ink = dataset.masks(part), dataset.split.batch(part)[0].mean(1)
        inside = torch.zeros_like(hidden)
        inside[:, :square_size, :square_size] = 1
        square = (hidden * inside).sum((1, 2)) / inside.sum((1, 2))
        rest = (hidden * (1 - inside)).sum((1, 2)) / (1 - inside).sum((1, 2))
        ink = ink * (1 - inside)
        shares.append(
            torch.stack([square, (square > 0.99).float(), rest, (hidden * ink).sum((1, 2)) / ink.sum((1, 2))])
        )
    means = torch.cat(shares, dim=1).mean(1).tolist() if shares else [float("nan")] * 4
    return dict(zip(("square", "square_whole", "rest", "digit"), means, strict=True))
