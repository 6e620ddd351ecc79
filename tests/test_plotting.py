"""Figures that are saved and displayed."""

import torch

from masktune_utils import datasets, metrics, models, plotting
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


def test_maps_become_pictures_that_are_brighter_where_they_are_larger():
    maps = torch.linspace(0, 1, 12).view(1, 3, 4)
    pictures = plotting.heat(maps)
    assert pictures.shape == (1, 3, 3, 4)
    brightness = pictures.sum(1).flatten()
    assert (brightness.diff() > 0).all()
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_predictions_of_the_same_eight_images_are_shown_right_or_wrong(trained):
    settings = Settings(dataset="mnist5k", device="cpu")
    eight = datasets.eight(settings)
    assert eight.groups.tolist() == [0, 0, 4, 4, 7, 7, 9, 9]
    assert eight.has_shortcut.tolist() == [False, True] * 4
    without, with_it = eight.images[::2], eight.images[1::2]
    assert torch.equal(without[..., 6:], with_it[..., 6:])
    other_seed = datasets.eight(settings.replace(seed=5))
    assert torch.equal(other_seed.images, eight.images)
    figure = plotting.predictions({"a": trained, "b": trained}, eight)
    assert len(figure.axes) == 16
    probabilities = metrics.predict(trained, eight).softmax(1)
    for ax, share, label in zip(figure.axes, probabilities, eight.labels, strict=False):
        predicted = share.argmax()
        words = f"{('low', 'high')[predicted]} {share.max():.0%}"
        assert ax.get_xlabel() == words
        color = "#009E73" if predicted == label else "#D55E00"
        assert ax.xaxis.label.get_color() == color


def test_of_ten_classes_the_number_is_shown():
    eight = datasets.eight(Settings(dataset="mnist5k", labels="digits", device="cpu"))
    network = models.new_model(0, num_classes=10)
    predicted = metrics.predict(network, eight).argmax(1).tolist()
    figure = plotting.predictions({"new": network}, eight)
    words = [ax.get_xlabel().split() for ax in figure.axes]
    assert [int(number) for number, _ in words] == predicted
