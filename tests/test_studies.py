"""The studies: each notebook on tiny data."""

import re

import numpy as np
import papermill
import pytest
import torch
from conftest import tiny, write_photographs
from torchvision.models import resnet18

from masktune_utils.runner import jobs


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "values"),
    [
        ("09_limits", {"limit": 60}),
        ("10_methods", {}),
        ("11_abstaining", {"limit": 60, "validation_share": 0.2}),
        ("02_erm", {"limit": 40, "batch_size": 3}),
        ("03_saliency_masks", {"shortcut": "none"}),
        ("06_choice", {"limit": 20, "conflicting_share": 1}),
        ("06_choice", {"conflicting_share": 0, "square_size": 14, "epochs": 10}),
    ],
)
def test_notebooks_run_on_tiny_data(stem, values, tmp_path):
    """And notebook 05 after them, whether ERM was kept or not."""
    settings = tiny(tmp_path, **values)
    for name in (stem, "05_plots"):
        (job,) = jobs.make_stage(name, [settings])
        assert job.run(together=1) is None
    saved = {path.name for path in job.settings.folder("results").glob("*.csv")}
    assert saved == {f"{stem}.csv"} & {"09_limits.csv", "11_abstaining.csv"}


def execute_07(folder, **values):
    """The cells of notebook 07, executed on a new folder of 20 photographs."""
    write_photographs(folder, {"goats": 10, "sheep": 10})
    given = {"folder": str(folder), "directory": str(folder.parent), "epochs": 1}
    source = jobs.NOTEBOOKS / "07_your_own.ipynb"
    executed = papermill.execute_notebook(
        source, None, given | values, progress_bar=False, cwd=folder
    )
    return f"{executed.cells}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("network", "weights"),
    [("small", ""), ("resnet18", "default")],
)
def test_notebook_07_reports_on_a_folder_and_saves_what_it_made(
    network, weights, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    on_disk = tmp_path / "torch" / "hub" / "checkpoints"
    on_disk.mkdir(parents=True)
    torch.save(resnet18().state_dict(), on_disk / "resnet18-f37072fd.pth")
    shown = execute_07(tmp_path / "mine", network=network, weights=weights, size=32)
    assert re.search("hosen|ERM is kept", shown)
    assert re.search(r"mistakes: \d+ of \d+", shown)
    assert "stderr" not in shown
    (files,) = (tmp_path / "runs" / "your_own").iterdir()
    names = {path.name for path in files.iterdir()}
    assert names == {"choice.pt", "masks.npz", "erm.pt", "chosen.pt"}
    masks = np.load(files / "masks.npz")["masks"]
    assert masks.shape == (20, 32, 32)


@pytest.mark.slow
def test_notebook_07_hides_a_place_and_shows_before_and_after(tmp_path):
    shown = execute_07(tmp_path / "mine", place="0.5,0.5,1,1", size=32)
    assert "By hand: the bottom right (25% of the image) is hidden." in shown
    assert "before: accuracy" in shown
    assert "after: accuracy" in shown
    assert "Once it is hidden, another audit:" in shown
    assert "stderr" not in shown
    (files,) = (tmp_path / "runs" / "your_own").iterdir()
    names = {path.name for path in files.iterdir()}
    assert names == {"place.pt", "masks.npz", "erm.pt", "chosen.pt"}
    masks = np.load(files / "masks.npz")["masks"]
    assert masks[:, 16:, 16:].all()
    assert masks.sum() == 20 * 16 * 16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"network": "resnet"}, "network is 'resnet' ''; allowed: .'small', 'alexnet"),
        ({"network": "resnet18", "weights": "default"}, "not on disk: resnet18"),
        (
            {"classifier": "none.onnx"},
            "none.onnx does not classify images.*doesn't exist",
        ),
        ({"example": "dust"}, "example is 'dust'"),
        ({"place": "corner"}, "the place is .nan.; allowed: left, top, right"),
        ({"place": "0.5,0,0.2,1"}, "the place is .*; allowed: left, top, right"),
        ({"colour": "blue"}, "colour is not a parameter"),
    ],
)
def test_notebook_07_refuses_what_it_does_not_know(
    values, words, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(papermill.PapermillExecutionError, match=words):
        execute_07(tmp_path / "mine", **values)
