"""Figures that are saved and displayed; the panels, without JupyterLab."""

from unittest.mock import Mock

import pytest
import torch

from masktune_utils import datasets, metrics, models, panels, plotting
from masktune_utils.choice import ERM, NULL, Choice, HeldOut, score
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import Settings


@pytest.fixture(scope="module")
def eight():
    return datasets.eight(Settings(dataset="mnist5k", device="cpu"))


def choice_of_two(train: Split) -> Choice:
    """Two masks: `a` corrects all of six mistakes, `b` none."""
    is_mistake = torch.arange(len(train)) < 6
    held_out = HeldOut(
        labels=torch.ones(len(train), dtype=torch.int64),
        mistake_map=torch.rand(13, 13),
        predictions={
            ERM: (~is_mistake).long(),
            NULL: (~is_mistake).long(),
            "a": is_mistake.long(),
            "b": (~is_mistake).long(),
        },
        explained={mask: is_mistake.float() for mask in "ab"},
        mean_masks={mask: torch.eye(28) for mask in "ab"},
    )
    masked = {
        "a": MaskedDataset(train, train.shortcut, "resample"),
        "b": MaskedDataset(train, ~train.shortcut, "resample"),
    }
    return Choice(held_out, masked, None, score.judge(held_out))


@pytest.fixture
def choice(splits) -> Choice:
    return choice_of_two(splits.train)


@pytest.fixture
def drawn(monkeypatch) -> list:
    """The figures that a panel has drawn."""
    figures = []
    monkeypatch.setattr(panels, "draw", figures.append)
    return figures


def titles_of_rows(figure) -> list[str]:
    titles = [ax.get_ylabel() for ax in figure.axes]
    return [title for title in titles if title]


def test_a_figure_is_saved_as_it_is_displayed_and_tells_of_what_it_is(
    monkeypatch, tmp_path
):
    display = Mock()
    monkeypatch.setattr(plotting, "display", display)
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", seed=3, epochs=2)
    figure = plotting.grid({"image": torch.rand(2, 3, 28, 28)})
    plotting.show(figure, settings, "picture", seeds=[2, 1])
    path = tmp_path / "figures" / "mnist5k_epochs=2" / "seed3" / "picture.png"
    (displayed,) = display.call_args.args
    assert displayed.data == path.read_bytes()
    assert figure.texts[0].get_text() == "mnist5k_epochs=2, seed 1, 2"


def test_a_grid_shows_images_and_masks_with_their_titles():
    grey = torch.full((1, 1, 4, 4), 128, dtype=torch.uint8)
    figure = plotting.grid({"grey": grey, "mask": torch.eye(4)[None]}, ["first"])
    left, right = figure.axes
    assert titles_of_rows(figure) == ["first"]
    assert [left.get_title(), right.get_title()] == ["grey", "mask"]
    for ax, brightest in ((left, 128 / 255), (right, 1)):
        (picture,) = ax.images
        assert picture.get_cmap().name == "gray"
        assert picture.norm(picture.get_array()).max() == pytest.approx(brightest)


def test_the_same_eight_images_are_shown_without_the_square_and_with_it(eight):
    assert eight.groups.tolist() == [0, 0, 4, 4, 7, 7, 9, 9]
    assert eight.has_shortcut.tolist() == [False, True] * 4


def test_predictions_are_shown_right_or_wrong(eight):
    network = models.new_model(0)
    figure = plotting.predictions({"a": network, "b": network}, eight)
    assert titles_of_rows(figure) == ["a", "b"]
    probabilities, classes = metrics.predict(network, eight).softmax(1).max(1)
    texts = []
    for share, predicted, label in zip(
        probabilities, classes, eight.labels, strict=True
    ):
        color = "#009E73" if predicted == label else "#D55E00"
        texts.append((f"{eight.class_names[predicted]} {share:.0%}", color))
    labels = [ax.xaxis.label for ax in figure.axes]
    assert [(label.get_text(), label.get_color()) for label in labels] == 2 * texts


def test_of_a_choice_a_mistake_and_none_of_each_class_are_shown(choice):
    held_out = choice.held_out
    held_out.labels = choice.masked.split.labels
    held_out.predictions[ERM] = (torch.arange(200) % 7 > 0).long()
    assert titles_of_rows(plotting.choice_masks(choice)) == [
        "low\npredicted correctly",
        "low\na mistake of ERM",
        "high\npredicted correctly",
        "high\na mistake of ERM",
    ]


def test_a_row_of_dumbbells_tells_what_is_right_before_and_after(choice):
    (ax,) = plotting.dumbbells(choice.held_out, "a").axes
    first, second = ax.texts
    assert [first.get_text(), first.get_fontweight()] == ["a: 0 → 6 of 6", "bold"]
    assert [second.get_text(), second.get_fontweight()] == ["b: 0 → 0 of 6", "normal"]
    ends = [dots.get_offsets().tolist() for dots in ax.collections]
    assert ends == [[[0, 0], [100, 0]], [[0, 1], [0, 1]]]
    assert len(ax.images) == 2


def test_where_no_mask_was_tried_there_is_no_row(choice):
    held_out = choice.held_out
    held_out.predictions = {ERM: held_out.predictions[ERM]}
    (ax,) = plotting.dumbbells(held_out, ERM).axes
    assert not ax.texts


def test_in_the_panel_a_mask_is_taken_or_erm_is_kept(choice, drawn, capsys):
    panel = panels.explore(choice)
    take, _ = panel.children
    assert panel.result is choice
    for name in ("b", ERM, "a"):
        take.value = name
        assert panel.result.verdict.chosen == name
        assert capsys.readouterr().out.endswith(f"{panel.result.reason}\n")
    assert panel.result is choice
    assert len(drawn) == 8


def test_the_square_can_be_moved(splits, drawn):
    panel = panels.move_square({"ERM": models.new_model(0)}, splits.raw[:3])
    _, row, *_ = panel.children
    row.value = 20
    first, second = [figure.axes[0].images[0].get_array() for figure in drawn]
    assert (first[:6, :6, 2] == 1).all()
    assert (second[20:26, :6, 2] == 1).all()
