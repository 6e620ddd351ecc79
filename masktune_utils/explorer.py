"""Two panels to play with in JupyterLab; where nobody is there to play, the same calls show a picture.

`explore` shows what a mask hides of an image and what the models say of both; `square_test` puts the square anywhere.
"""

import dataclasses
import random
import warnings
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import ipywidgets as widgets
import numpy as np
import torch
from IPython.display import display
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from masktune_utils import data, evaluation, experiment, masking, plotting, progress, saliency
from masktune_utils.experiment import Settings
from masktune_utils.models import SmallCNN

PER_GROUP = 250  # so many images of each group are offered
# `param` of a method just chosen
STARTS = {"threshold": 0.7, "top_k": 0.1, "mean": 0.9, "mean_std": 2.0, "random": 0.1}
WIDTHS = {widgets.IntSlider: "200px", widgets.FloatSlider: "300px", widgets.ColorPicker: "190px"}
BOTH = "right or wrong"


class Panel:
    """Rows of pictures, and beside them a caption and the models' answers as bars; drawn once, then only updated.

    Args:
        pictures: title of each picture of a row.
        answers: name of each bar of a row.
        classes: how many; a bar has a part for the probability of each.
        rows: how many.
    """

    def __init__(self, pictures: Sequence[str], answers: Sequence[str], classes: int, rows: int = 1) -> None:
        widths = [1] * len(pictures) + [2.9]
        self.figure = Figure((1.3 * sum(widths) + 0.6, 1.4 * rows + 0.3), dpi=120, layout="constrained")
        axes = self.figure.subplots(rows, len(widths), squeeze=False, width_ratios=widths)
        for ax in axes.flat:
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        for ax in axes[:, :-1].flat:
            ax.set_axis_off()
        for ax, title in zip(axes[0], pictures, strict=False):
            ax.set_title(title, fontsize=9)
        self.rows = [self._row(row, answers, classes) for row in axes]
        self.canvas = FigureCanvasAgg(self.figure)
        self.canvas.draw()
        self.figure.set_layout_engine("none")

    @staticmethod
    def _row(axes: np.ndarray, answers: Sequence[str], classes: int) -> tuple:
        *places, ax = axes
        pictures = [place.imshow(np.zeros((28, 28)), vmin=0, vmax=1, extent=(0, 28, 28, 0)) for place in places]
        y = range(len(answers))
        bars = [ax.barh(y, 0, color=plotting.COLORS[label]) for label in range(classes)]
        texts = [ax.text(1.03, place, "class 0: 100 %", fontsize=8, va="center_baseline") for place in y]
        ax.set_yticks(y, answers, fontsize=8)
        ax.tick_params(length=0)
        ax.set(xlim=(0, 1.5), ylim=(3.6, -0.6))
        return pictures, bars, texts, ax.set_title(" \n ", loc="left", fontsize=8)

    def update(self, row: int, caption: str, pictures: Sequence[Tensor], answers: Tensor) -> None:
        """Show other things in a row.

        Args:
            row: counted from 0.
            caption: two lines.
            pictures: 3×28×28 images, 28×28 masks (white: hidden), 8×8 maps (bright: salient), uint8 or in [0, 1].
            answers: probabilities of the classes, a row a bar.
        """
        places, bars, texts, title = self.rows[row]
        title.set_text(caption)
        for place, picture in zip(places, pictures, strict=True):
            array = picture.cpu().numpy()
            place.set_data(array.transpose(1, 2, 0) if array.ndim == 3 else array)
            place.set_cmap("gray" if len(picture) == 28 else "magma")
        ends = answers.cumsum(1)
        for parts, start, width in zip(bars, (ends - answers).T.tolist(), answers.T.tolist(), strict=True):
            for part, x, length in zip(parts, start, width, strict=True):
                part.set(x=x, width=length)
        for text, answer in zip(texts, answers.tolist(), strict=True):
            text.set_text(f"class {answer.index(max(answer))}: {100 * max(answer):.0f} %")

    def png(self) -> bytes:
        """The picture as it is now."""
        with BytesIO() as file:
            self.canvas.print_png(file, pil_kwargs={"compress_level": 1})  # savefig would draw twice
            return file.getvalue()


class Offer(NamedTuple):
    """An image to choose: its set and group, whether the base model is right, and where it is."""

    group: str
    answer: str
    name: str
    index: int


