"""Figures that are saved and displayed."""

from unittest.mock import Mock

import torch

from masktune_utils import datasets, metrics, models, plotting
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
