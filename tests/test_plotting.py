"""Figures that are saved and displayed; the panels, without JupyterLab."""

from unittest.mock import Mock

import pytest
import torch
from conftest import TINY

from masktune_utils import datasets, metrics, models, panels, plotting
from masktune_utils.choice import ERM, NULL, Audit, Choice, HeldOut, chosen, score
from masktune_utils.choice.exchange import Swaps
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset
from masktune_utils.settings import Settings


def choice_of_two(train):
    """Two masks: `a` corrects all of six mistakes, `b` none."""
    is_right = (torch.arange(len(train)) >= 6).long()
    labels = torch.ones_like(is_right)
    predictions = {
        ERM: is_right,
        NULL: is_right,
        "a": labels,
        "b": is_right.clone(),
    }
    masked = {
        NULL: NOTHING.mask(train, torch.zeros(len(train), 1, 1)),
        "a": MaskedDataset(train, train.shortcut, "resample"),
        "b": MaskedDataset(train, ~train.shortcut, "resample"),
    }
    held_out = HeldOut(
        labels=labels,
        mistake_map=torch.rand(13, 13),
        predictions=predictions,
        explained=dict.fromkeys("ab", 1 - is_right),
        mean_masks=dict.fromkeys(["a", "b", NULL], torch.eye(28)),
        masked=masked,
    )
    return chosen._with_verdict(held_out, None, score.decide(held_out))