class Play:
    """What is done to an image and what the models say of it: as a picture (`figure`) or with widgets (`start`).

    A subclass has `own_widgets()`, a dict of widgets, and `view(one, **values)`, which gives for a split of one image
    and their values what `Panel.update` shows: the caption's second line, pictures and answers.

    Args:
        base: decides which images are answered right.
        sets: the images by name of their set; up to `PER_GROUP` of each group of class × square are offered.
        pictures: as `Panel`.
        answers: as `Panel`.
    """

    def __init__(
        self, base: SmallCNN, sets: dict[str, data.Split], pictures: Sequence[str], answers: Sequence[str]
    ) -> None:
        self.sets, self.offers = sets, []
        for name, split in sets.items():
            index, groups = data.examples(split, PER_GROUP)
            logits = evaluation.predict(base, split[index])
            right = logits.argmax(1) == split.labels[index].cpu()
            for i, group, answer in zip(index.tolist(), groups, right.tolist(), strict=True):
                group = f"{name}, " + group.replace("\n", ", ")
                self.offers.append(Offer(group, "right" if answer else "wrong", name, i))
        self.titles = pictures, answers, logits.shape[1]

    def figure(self, cases: Sequence[tuple[Offer, dict[str, Any]]]) -> Figure:
        """A row for each image and the values to view it with."""
        panel = Panel(*self.titles, rows=len(cases))
        for row, (offer, values) in enumerate(cases):
            self.show(panel, row, offer, values)
        return panel.figure

    def show(self, panel: Panel, row: int, offer: Offer, values: dict[str, Any]) -> None:
        """Bring a row of the panel up to date."""
        one = self.sets[offer.name][offer.index : offer.index + 1]
        caption, pictures, answers = self.view(one, **values)
        about = f"{offer.name} image {offer.index:,}: digit {one.digits.item()}, class {one.labels.item()}"
        panel.update(row, f"{about}\n{caption}", pictures, answers)

    def start(self) -> widgets.Widget:
        """The widgets, and the picture below them, which follows at once."""
        self.panel, self.busy = Panel(*self.titles), False
        self.choice = {
            "group": widgets.Dropdown(options=list(dict.fromkeys(offer.group for offer in self.offers))),
            "ERM is": widgets.Dropdown(options=[BOTH]),
            "image": widgets.IntSlider(),
        }
        self.own, chance = self.own_widgets(), widgets.Button(description="at random", layout={"width": "auto"})
        chance.on_click(self.at_random)
        for name, widget in (self.choice | self.own).items():
            widget.description, widget.style.description_width = name, "initial"
            widget.layout.width = WIDTHS.get(type(widget), "auto")
            widget.observe(lambda _, name=name: self.refresh(name), "value")
        self.picture = widgets.Image(layout={"width": f"{100 * self.panel.figure.get_figwidth():.0f}px"})
        self.picture.layout.max_width = "100%"
        self.refresh("group")
        rows, layout = [[*self.choice.values(), chance], [*self.own.values()]], {"flex_flow": "row wrap"}
        layout["grid_gap"] = "4px 16px"
        return widgets.VBox([*(widgets.HBox(row, layout=layout) for row in rows), self.picture])

    def refresh(self, moved: str) -> None:
        """Draw what a person's move of a widget asks for; once, even if that moves other widgets."""
        if self.busy:
            return
        self.busy = True
        try:
            self.follow(moved)
            offer = self.found[self.choice["image"].value]
            self.show(self.panel, 0, offer, {name: widget.value for name, widget in self.own.items()})
            self.picture.value = self.panel.png()
        finally:
            self.busy = False

    def at_random(self, _button: object = None) -> None:
        """Show another of the images chosen from."""
        self.choice["image"].value = random.randrange(len(self.found))

    def follow(self, moved: str) -> None:
        """Move the widgets that hang on the one moved."""
        group, answer, image = self.choice.values()
        if moved in ("group", "ERM is"):
            members = [offer for offer in self.offers if offer.group == group.value]
            if moved == "group":
                answer.options = [BOTH, *sorted({offer.answer for offer in members})]
            self.found = [offer for offer in members if answer.value in (BOTH, offer.answer)]
            image.value, image.max = 0, len(self.found) - 1


