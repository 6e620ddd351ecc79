"""Figures that are saved and displayed."""

from unittest.mock import Mock

import pytest
import torch

from masktune_utils import datasets, metrics, models, panels, plotting
from masktune_utils.choice import ERM, NULL, Choice, HeldOut, score
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import Settings


def test_a_figure_is_saved_as_it_is_displayed_and_tells_of_what_it_is(
    monkeypatch, tmp_path
):
    displayed = []
    monkeypatch.setattr("IPython.display.display", displayed.append)
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", seed=3, epochs=2)
    images = torch.rand(2, 3, 28, 28)
    figure = plotting.grid({"image": images}, ["first", "second"])
    plotting.show(figure, settings, "picture", seeds=[2, 1])
    path = tmp_path / "figures" / "mnist5k_epochs=2" / "seed3" / "picture.png"
    assert displayed[0].data == path.read_bytes()
    assert figure.texts[0].get_text() == "mnist5k_epochs=2, seed 1, 2"
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "second"]


def test_the_same_eight_images_are_shown_without_the_square_and_with_it():
    eight = datasets.eight(Settings(dataset="mnist5k", device="cpu"))
    assert eight.groups.tolist() == [0, 0, 4, 4, 7, 7, 9, 9]
    assert eight.has_shortcut.tolist() == [False, True] * 4


def test_predictions_are_shown_right_or_wrong():
    eight = datasets.eight(Settings(dataset="mnist5k", device="cpu"))
    network = models.new_model(0)
    figure = plotting.predictions({"a": network, "b": network}, eight)
    assert len(figure.axes) == 16
    probabilities = metrics.predict(network, eight).softmax(1)
    for ax, share, label in zip(figure.axes, probabilities, eight.labels, strict=False):
        predicted = share.argmax()
        name = ["low", "high"][predicted]
        assert ax.get_xlabel() == f"{name} {share.max():.0%}"
        color = "#009E73" if predicted == label else "#D55E00"
        assert ax.xaxis.label.get_color() == color


def test_of_a_choice_a_mistake_and_none_of_each_class_are_shown(splits):
    masks = torch.rand(200, 28, 28) > 0.9
    masked = MaskedDataset(splits.train, masks, "resample")
    held_out = Mock(is_mistake=torch.arange(200) % 7 == 0)
    held_out.mistake_map = torch.rand(13, 13)
    choice = Mock(held_out=held_out, candidates={"a": masked})
    choice.verdict.best = "a"
    for network, columns in ((None, 4), (models.new_model(0), 5)):
        figure = plotting.choice_masks(choice, network)
        rows = [ax.get_ylabel() for ax in figure.axes[::columns]]
        assert rows == [
            "low\npredicted correctly",
            "low\na mistake of ERM",
            "high\npredicted correctly",
            "high\na mistake of ERM",
        ]


def test_a_grey_image_is_drawn_grey():
    grey = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    (ax,) = plotting.grid({"image": grey}).axes
    (picture,) = ax.images
    assert picture.get_cmap().name == "gray"
    assert picture.norm(picture.get_array()).max() == pytest.approx(128 / 255)


def held_out() -> HeldOut:
    """Two masks: `a` corrects two of two mistakes, `b` none."""
    is_mistake = torch.arange(200) < 6
    right = {ERM: ~is_mistake, NULL: ~is_mistake, "a": is_mistake, "b": ~is_mistake}
    return HeldOut(
        labels=torch.ones(200, dtype=torch.int64),
        mistake_map=torch.rand(13, 13),
        predictions={model: right[model].long() for model in right},
        explained={mask: is_mistake.float() for mask in "ab"},
        mean_masks={mask: torch.eye(28) for mask in "ab"},
    )


def test_a_row_of_dumbbells_tells_what_is_right_before_and_after():
    figure = plotting.dumbbells(held_out(), "a")
    rows = figure.axes[1::2]
    titles = [ax.get_title(loc="left") for ax in rows]
    assert titles == ["a: 0 → 6 of 6", "b: 0 → 0 of 6"]
    ends = [ax.collections[0].get_offsets()[:, 0].tolist() for ax in rows]
    assert ends == [[0, 100], [0, 0]]
    (first, second) = [ax._left_title.get_fontweight() for ax in rows]
    assert (first, second) == ("bold", "normal")


def test_in_the_panel_a_mask_is_looked_at_and_taken_or_erm_is_kept(splits):
    train = splits.train
    images = {name: MaskedDataset(train, train.shortcut, "resample") for name in "ab"}
    images["b"] = MaskedDataset(train, ~train.shortcut, "resample")
    known = held_out()
    choice = Choice(known, images, None, score.judge(known))
    panel = panels.explore(choice)
    first = panel.picture.value
    assert (panel.mask.value, panel.choice.verdict.chosen) == ("a", "a")
    panel.mask.value = "b"
    assert panel.picture.value != first
    assert "0 of 6" not in panel.words.value
    assert panel.choice.verdict.chosen == "a"  # looked at, not taken
    panel.take.click()
    assert panel.choice.verdict.chosen == "b"
    panel.keep.click()
    assert panel.choice.is_kept
    assert "Decided: ERM" in panel.words.value


def test_the_square_can_be_moved(splits, monkeypatch):
    drawn = []
    monkeypatch.setattr(panels, "draw", lambda _picture, figure: drawn.append(figure))
    panel = panels.move_square({"ERM": models.new_model(0)}, splits.raw[:3])
    controls, _ = panel.children
    _, row, *_ = controls.children
    row.value = 20
    assert len(drawn) == 2
    pixels = [figure.axes[0].images[0].get_array() for figure in drawn]
    assert (pixels[0][:6, :6, 2] == 1).all()
    assert (pixels[1][20:26, :6, 2] == 1).all()


def test_where_no_mask_was_tried_there_is_no_row():
    known = held_out()
    known.predictions = {ERM: known.predictions[ERM]}
    figure = plotting.dumbbells(known, ERM)
    assert not figure.axes[1].get_title(loc="left")
