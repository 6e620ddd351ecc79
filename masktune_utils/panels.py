"""Panels for JupyterLab: move the square; point at a place; explore a choice."""

import torch
from IPython.core.pylabtools import print_figure
from IPython.display import Image, clear_output, display
from ipywidgets import Button, IntRangeSlider, interactive
from matplotlib.figure import Figure
from torch import nn

from masktune_utils import plotting
from masktune_utils.choice import ERM, Audit, Choice, audit
from masktune_utils.data import Split
from masktune_utils.shortcuts import add_square


def draw(figure: Figure) -> None:
    """Show a figure in a panel."""
    display(Image(print_figure(figure, dpi=180), retina=True))


def move_square(networks: dict[str, nn.Module], split: Split) -> interactive:
    """What networks predict for a digit, wherever a square is.

    Args:
        networks: name → network.
        split: the digits, without a square.
    """

    def look(
        digit: int = 0,
        row: int = 0,
        column: int = 0,
        size: int = 6,
        color: str = "blue",
    ) -> None:
        image = split[digit : digit + 1]
        image.images = add_square(image.images, size, color, row, column)
        figure = plotting.predictions(networks, image)
        figure.set_size_inches(2 * figure.get_size_inches())
        clear_output(wait=True)  # of the progress bar
        draw(figure)

    return interactive(
        look,
        digit=(0, len(split) - 1),
        row=(0, 27),
        column=(0, 27),
        size=(0, 14),
        color=["blue", "red", "lime", "white"],
    )


def point(network: nn.Module, images: Split, train: Split) -> interactive:
    """What depends on a place, wherever it is; and what still does once it is hidden.

    Args:
        network: see `choice.audit`, as for the images.
        images: that the network has not seen.
        train: the images on which it is fine-tuned if the place is hidden.

    Returns:
        A panel; its `result` is the audit of the place, whose `hide` hides it.
    """
    height, width = images.images.shape[-2:]
    mean = images.images.float().mean(0, keepdim=True)
    four = images[:: len(images) // 4][:4].images
    pictures = torch.cat([mean.to(four.dtype), four])

    def look(rows: tuple, columns: tuple) -> Audit:
        (top, bottom), (left, right) = rows, columns
        place = (left / width, top / height, right / width, bottom / height)
        found = audit(network, images, place=place)
        print(found.reason)
        columns = {
            f"{k or 'mean'}": picture[None] for k, picture in enumerate(pictures)
        }
        figure = plotting.grid(columns, size=1.4)
        for ax in figure.axes:
            plotting.outline(ax, found.region)
        draw(figure)
        return found

    def slider(side: int) -> IntRangeSlider:
        corner = (0, side // 4)
        return IntRangeSlider(value=corner, max=side, continuous_update=False)

    panel = interactive(look, rows=slider(height), columns=slider(width))

    def hide(_button: Button) -> None:
        with panel.out:
            found = panel.result
            tuned = found.hide(train).finetune(network)
            left = audit(tuned, images, place=found.region)
            print(f"Once it is hidden:\n{left.reason}")

    button = Button(description="hide this")
    button.on_click(hide)
    rows, columns, out = panel.children
    panel.children = (rows, columns, button, out)
    return panel


def explore(choice: Choice) -> interactive:
    """What a mask hides, corrects and costs; the one that is picked is taken.

    Returns:
        A panel; its `result` is the choice as it is decided.
    """
    chosen = choice.verdict.chosen

    def look(take: str = chosen) -> Choice:
        decided = choice if take == chosen else choice.take(take)
        print(decided.reason)
        draw(plotting.dumbbells(choice.held_out, take))
        draw(plotting.choice_masks(decided))
        return decided

    panel = interactive(look, take=[ERM, *choice.held_out.tried])
    panel.children[0].layout.width = "max-content"  # names of masks are long
    return panel