class Explorer(Play):
    """What `explore` shows; the arguments are the same."""

    def __init__(
        self, settings: Settings, splits: data.BiasedMNIST, base: SmallCNN, configurations: Sequence[str] = ()
    ) -> None:
        self.settings, self.base, self.load = settings, base, cache(self._load)
        self.configurations = [name for name in configurations if settings.checkpoint_path(name).exists()]
        models = ["ERM", "fine-tuned"] if self.configurations else ["ERM"]
        pictures = ["image", "map", "mask", "masked image", *["map after"] * (len(models) - 1)]
        sets = {"training": splits.train, "raw test": splits.raw, "biased test": splits.biased}
        super().__init__(
            base, sets, pictures, [f"{model}, {image}" for model in models for image in ("image", "masked")]
        )

    def _load(self, configuration: str) -> tuple[SmallCNN, Settings]:
        path, device = self.settings.checkpoint_path(configuration), self.sets["training"].labels.device
        model, about = experiment.load_checkpoint(path, device=device, dataset=self.settings.dataset)
        made_with = {name: about["settings"][name] for name in experiment.FINETUNE if name in about["settings"]}
        return model, dataclasses.replace(self.settings, **made_with)

    def rule(self, configuration: str | None) -> dict[str, Any]:
        """`method`, `param`, `upsample` and `grow` of a fine-tuned model; of None, those of the settings."""
        made_with = self.load(configuration)[1] if configuration else self.settings
        return {name: getattr(made_with, name) for name in experiment.MASK}

    def view(self, one: data.Split, configuration: str | None = None, **rule: Any) -> tuple[str, list[Tensor], Tensor]:
        """Mask an image by a rule, see `masking.mask_dataset`, and ask the models; see `Play`."""
        model, made_with = self.load(configuration) if configuration else (None, self.settings)
        models = [self.base, model] if model else [self.base]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of maps that are zero everywhere: here one sees them
            before, *after = (saliency.saliency_maps(each, one.images, one.labels, made_with.cam) for each in models)
        masked = masking.mask_dataset(one, before, **rule, seed=int(one.images.sum()))  # a random patch for each image
        pictures = [one.images, before, masked.masks(slice(None)), masked.batch(slice(None))[0], *after]
        answers = torch.cat([evaluation.predict(each, images) for each in models for images in (one, masked)])
        marked = dataclasses.replace(one, has_square=torch.ones_like(one.has_square))  # else it gives no shares
        shares = masking.hidden_shares(dataclasses.replace(masked, split=marked), self.settings.square_size)
        hidden = f"{100 * shares['square']:.0f} % of the square, " if one.has_square else ""
        caption = f"hidden: {hidden}{100 * shares['digit']:.0f} % of the digit's ink"
        return caption, [picture[0] for picture in pictures], answers.softmax(1)

    def own_widgets(self) -> dict[str, widgets.Widget]:
        """Of the rule, and of the fine-tuned model where there is one."""
        self.own = {
            "method": widgets.Dropdown(options=masking.METHODS),
            "param": widgets.FloatSlider(),
            "upsample": widgets.Dropdown(options=masking.UPSAMPLES),
            "grow": widgets.IntSlider(max=experiment.RANGES["grow"][1]),
        }
        if self.configurations:
            self.own["configuration"] = widgets.Dropdown(options=self.configurations)
        self._set(self.rule(next(iter(self.configurations), None)))
        return self.own

    def follow(self, moved: str) -> None:
        """A method has its range; a fine-tuned model shows its own rule."""
        super().follow(moved)
        if moved == "method":
            method = self.own["method"].value
            self._set({"method": method, "param": STARTS[method]})
        elif moved == "configuration":
            self._set(self.rule(self.own["configuration"].value))

    def _set(self, rule: dict[str, Any]) -> None:
        param, value = self.own["param"], rule["param"]
        high = min(masking.PARAM_RANGES[rule["method"]][1], max(10.0, value))  # beyond it next to nothing is hidden
        param.max, param.step, param.value = high, 0.01, value
        param.step = 0.01 if high <= 1 else 0.05  # last: the browser brings a value that is between steps onto one
        for name in rule.keys() - {"param"}:
            self.own[name].value = rule[name]


class SquareTest(Play):
    """What `square_test` shows; the models by name."""

    def __init__(self, settings: Settings, raw: data.Split, models: dict[str, SmallCNN]) -> None:
        self.settings, self.models = settings, models
        super().__init__(models["ERM"], {"raw test": raw}, ["image"], list(models))
        digits = raw.digits.tolist()
        self.offers = sorted(offer._replace(group=f"digit {digits[offer.index]}") for offer in self.offers)

    def view(
        self, one: data.Split, row: int = 0, column: int = 0, size: int = 6, colour: str = "blue"
    ) -> tuple[str, list[Tensor], Tensor]:
        """Put a square into an image, see `data.add_square`, and ask the models; see `Play`."""
        one = put_square(one, size, colour, (row, column))
        answers = torch.cat([evaluation.predict(model, one) for model in self.models.values()]).softmax(1)
        return f"{colour} {size}×{size}, row {row}, column {column}" if size else "no square", [*one.images], answers

    def own_widgets(self) -> dict[str, widgets.Widget]:
        """Of the square; to begin with on a 7, where there is one."""
        self.choice["group"].value = self.choice["group"].options[-3:][0]
        return {
            "row": widgets.IntSlider(max=27),
            "column": widgets.IntSlider(max=27),
            "size": widgets.IntSlider(max=28, value=self.settings.square_size),
            "colour": widgets.ColorPicker(value=self.settings.square_color),
        }


