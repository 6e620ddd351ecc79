"""Figures that more than one notebook draws; `show` saves and displays any figure."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib.style
import pandas as pd
import torch
import torch.nn.functional as F
from IPython.core.pylabtools import print_figure
from IPython.display import Image, display
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from masktune_utils import metrics, store
from masktune_utils.choice import Audit, Choice, HeldOut, score
from masktune_utils.data import Split, group_members, to_float
from masktune_utils.masking import MaskedDataset, resize
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings

# Of Okabe and Ito's palette, which colour-blind readers can tell apart.
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
    seeds: Sequence[int] = (),
    alt: str = "",
) -> None:
    """Save a figure as PNG, with the name of its images and seeds, and display it.

    Args:
        figure: the figure.
        settings: the experiment.
        name: name of the file, without its suffix.
        seeds: the seeds shown, if not that of the experiment alone.
        alt: what one sees, for readers who do not; by default the name.
    """
    numbers = ", ".join(map(str, sorted(seeds) or [settings.seed]))
    mark = f"{settings.experiment}, seed {numbers}"
    figure.text(
        0,
        -0.01,
        mark,
        va="top",
        fontsize=7,
        color="0.45",
        wrap=True,
    )
    png = print_figure(figure, dpi=160)
    store.write_bytes(settings.folder("figures") / f"{name}.png", png)
    display(Image(png, retina=True, alt=alt or name))


def examples(split: Split, per_group: int = 1) -> tuple[Tensor, list[str]]:
    """At most `per_group` images of each group, spread over the split.

    Returns:
        Their index, and the name of its group for each, on two lines.
    """
    chosen = []
    titles = []
    for name, index in group_members(split).items():
        step = max(1, len(index) // per_group)
        spread = index[step // 2 :: step][:per_group]
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
    row_titles: Sequence[str] = (),
    size: float = 1.1,
) -> Figure:
    """A table of pictures.

    Args:
        columns: title → B×3×H×W images, uint8 or in [0, 1]; or B×H×W masks (white:
            hidden), in [0, 1].
        row_titles: B titles.
        size: of a picture, in inches.
    """
    num_rows = max(1, *map(len, columns.values()))
    longest = max(map(len, "\n".join(row_titles).split("\n")))  # line of a title
    width = size * len(columns) + 0.07 * longest + 0.1
    height = size * num_rows + 0.6
    figure = Figure((width, height))
    axes = figure.subplots(
        num_rows,
        len(columns),
        squeeze=False,
        subplot_kw={"xticks": [], "yticks": [], "frame_on": False},
    )
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title)
        if pictures.ndim == 4:
            pictures = pictures.movedim(1, -1)
        for ax, pixels in zip(column, to_float(pictures).cpu().numpy(), strict=False):
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


def positive_heat(values: Tensor) -> Tensor:
    """A map of an audit as a picture, 1×3×h×w; black where it is not positive.

    Args:
        values: h×w, see `exchange.exchange_map`.
    """
    positive = values.clamp(min=0)
    return heat(positive[None] / positive.max().clamp(min=1e-8))


def choice_masks(choice: Choice) -> Figure:
    """What a choice hides, or would hide if ERM were not kept.

    Of each class, an image that ERM predicts correctly though it has not seen it, and
    one that it does not.

    Args:
        choice: see `choice.choose`.
    """
    held_out = choice.held_out
    masked = held_out.masked[choice.verdict.best]
    split = masked.split
    names = []
    for name in split.class_names:
        names += [f"{name}, predicted correctly", f"{name}, a mistake of ERM"]
    kinds = 2 * split.labels + held_out.is_mistake.to(split.labels.device)
    by_kind = replace(split, groups=kinds, group_names=tuple(names))
    index, titles = examples(by_kind)
    columns = {
        "image": split.images[index],
        "hidden\n(white)": masked.masks(index),
        "filled from\nanother image": masked.batch(index)[0],
    }
    return grid(columns, titles)


def swap_pictures(found: Audit) -> Figure:
    """Four mistakes that move with a region (outlined): cut out, and pasted elsewhere.

    Args:
        found: see `choice.audit`.
    """
    names = found.images.class_names
    device = found.images.labels.device
    masks = found.region.expand(len(found.images), -1, -1).to(device)
    masked = MaskedDataset(found.images, masks, "resample")
    rows = []
    titles = []
    for mistake in found.swaps.moving[:4]:
        of_mistake = found.swaps.mistakes == mistake
        moves = found.swaps.moves[:, of_mistake]
        partner = found.swaps.partners[:, of_mistake][moves][:1]
        pair = masked.pairs(mistake[None], partner)
        swapped, labels = pair.batch(slice(None))
        rows.append(torch.cat([to_float(pair.split.images), swapped]))
        predicted = names[found.predicted[mistake]]
        titles.append(f"{names[labels[0]]}, taken\nfor {predicted}")
    headings = (
        "a mistake",
        "another of\nits class",
        "cut out:\nright",
        "pasted:\nwrong",
    )
    if not rows:
        return grid({"no mistake\nmoves": found.images.images[:0]})
    columns = torch.stack(rows, 1)
    figure = grid(dict(zip(headings, columns, strict=True)), titles)
    for ax in figure.axes:
        outline(ax, found.region)
    return figure


def dumbbells(held_out: HeldOut, chosen: str) -> Figure:
    """How many more of the mistakes do masks correct than nothing masked?

    A row for each mask that was tried: where it hides most; and the share of mistakes
    that is corrected, as `score.scores` weights them: grey with nothing masked,
    coloured with the mask, and its standard error. A tick: where its gain is enough.

    Args:
        held_out: see `choice.held_out`.
        chosen: the mask that is marked.
    """
    table = score.scores(held_out)
    ax = Figure((7.5, 0.57 * len(table) + 0.6)).subplots()
    for k, (mask, row) in enumerate(table.iterrows()):
        thumbnail = (-10, -3, k + 0.4, k - 0.4)  # left, right, bottom, top
        mean_mask = held_out.mean_masks[mask].numpy()
        # Not quite white, which would look cut off.
        white = 1.2 * max(mean_mask.max(), 0.1)
        ax.imshow(mean_mask, extent=thumbnail, cmap="gray", vmin=0, vmax=white)
        nothing, corrected, error = 100 * row[["nothing", "mask", "error"]]
        enough = nothing + 100 * (score.ENOUGH + row["score"] - row["gain"])
        ax.plot([nothing, corrected], [k, k], color="0.75", linewidth=3, zorder=0)
        ax.errorbar(corrected, k, xerr=error, color="#D55E00", linewidth=1, capsize=2)
        ax.scatter([nothing, corrected], [k, k], s=[110, 50], c=["#777777", "#D55E00"])
        ax.plot(enough, k, "|", color="black", markersize=9)
        words = f"{mask}: {nothing:.0f}% → {corrected:.0f}%"
        weight = "bold" if mask == chosen else "normal"
        ax.text(0, k - 0.25, words, fontsize=8, weight=weight)
    ax.set(
        xlabel="mistakes corrected (%)",
        xlim=(-10, 104),
        ylim=(len(table) - 0.5, -0.6),
        yticks=[],
        aspect="auto",
        frame_on=False,
    )
    return ax.figure


def predictions(networks: dict[str, nn.Module], split: Split) -> Figure:
    """What networks predict for the same images: a row for each network.

    Below an image: the predicted class and its probability, green if it is right, else
    orange. Outlined: where the saliency for this class is above half of its maximum.

    Args:
        networks: name → network.
        split: a few images.
    """
    images, labels = split.batch(slice(None), torch.device("cpu"))
    columns = {
        f"{number}": image.repeat(len(networks), 1, 1, 1)
        for number, image in enumerate(images, 1)
    }
    figure = grid(columns, networks)
    axes = iter(figure.axes)
    for network in networks.values():
        probabilities, classes = metrics.predict(network, split).softmax(1).max(1)
        maps = saliency_maps(network, images, classes)
        maps = resize(maps, images.shape[-2:])
        for k, predicted in enumerate(classes):
            ax = next(axes)
            outline(ax, maps[k])
            ax.set_xlabel(
                f"{split.class_names[predicted]} {probabilities[k]:.0%}",
                color="#009E73" if predicted == labels[k] else "#D55E00",
            )
    return figure


def outline(ax: Axes, area: Tensor) -> None:
    """Draw the outline of an area on a picture; along an edge of the picture, too.

    Args:
        ax: where the picture is.
        area: H×W, bool, or a map: where it is above 0.5.
    """
    if not area.any():  # matplotlib would warn
        return
    height, width = area.shape
    ax.set_autoscale_on(False)
    ax.contour(
        F.pad(area.float(), (1, 1, 1, 1)),
        [0.5],
        extent=(-1, width, -1, height),
        colors="#F0E442",
        linewidths=1.4,
    )


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
