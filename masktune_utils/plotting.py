"""Figures that more than one notebook draws; `show` saves any figure as PNG and displays that file."""

from collections.abc import Sequence
from io import BytesIO

import pandas as pd
from IPython.display import Image, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from masktune_utils import store
from masktune_utils.settings import Settings

# Of the classes. Okabe and Ito's palette, which colour-blind readers can tell apart.
COLORS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999"]


def show(figure: Figure, settings: Settings, name: str, seeds: Sequence[int] = ()) -> None:
    """Save a figure as `figures/{dataset}/seed{seed}/{name}.png`, with its images and seeds, and display it.

    Args:
        figure: the figure.
        settings: the experiment.
        name: name of the file, without its suffix.
        seeds: the seeds shown, if not that of the experiment alone.
    """
    seeds = sorted(seeds) or [settings.seed]
    mark = f"{settings.experiment}, seed {', '.join(map(str, seeds))}"
    figure.text(1, 0, mark, ha="right", va="top", fontsize=7, color="0.45")
    path = settings.folder("figures") / f"{name}.png"
    figure.savefig(buffer := BytesIO(), dpi=160, bbox_inches="tight")
    store.write_bytes(path, buffer.getvalue())
    display(Image(data=buffer.getvalue(), retina=True, alt=name))


def grid(columns: dict[str, Tensor], row_titles: Sequence[str] = (), size: float = 1.1) -> Figure:
    """A table of pictures.

    Args:
        columns: title → B×C×H×W images, B×H×W masks (white: hidden) or small maps (bright: salient),
            uint8 or in [0, 1].
        row_titles: B titles.
        size: of a picture, in inches.
    """
    rows = max(1, *map(len, columns.values()))
    side = max(28, *(pictures.shape[-1] for pictures in columns.values()))
    figure = Figure((size * len(columns) + 0.6, size * rows + 0.6), layout="constrained")
    bare = {"xticks": [], "yticks": [], "frame_on": False}
    axes = figure.subplots(rows, len(columns), squeeze=False, subplot_kw=bare)
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, pixels in zip(column, pictures.cpu(), strict=False):
            shown = pixels.permute(1, 2, 0) if pixels.ndim == 3 else pixels
            ax.imshow(shown.numpy(), cmap="magma" if len(pixels) < side else "gray", vmin=0, vmax=1)
    for ax, title in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def dots(ax: Axes, values: pd.Series, order: Sequence[str], color: str, label: str = "") -> None:
    """Several seeds side by side: a row per name, a dot per value, and a bar at the mean.

    Args:
        ax: where to draw.
        values: shares in [0, 1], drawn in %; the index has the name of the row of each.
        order: the rows, from below.
        color: of dots and bars.
        label: in a legend.
    """
    for height, name in enumerate(order):
        row = 100 * values[values.index == name]
        ax.plot(row, [height] * len(row), "o", color=color, markersize=4, alpha=0.6)
        ax.plot(row.mean(), height, "|", color=color, markersize=16)
    ax.plot([], [], "o", color=color, label=label)
    ax.set_yticks(range(len(order)), order)
