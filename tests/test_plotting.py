import torch

from masktune_utils import plotting
from masktune_utils.settings import Settings


def test_a_figure_is_saved_as_it_is_displayed_and_tells_of_what_it_is(
    monkeypatch, tmp_path
):
    displayed = []
    monkeypatch.setattr(plotting, "display", displayed.append)
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", seed=3, epochs=2)
    figure = plotting.grid({"image": torch.rand(2, 3, 28, 28)}, ["first", "second"])
    plotting.show(figure, settings, "some", seeds=[2, 1])
    path = tmp_path / "figures" / "mnist5k_epochs=2" / "seed3" / "some.png"
    assert displayed[0].data == path.read_bytes()
    assert figure.texts[0].get_text() == "mnist5k_epochs=2, seed 1, 2"
    assert [ax.get_ylabel() for ax in figure.axes] == ["first", "second"]
