"""The panel, driven without a browser: `test_browser.py` has a real one."""

import logging

import ipywidgets
import pandas as pd
import pytest
import torch

from masktune_utils import evaluation, explorer, masking, models, plotting, saliency
from masktune_utils.settings import PARAM_RANGES, Settings
from masktune_utils.shortcuts import groups

RULES = [
    {"method": "mean", "param": 0.9, "upsample": "nearest", "dilation": 2},
    {"method": "top_k", "param": 0.3, "upsample": "bilinear", "dilation": 0},
]
pytestmark = pytest.mark.filterwarnings("ignore:.*zero everywhere")


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, cam="GradCAM")


@pytest.fixture
def networks(model) -> dict[str, models.SmallCNN]:
    return {"ERM": model, "MaskTune": models.new_model(seed=1).eval()}


@pytest.fixture
def displayed(monkeypatch) -> list:
    """What the explorer displays."""
    found = []
    monkeypatch.setattr(explorer, "display", lambda *things: found.extend(things))
    monkeypatch.setattr(plotting, "display", found.append)
    return found


@pytest.fixture
def panel(settings, splits, networks, displayed, monkeypatch) -> dict[str, ipywidgets.Widget]:
    """The controls of the live panel, by name."""
    monkeypatch.setattr(explorer.progress, "is_live", lambda: True)
    explorer.explore(settings, "05_explorer", splits, networks, **RULES[0])
    (box,) = [thing for thing in displayed if isinstance(thing, ipywidgets.Box)]
    assert not settings.folder("figures").exists()
    return {control.description: control for control in box.children[:-1]}


@pytest.mark.parametrize("rule", [*RULES, RULES[0] | {"method": "mean_std", "upsample": "map"}])
def test_what_is_shown_equals_direct_computation(rule, splits, model):
    other, some = models.new_model(seed=1).eval(), splits.biased[95:105]
    pictures, table = explorer.explain(some, {"ERM": model, "MaskTune": other}, "GradCAM", **rule)
    maps = [saliency.saliency_maps(m, some.images, some.labels, "GradCAM") for m in (model, other)]
    masks = masking.image_masks(maps[0], (28, 28), *rule.values())
    images = some.images / 255
    masked = images * (1 - masks[:, None])
    expected = [some.images, maps[0], masks, masked, maps[1]]
    for picture, each in zip(pictures.values(), expected, strict=True):
        torch.testing.assert_close(picture, each, atol=1e-5, rtol=0)
    assert table["digit"].tolist() == some.digits.tolist()
    assert table["class"].tolist() == some.labels.tolist()
    for kind, batch in {"image": images, "masked image": masked}.items():
        for name, network in {"ERM": model, "MaskTune": other}.items():
            with torch.no_grad():
                shares, labels = network(batch).softmax(1).max(1)
            found = table[f"{name}, {kind}"].str.extract(r"class (\d), (\d+)%").astype(int)
            assert found[0].tolist() == labels.tolist()
            assert found[1].tolist() == pytest.approx(100 * shares.numpy(), abs=0.51)


def test_images_whose_predictions_differ_come_first(splits, networks):
    found = explorer.offered_images(splits, networks, "XGradCAM", **RULES[1])
    counts = []
    for name, some in found.items():
        one, two = (evaluation.predict(network, some).argmax(1) for network in networks.values())
        differ = (one != two).tolist()
        assert differ == sorted(differ, reverse=True)
        assert name.endswith(f": {sum(differ)} of {len(some)} differ")
        counts.append(sum(differ))
    assert counts == sorted(counts, reverse=True)
    assert 0 < sum(counts) < sum(map(len, found.values()))
    expected = set()
    for part in ("train", "raw", "biased"):
        split = getattr(splits, part)
        expected |= {f"{part}, {group}" for group in groups(split.labels, split.has_shortcut)}
    assert {name.partition(":")[0] for name in found} == expected


def test_the_panel_shows_the_image_and_the_mask_that_were_chosen(
    panel, displayed, splits, networks
):
    offered = panel["group"].options
    assert (panel["group"].value, panel["image"].value) == (offered[0], 0)  # where they differ
    assert {name: panel[name].value for name in RULES[0]} == RULES[0]
    for name, value in {"group": offered[1], "image": 3, **RULES[1]}.items():
        panel[name].value = value
    images = explorer.offered_images(splits, networks, "GradCAM", **RULES[0])
    assert [*images] == [*offered]
    some = images[offered[1]][[3]]
    pictures, expected = explorer.explain(some, networks, "GradCAM", **RULES[1])
    picture, table = displayed[-2:]
    pd.testing.assert_frame_equal(table, expected)
    assert picture.data == plotting.png(plotting.grid(pictures))


def test_a_method_has_its_own_range(panel, caplog):
    caplog.set_level(logging.WARNING)
    for method, most in PARAM_RANGES.items():
        panel["method"].value = "mean"
        panel["param"].value = 64
        panel["method"].value = method
        assert panel["param"].min == 0 and panel["param"].max == most
        assert panel["param"].value == panel["param"].max
    assert not caplog.records  # no picture failed on the way


def test_a_random_patch_is_one_of_its_image(splits, model):
    rule = {"method": "random", "param": 0.3, "upsample": "bilinear", "dilation": 0}
    masks = []
    for image in (0, 1, 2, 0):
        pictures, _ = explorer.explain(splits.raw[[image]], {"ERM": model}, "XGradCAM", **rule)
        masks.append(pictures["mask"])
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


@pytest.mark.parametrize("names", [["ERM"], ["ERM", "MaskTune"]])
def test_headless_there_are_a_picture_and_a_table_and_no_widgets(
    names, settings, splits, networks, displayed, monkeypatch
):
    monkeypatch.setattr(explorer, "widgets", None)
    some = {name: networks[name] for name in names}
    explorer.explore(settings, "explorer", splits, some, **settings.mask_rule)
    picture, table = displayed
    assert (settings.folder("figures") / "explorer.png").read_bytes() == picture.data
    assert table.columns.str.contains("MaskTune").any() == (len(names) > 1) and len(table) == 4
