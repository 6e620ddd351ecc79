"""Panels for JupyterLab: move the square; look at masks, and decide."""

import torch
from IPython.core.pylabtools import print_figure
from ipywidgets import HTML, Button, Dropdown, HBox, Image, VBox, interactive_output
from ipywidgets import IntSlider as Slider
from matplotlib.figure import Figure
from torch import nn

from masktune_utils import plotting
from masktune_utils.choice import ERM, Choice
from masktune_utils.data import Split
from masktune_utils.shortcuts import add_square

LEFT = {"align_self": "flex-start"}  # else a picture is stretched


def draw(picture: Image, figure: Figure) -> None:
    """Show a figure in a picture of a panel."""
    picture.value = print_figure(figure, dpi=90)


def move_square(networks: dict[str, nn.Module], split: Split) -> VBox:
    """What networks predict for a digit, wherever a square is.

    Args:
        networks: name → network.
        split: the digits, without a square.
    """
    picture = Image()
    controls = {
        "digit": Slider(0, 0, len(split) - 1, description="digit"),
        "row": Slider(0, 0, 27, description="row"),
        "column": Slider(0, 0, 27, description="column"),
        "size": Slider(6, 0, 14, description="size"),
        "color": Dropdown(
            options=["blue", "red", "lime", "white"], description="color"
        ),
    }

    def look(digit: int, row: int, column: int, size: int, color: str) -> None:
        one = split[torch.tensor([digit])]
        one.images = add_square(one.images, size, color, row, column)
        draw(picture, plotting.predictions(networks, one))

    interactive_output(look, controls)
    return HBox([VBox([*controls.values()]), picture])


class Explorer(VBox):
    """What each mask hides, corrects and costs; take one, or keep ERM.

    Attributes:
        choice: as it is decided.
    """

    def __init__(self, choice: Choice) -> None:
        self.choice = choice
        masks = [*choice.held_out.mean_masks]
        self.mask = Dropdown(options=masks, value=choice.verdict.best)
        self.take = Button(description="take it")
        self.keep = Button(description="keep ERM")
        self.words = HTML()
        self.dots = Image(layout=LEFT)
        self.picture = Image(layout=LEFT)
        controls = HBox([self.mask, self.take, self.keep])
        super().__init__([controls, self.words, self.dots, self.picture])
        self.take.on_click(lambda _button: self.decide(self.mask.value))
        self.keep.on_click(lambda _button: self.decide(ERM))
        self.mask.observe(lambda _change: self.look(), "value")
        self.look()

    def look(self) -> None:
        """Show the mask that is picked."""
        picked = self.choice.take(self.mask.value)
        draw(self.dots, plotting.dumbbells(picked.held_out, self.mask.value))
        draw(self.picture, plotting.choice_masks(picked))
        _, *lines = picked.reason.splitlines()
        decided = f"<b>Decided: {self.choice.verdict.chosen}.</b>"
        self.words.value = "<br>".join([decided, *lines])

    def decide(self, name: str) -> None:
        """Take a mask, or keep ERM."""
        self.choice = self.choice.take(name)
        self.look()


def explore(choice: Choice) -> Explorer:
    """A panel to decide by; its `choice` is what was decided."""
    return Explorer(choice)
