"""Figures that more than one notebook draws; `show` saves and displays any figure."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.style
import pandas as pd
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from masktune_utils import metrics, store
from masktune_utils.choice import Choice, HeldOut, score
from masktune_utils.data import Split
from masktune_utils.masking import resize
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings
from masktune_utils.shortcuts import groups

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
CLASS_COLORS = ["#56B4E9", "#E69F00", "#CC79A7", "#F0E442"]
MODEL_COLORS = {
    "ERM": "#777777",
    "published": "#0072B2",
    "ours": "#D55E00",
    "oracle": "#009E73",
}
matplotlib.style.use(Path(__file__).with_name("series.mplstyle"))


def show(
    figure: Figure,
    settings: Settings,
    name: str,
    seeds: Iterable[int] = (),
) -> None:
    """Save a figure as PNG, with the name of its images and seeds, and display it.

    Args:
        figure: the figure.
        settings: the experiment.
        name: name of the file, without its suffix.
        seeds: the seeds shown, if not that of the experiment alone.
    """
    from IPython.core.pylabtools import print_figure
    from IPython.display import Image, display  # all else here needs no notebook

    numbers = ", ".join(map(str, sorted(seeds) or [settings.seed]))
    mark = f"{settings.experiment}, seed {numbers}"
    figure.text(0, 0, mark, va="top", fontsize=7, color="0.45", wrap=True)
    png = print_figure(figure, dpi=160)
    store.write_bytes(settings.folder("figures") / f"{name}.png", png)
    display(Image(data=png, retina=True, alt=name))


def examples(split: Split, per_group: int = 1) -> tuple[Tensor, list[str]]:
    """At most `per_group` images of each group, spread over the split.

    Returns:
        Their index, and the name of its group for each, on two lines.
    """
    chosen = []
    titles = []
    for name, index in groups(split).items():
        step = max(1, len(index) // per_group)
        spread = index[::step][:per_group]
        chosen.append(spread)
        titles += [name.replace(", ", "\n")] * len(spread)
    return torch.cat(chosen), titles


def heat(maps: Tensor, colors: str = "magma") -> Tensor:
    """Maps, …×h×w in [0, 1], as pictures, …×3×h×w.

    Args:
        maps: the maps.
        colors: name of a colour map of matplotlib.
    """
    rgba = colormaps[colors](maps.cpu().numpy())
    return torch.from_numpy(rgba)[..., :3].movedim(-1, -3)


def grid(
    columns: dict[str, Tensor],
    row_titles: Iterable[str] = (),
    size: float = 1.1,
) -> Figure:
    """A table of pictures.

    Args:
        columns: title → B×3×H×W images, uint8 or in [0, 1]; or B×H×W masks (white:
            hidden).
        row_titles: B titles.
        size: of a picture, in inches.
    """
    num_rows = max(1, *map(len, columns.values()))
    width = size * len(columns) + 0.6
    height = size * num_rows + 0.6
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots(num_rows, len(columns), squeeze=False)
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[], frame_on=False)
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        if pictures.dtype == torch.uint8:
            pictures = pictures / 255
        for ax, picture in zip(column, pictures.cpu().numpy(), strict=False):
            is_mask = picture.ndim == 2
            pixels = picture if is_mask else picture.transpose(1, 2, 0)
            ax.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            # Else a mask that is white at its edge looks cut off.
            ax.set_frame_on(True)
            ax.spines[:].set(color="0.7", linewidth=0.5)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(
            title,
            fontsize=8,
            rotation=0,
            ha="right",
            va="center",
        )
    return figure


def choice_masks(choice: Choice, network: nn.Module | None = None) -> Figure:
    """What a choice hides, or would hide if ERM were not kept.

    Of each class, an image that ERM predicts correctly though it has not seen it, and
    one that it does not. The last column, for all images: where mistakes come from.

    Args:
        choice: see `choice.choose`.
        network: whose maps are shown, as ERM's; None: no maps.
    """
    masked = choice.candidates[choice.verdict.best]
    split = masked.split
    names = []
    for name in split.class_names:
        names += [f"{name}, predicted correctly", f"{name}, a mistake of ERM"]
    kinds = 2 * split.labels + choice.held_out.is_mistake.to(split.labels.device)
    by_kind = replace(split, groups=kinds, group_names=tuple(names))
    index, titles = examples(by_kind)
    images = split.images[index]
    columns = {"image": images}
    if network is not None:
        maps = saliency_maps(network, images, split.labels[index])
        columns["what the\nnetwork looks at"] = heat(maps)
    columns["hidden\n(white)"] = masked.masks(index)
    columns["filled from\nanother image"] = masked.batch(index)[0]
    falls = choice.held_out.mistake_map.clamp(min=0)
    brightest = falls.max().clamp(min=1e-8)
    columns["where mistakes\ncome from"] = heat(falls[None] / brightest)
    return grid(columns, titles)


def dumbbells(held_out: HeldOut, chosen: str) -> Figure:
    """Do masks correct the mistakes that they explain?

    A row for each mask that was tried: where it hides; and the share of the mistakes
    explained by it that are right, grey with nothing masked, coloured with the mask.

    Args:
        held_out: see `choice.held_out`.
        chosen: the mask that is marked.
    """
    table = score.scores(held_out)
    height = 0.55 * len(table) + 0.7
    figure = Figure((7.5, height), layout="constrained")
    num_rows = max(1, len(table))  # none, if no mask was worth a try
    axes = figure.subplots(num_rows, 2, squeeze=False, width_ratios=[1, 9])
    for (thumbnail, ax), mask in zip(axes, table.index, strict=False):
        thumbnail.imshow(held_out.mean_masks[mask].numpy(), cmap="gray", vmin=0, vmax=1)
        thumbnail.set(xticks=[], yticks=[])
        row = table.loc[mask]
        if row["explains"]:
            ends = 100 * row[["nothing", "corrects"]] / row["explains"]
            ax.plot(ends, [0, 0], color="0.75", linewidth=3, zorder=1)
            colors = ["#777777", "#D55E00"]
            ax.scatter(ends, [0, 0], s=[110, 50], c=colors, zorder=2)
        words = f"{row['nothing']:.0f} → {row['corrects']:.0f} of {row['explains']:.0f}"
        weight = "bold" if mask == chosen else "normal"
        ax.set_title(f"{mask}: {words}", fontsize=8, loc="left", weight=weight, pad=2)
        ax.set(xlim=(-4, 104), ylim=(-1, 1), yticks=[], xticks=[], frame_on=False)
    axes[-1, 1].set_xticks([0, 25, 50, 75, 100])
    axes[-1, 1].set_xlabel("explained mistakes that are right, in %", fontsize=8)
    return figure


def predictions(networks: dict[str, nn.Module], split: Split) -> Figure:
    """What networks predict for the same images: a row for each network.

    Below an image: the predicted class and its probability, green if it is right, else
    red. Outlined: where the saliency for this class is above half of its maximum.

    Args:
        networks: name → network.
        split: a few images.
    """
    images, labels = split.to(torch.device("cpu")).batch(slice(None))
    columns = {}
    for k, image in enumerate(images):
        columns[f"{k + 1}"] = torch.stack([image] * len(networks))
    figure = grid(columns, networks)
    panels = iter(figure.axes)
    for network in networks.values():
        logits = metrics.predict(network, split)
        shares, predicted = logits.softmax(1).max(1)
        maps = saliency_maps(network, images, predicted)
        outlines = resize(maps, tuple(images.shape[-2:]))
        is_right = predicted == labels
        for k, outline in enumerate(outlines.numpy()):
            ax = next(panels)
            if outline.any():  # else matplotlib warns
                ax.contour(outline, [0.5], colors="#F0E442", linewidths=1.2)
            ax.set_xlabel(
                f"{split.class_names[predicted[k]]} {shares[k]:.0%}",
                color="#009E73" if is_right[k] else "#D55E00",
                fontsize=9,
            )
    return figure


def dots(
    ax: Axes,
    values: pd.Series,
    order: Sequence[str],
    color: str,
    label: str = "",
) -> None:
    """Several seeds side by side: a row per name, a dot per value, a bar at the mean.

    Args:
        ax: where to draw.
        values: shares in [0, 1], drawn in %; the index has the name of the row of each.
        order: the rows, from below.
        color: of dots and bars.
        label: in a legend.
    """
    shown = 100 * values[values.index.isin(order)]
    means = shown.groupby(level=0).mean().reindex(order)
    ax.plot(means, order, "|", color=color, markersize=16)
    ax.plot(shown, shown.index, "o", color=color, markersize=4, alpha=0.6, label=label)