@pytest.fixture
def choice(splits) -> Choice:
    return choice_of_two(splits.train)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that a panel has drawn."""
    figures = []
    monkeypatch.setattr(panels, "draw", figures.append)
    return figures


def titles_of_rows(figure):
    return [ax.get_ylabel() for ax in figure.axes if ax.get_ylabel()]


def test_a_figure_is_saved_as_it_is_displayed_and_tells_of_what_it_is(
    monkeypatch, settings
):
    display = Mock()
    monkeypatch.setattr(plotting, "display", display)
    figure = plotting.grid({"image": torch.rand(2, 3, 28, 28)})
    plotting.show(figure, settings, "picture", seeds=[2, 1])
    (displayed,) = display.call_args.args
    path = settings.folder("figures") / "picture.png"
    assert displayed.data == path.read_bytes()
    assert figure.texts[0].get_text() == f"{settings.experiment}, seed 1, 2"


def test_a_grid_shows_images_and_masks_with_their_titles():
    grey = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    mask = torch.eye(4)[None] > 0
    figure = plotting.grid({"grey": grey, "mask": mask}, ["first"])
    assert titles_of_rows(figure) == ["first"]
    brightest = {}
    for ax in figure.axes:
        (picture,) = ax.images
        shown = picture.norm(picture.get_array())
        brightest[ax.get_title()] = shown.max()
    assert brightest == pytest.approx({"grey": 128 / 255, "mask": 1})


def test_examples_are_spread_over_each_group():
    split = Split(torch.zeros(20, 3, 4, 4), torch.arange(20) % 2)
    index, titles = plotting.examples(split, 2)
    assert index.tolist() == [4, 14, 5, 15]
    assert titles[1:3] == ["class 0\nno shortcut", "class 1\nno shortcut"]


def test_predictions_are_shown_right_or_wrong():
    eight = datasets.eight(Settings(**TINY))
    network = models.new_model(0)
    figure = plotting.predictions({"a": network, "b": network}, eight)
    assert titles_of_rows(figure) == ["a", "b"]
    probabilities = metrics.predict(network, eight).softmax(1)
    for ax, share, label in zip(figure.axes, probabilities, eight.labels, strict=False):
        predicted = share.argmax()
        name = eight.class_names[predicted]
        color = "#009E73" if predicted == label else "#D55E00"
        assert ax.get_xlabel() == f"{name} {share.max():.0%}"
        assert ax.xaxis.label.get_color() == color


def test_in_the_panel_a_place_is_moved_and_hidden(splits, capsys, monkeypatch):
    monkeypatch.setattr(chosen, "MOST_EPOCHS", 1)
    train = splits.train
    panel = panels.point(models.new_model(0), splits.raw[::20], train)
    rows, columns, button, _ = panel.children
    panel.update()
    assert panel.result.region[:7, :7].all()
    assert panel.result.region.sum() == 49
    rows.value = (14, 28)
    columns.value = (0, 28)
    assert panel.result.region[14:].all()
    assert panel.result.region.sum() == 14 * 28
    assert "Once it is hidden" not in capsys.readouterr().out
    button.click()
    printed = capsys.readouterr().out
    assert printed.count("If the ") == 1
    assert "Once it is hidden:\nAccuracy: " in printed
    assert panel.result.hide(train).masked.own_masks[:, 14:].all()
    rows.value = (0, 14)  # a later move only audits
    assert "Once it is hidden" not in capsys.readouterr().out
    assert panel.result.region[:14].all()


def test_of_a_choice_a_mistake_and_none_of_each_class_are_shown(choice):
    split = choice.masked.split
    labels = split.labels.tolist()
    mistakes = [labels.index(label) for label in (0, 1)]
    predicted = split.labels.clone()
    predicted[mistakes] ^= 1
    choice.held_out.labels = split.labels
    choice.held_out.predictions[ERM] = predicted
    figure = plotting.choice_masks(choice)
    assert titles_of_rows(figure) == [
        "low\npredicted correctly",
        "low\na mistake of ERM",
        "high\npredicted correctly",
        "high\na mistake of ERM",
    ]
    images = figure.axes[::3]
    for ax, index in zip(images[1::2], mistakes, strict=True):
        image, _ = split[index]
        assert (ax.images[0].get_array() == image.movedim(0, 2).numpy()).all()
    kept = plotting.choice_masks(choice.take(ERM))
    for ax, again in zip(figure.axes[1::3], kept.axes[1::3], strict=True):
        assert (ax.images[0].get_array() == again.images[0].get_array()).all()


def test_a_map_is_black_where_it_is_not_positive():
    picture = plotting.positive_heat(torch.tensor([[2.0, 0, -2]]))
    assert torch.equal(picture[..., 1], picture[..., 2])
    assert picture[..., 0].mean() > 0.5 > picture[..., 1].mean()


def test_a_mistake_is_shown_that_moves_and_the_image_with_which_it_does():
    """Of two pixels each, the left one is swapped."""
    shades = torch.tensor([0.0, 0.25, 0.5, 1.0])
    images = shades.view(4, 1, 1, 1).expand(4, 3, 1, 2)
    swaps = Swaps(
        mistakes=torch.tensor([1]),
        partners=torch.tensor([[0], [2]]),
        moves=torch.tensor([[False], [True]]),
    )
    found = Audit(
        images=Split(images, [0, 0, 0, 1], class_names=("low", "high")),
        predicted=torch.tensor([0, 1, 0, 1]),
        maps={},
        found_by="you",
        region=torch.tensor([[True, False]]),
        swaps=swaps,
        class_swaps=None,
        elsewhere=[],
    )
    figure = plotting.swap_pictures(found)
    assert titles_of_rows(figure) == ["low, taken\nfor high"]
    assert all(ax.collections for ax in figure.axes)  # outlines
    shown = {
        ax.get_title(): ax.images[0].get_array()[0, :, 0].tolist() for ax in figure.axes
    }
    assert shown == {
        "a mistake": [0.25, 0.25],
        "another of\nits class": [0.5, 0.5],
        "cut out:\nright": [0.5, 0.25],
        "pasted:\nwrong": [0.25, 0.5],
    }


def test_a_row_of_dumbbells_tells_what_is_right_before_and_after(choice):
    choice.held_out.predictions["b"][6::2] = 0  # half of the images that are right
    (ax,) = plotting.dumbbells(choice.held_out, "a").axes
    ticks = [line.get_xdata()[0] for line in ax.lines if line.get_color() == "black"]
    assert ticks == pytest.approx([10, 60], abs=1)
    texts = {text.get_text(): text.get_fontweight() for text in ax.texts}
    assert texts == {
        "a: 0% → 100%": "bold",
        "b: 0% → 0%": "normal",
    }


def test_in_the_panel_a_mask_is_taken_or_erm_is_kept(choice, drawn, capsys):
    panel = panels.explore(choice)
    take, _ = panel.children
    assert panel.result is choice
    for count, name in enumerate(("b", ERM, "a"), 2):
        take.value = name
        assert panel.result.verdict.chosen == name
        assert len(drawn) == 2 * count
    assert panel.result is choice
    assert capsys.readouterr().out.endswith(f"{choice.reason}\n")


def test_the_square_can_be_moved(splits, drawn):
    network = models.new_model(0)
    panel = panels.move_square({"ERM": network}, splits.raw[:3])
    _, row, *_ = panel.children
    row.value = 20
    assert len(drawn) == 2
    for figure, top in zip(drawn, (0, 20), strict=True):
        (picture,) = figure.axes[0].images
        square = picture.get_array()[top : top + 6, :6, 2]
        assert (square == 1).all()