def put_square(split: data.Split, size: int, color: str, position: tuple[int, int]) -> data.Split:
    """The same images, all with a square there; see `data.add_square`."""
    images = data.add_square(split.images, torch.ones_like(split.has_square), size, color, position)
    return dataclasses.replace(split, images=images)


def square_map(model: SmallCNN, split: data.Split, size: int = 6, color: str = "blue", stride: int = 1) -> Tensor:
    """Mean probability of class 0 over the images, by where the square is.

    Args:
        model: is asked.
        split: images without a square.
        size: see `data.add_square`.
        color: see `data.add_square`.
        stride: pixels from one place to the next.

    Returns:
        H×W float32: rows and columns 0, `stride`, 2·`stride`, … of the square's top-left pixel, wholly in the image.
    """
    places = range(0, 29 - size, stride)
    positions = list(product(places, repeat=2))
    means = []
    for position in progress.bar(positions, desc="square anywhere", unit="place"):
        images = put_square(split, size, color, position)
        means.append(evaluation.predict(model, images).softmax(1)[:, 0].mean())
    return torch.stack(means).reshape(len(places), len(places))


def explore(
    settings: Settings, name: str, splits: data.BiasedMNIST, base: SmallCNN, configurations: Sequence[str] = ()
) -> None:
    """Show what a mask hides of an image, and what the models say of both: a panel with widgets, headless a picture.

    Args:
        settings: of the notebook; their mask is the first where there is no fine-tuned model.
        name: of the picture's file.
        splits: the sets.
        base: the base model.
        configurations: the fine-tuned models to choose from, the first to begin with; those that are not saved are
            left out.
    """
    play = Explorer(settings, splits, base, configurations)
    if progress.is_live():
        display(play.start())
    else:
        first = next(iter(play.configurations), None)
        offers = {offer.group: offer for offer in reversed(play.offers) if offer.name == "training"}
        values = {"configuration": first} | play.rule(first)
        plotting.show(play.figure([(offer, values) for offer in reversed(offers.values())]), settings, name)


def square_test(
    settings: Settings, name: str, raw: data.Split, base: SmallCNN, finetuned: str | Path, stride: int = 2
) -> None:
    """Show what both models say when the square is anywhere: a map of all its places, and a panel to put it there.

    Headless, a picture takes the place of the panel: that image of the map's which fools the base model most.

    Args:
        settings: of the notebook.
        name: of the pictures' files.
        raw: test images without a square; the map is the mean over fifty of class 1.
        base: the base model.
        finetuned: path of a fine-tuned model's checkpoint.
        stride: pixels from one place of the map to the next.
    """
    model, _ = experiment.load_checkpoint(finetuned, device=raw.labels.device, dataset=settings.dataset)
    models, square, maps = {"ERM": base, "fine-tuned": model}, (settings.square_size, settings.square_color), {}
    index, _ = data.examples(raw, 50)
    some = raw[index := index[raw.labels[index] == 1]]
    for key, model in models.items():
        without = evaluation.predict(model, some).softmax(1)[:, 0].mean()
        maps[f"{key} (without a square: {without:.3f})"] = square_map(model, some, *square, stride)
    plotting.show(plotting.square_maps(maps, stride), settings, f"{name}_map")
    play = SquareTest(settings, raw, models)
    if progress.is_live():
        display(play.start())
    else:
        fooled = evaluation.predict(base, put_square(some, *square, (0, 0))).softmax(1)[:, 0].argmax()
        offer, (size, color) = Offer("", "", "raw test", index[fooled].item()), square
        cases = [{"size": 0}, {"size": size, "colour": color}, {"size": size, "colour": color, "column": 28 - size}]
        cases.append({"size": size, "colour": "red" if color != "red" else "blue"})
        plotting.show(play.figure([(offer, case) for case in cases]), settings, name)
