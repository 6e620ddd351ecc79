"""Figures. Every function returns a matplotlib Figure; `show` saves it as PNG and displays that very file."""

from collections.abc import Collection
from io import BytesIO

import numpy as np
import pandas as pd
import PIL.Image
from IPython.display import Image, display
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from torch import Tensor

from masktune_utils import masking
from masktune_utils.experiment import Settings, atomic_write

TEST_COLORS = {"raw": "#009E73", "biased": "#D55E00"}
# Okabe and Ito's, told apart by colour-blind readers; the first are those of the classes
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#000000", "#999999", "#F0E442", "#882255")
KINDS = ("ERM", *masking.METHODS)  # have the same colour and mark in every figure


def show(figure: Figure, settings: Settings, name: str, seeds: Collection[int] = ()) -> None:
    """Save a figure as `figures/{dataset}/seed{seed}/{name}.png`, marked with its digits and seed, and display it.

    Args:
        figure: the figure.
        settings: the experiment.
        name: name of the file, without its suffix.
        seeds: of what it shows, where that is not the experiment's alone.
    """
    seeds = sorted(seeds) or [settings.seed]
    mark = f"{settings.data_name}, seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    figure.text(1, 0, mark, ha="right", va="top", fontsize=7, color="0.45")
    path = settings.folder("figures") / f"{name}.png"
    with BytesIO() as full, atomic_write(path) as file:
        figure.savefig(full, format="png", dpi=160, bbox_inches="tight")
        few_colors = PIL.Image.open(full).convert("RGB").quantize(256, dither=PIL.Image.Dither.NONE)
        few_colors.save(file, format="png", optimize=True)  # half the size
    display(Image(data=path.read_bytes(), retina=True, alt=name))


def _axes(rows: int, columns: int, size: tuple[float, float], **kwargs) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **kwargs)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def grid(columns: dict[str, Tensor], row_titles: list[str] | None = None, size: float = 1.25) -> Figure:
    """A table of pictures.

    Args:
        columns: title → B×3×28×28 images, B×28×28 masks (white: hidden) or B×8×8 saliency maps (bright: salient), all
            uint8 or in [0, 1].
        row_titles: B titles.
        size: of a picture, in inches.
    """
    rows = max(1, *map(len, columns.values()))
    figure, axes = _axes(rows, len(columns), (size * len(columns) + 0.6, size * rows + 0.7))
    for ax in axes.flat:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    for column, (title, pictures) in zip(axes.T, columns.items(), strict=True):
        column[0].set_title(title, fontsize=9)
        for ax, picture in zip(column, pictures.cpu(), strict=False):
            if picture.ndim == 3:
                ax.imshow(picture.permute(1, 2, 0))
            else:
                ax.imshow(picture, cmap="gray" if len(picture) == 28 else "magma", vmin=0, vmax=1)
    for ax, title in zip(axes[:, 0], row_titles or [], strict=False):
        ax.set_ylabel(title, fontsize=8, rotation=0, ha="right", va="center")
    return figure


def history(epochs: list[dict[str, float]]) -> Figure:
    """Loss and accuracy on the training images over the epochs, see `training.train`."""
    figure, ((left, right),) = _axes(1, 2, (8, 3))
    x = [epoch["epoch"] for epoch in epochs]
    left.plot(x, [epoch["loss"] for epoch in epochs], color="black", marker=".")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", yscale="log")
    right.plot(x, [100 * epoch["accuracy"] for epoch in epochs], color="black", marker=".")
    right.set(xlabel="epoch", ylabel="training accuracy (%)")
    return figure


def digit_accuracy(accuracy: dict[str, list[float]], classes: list[int]) -> Figure:
    """Accuracy of each digit.

    Args:
        accuracy: name of a test set → accuracies in [0, 1].
        classes: the class of each digit, ascending; of a folder, whose digits are its classes, 0, 1, ….
    """
    figure, ((ax,),) = _axes(1, 1, (8, 3))
    width = 0.8 / len(accuracy)
    for k, (name, values) in enumerate(accuracy.items()):
        x = np.arange(len(values)) + (k - (len(accuracy) - 1) / 2) * width
        ax.bar(x, 100 * np.array(values), width, color=TEST_COLORS[name], label=name)
    for border in np.diff(classes).nonzero()[0]:
        ax.axvline(border + 0.5, color="0.6", linestyle=":")
    xlabel = "class" if len(set(classes)) == len(classes) else "digit (left: class 0, right: class 1)"
    ax.set(xticks=range(len(values)), xlabel=xlabel, ylabel="accuracy (%)", ylim=(0, 100))
    figure.legend(loc="outside upper center", ncols=len(accuracy), frameon=False)
    return figure


