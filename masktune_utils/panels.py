"""Panels for JupyterLab: move the square; look at masks, and decide."""

from IPython.core.pylabtools import print_figure
from IPython.display import Image, clear_output, display
from ipywidgets import interactive
from matplotlib.figure import Figure
from torch import nn

from masktune_utils import plotting
from masktune_utils.choice import ERM, Choice
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