def hidden_shares(table: pd.DataFrame) -> Figure:
    """How much of the square and of the rest each rule hides.

    Args:
        table: columns `method`, `param`, `square`, `square_whole` and `digit`, see `masking.hidden_shares`.
    """
    figure, (axes,) = _axes(1, table["method"].nunique(), (9, 3), sharey=True)
    lines = {"square": ("square, mean area", "#0072B2"), "digit": ("digit's ink, mean", "#D55E00")}
    lines["square_whole"] = ("square wholly hidden, share of images", "#56B4E9")
    for ax, (method, rows) in zip(axes, table.groupby("method", sort=False), strict=True):
        for column, (label, color) in lines.items():
            style = "--" if column == "square_whole" else "-"
            ax.plot(rows["param"], 100 * rows[column], style, color=color, marker="o", label=label)
        ax.set(title=method, xlabel="param", ylim=(-3, 103), xticks=rows["param"])
    axes[0].set_ylabel("hidden (%)")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def class_accuracy(table: pd.DataFrame, published: pd.DataFrame | None = None) -> Figure:
    """Accuracy of each class and their average for every configuration, above on the raw, below on the biased test set.

    Args:
        table: see `evaluation.collect`; over several seeds the means are drawn, with their standard deviation.
        published: averages of others to be marked, in per cent: columns `raw` and `biased`, a row a configuration.
    """
    columns = [name for name in table if name in TEST_COLORS or "_class_" in name]
    groups = table.groupby("configuration", sort=False)[columns]
    mean, std = groups.mean(), groups.std()
    figure, axes = _axes(2, 1, (max(5.0, 0.75 * len(mean) + 1), 6), sharex=True)
    x = np.arange(len(mean))
    for ax, test in zip(axes[:, 0], ("raw", "biased"), strict=True):
        bars = [column for column in columns if column.startswith(f"{test}_class_") and mean[column].notna().any()]
        for label, column in enumerate(bars):
            errors = None if std[column].isna().all() else 100 * std[column]
            ax.bar(
                x + 0.8 * ((label + 0.5) / len(bars) - 0.5),
                100 * mean[column],
                0.76 / len(bars),
                yerr=errors,
                color=COLORS[label],
                label=f"class {label}",
            )
        ax.scatter(x, 100 * mean[test], color="black", marker="D", s=22, zorder=3, label="average over all images")
        if published is not None:
            others = published[test].reindex(mean.index)
            ax.scatter(
                x, others, color="#CC79A7", marker="x", s=32, zorder=4, label="average, earlier reproduction, one run"
            )
        for position, value in zip(x, 100 * mean[test], strict=True):
            ax.annotate(f"{value:.1f}", (position, 109), ha="center", fontsize=8)
        ax.set(ylim=(0, 116), ylabel=f"accuracy, {test} test set (%)", yticks=range(0, 101, 20))
    axes[-1, 0].set_xticks(x, mean.index, rotation=40, ha="right")
    entries = dict(zip(*reversed(axes[0, 0].get_legend_handles_labels()), strict=True))
    order = sorted(entries, key=lambda label: not label.startswith("class"))
    figure.legend([entries[label] for label in order], order, loc="outside upper center", ncols=2, frameon=False)
    return figure


def scatter(table: pd.DataFrame, x: str, y: str, names: dict[str, str]) -> Figure:
    """One quantity against another: a point a configuration, its mean over the seeds, with the standard deviation.

    Args:
        table: columns `x` and `y`, in [0, 1]; `group`, the same for all seeds of a point; `kind`, which gives its
            colour and mark; `label`, which is written beside it.
        x: a column.
        y: a column.
        names: column → what the axis says.
    """
    figure, ((ax,),) = _axes(1, 1, (9, 5.5))
    order = list(dict.fromkeys([*KINDS, *table["kind"]] if table["kind"].isin(KINDS).any() else table["kind"]))
    for kind, rows in table.groupby("kind", sort=False):
        groups = rows.groupby("group", sort=False)
        mean, std = 100 * groups[[x, y]].mean(), 100 * groups[[x, y]].std().fillna(0)
        k = order.index(kind)
        style = {"color": COLORS[k % len(COLORS)], "marker": "osD^vPX*"[k % 8]}
        style["zorder"] = 2 if kind in masking.METHODS else 3  # what they are compared with is not to be covered
        ax.errorbar(mean[x], mean[y], std[y], std[x], linestyle="", label=kind, elinewidth=0.7, markersize=5, **style)
        for label, (right, up) in zip(groups["label"].first(), mean.to_numpy(), strict=True):
            side = {"ha": "right", "xytext": (-4, 4)} if right > 50 else {"ha": "left", "xytext": (4, 4)}
            text = ax.annotate(label, (right, up), textcoords="offset points", fontsize=8, color="0.3", **side)
            text.set_in_layout(False)
    ax.set(xlabel=names[x], ylabel=names[y])
    ax.grid(color="0.92")
    ax.set_axisbelow(True)
    figure.legend(loc="outside right upper", frameon=False)
    return figure


def square_maps(maps: dict[str, Tensor], stride: int) -> Figure:
    """How much of class 1 is taken for class 0, by where the square is.

    Args:
        maps: title → H×W mean probabilities of class 0; all have the same scale, from 0 to the largest.
        stride: pixels from one place of the square to the next.
    """
    figure, (axes,) = _axes(1, len(maps), (3.4 * len(maps) + 0.8, 3.5), sharey=True)
    colors = LinearSegmentedColormap.from_list("class 0", ["white", COLORS[0]])
    most = max(values.max().item() for values in maps.values())
    for ax, (title, values) in zip(axes, maps.items(), strict=True):
        end = stride * len(values) - 0.5
        image = ax.imshow(values.numpy(), cmap=colors, vmin=0, vmax=most, extent=(-0.5, end, end, -0.5))
        ax.set_title(title, fontsize=9)
        ax.set_xlabel("column of the square's top-left pixel", fontsize=9)
    axes[0].set_ylabel("row", fontsize=9)
    figure.colorbar(image, ax=axes, label="mean probability of class 0")
    return figure
