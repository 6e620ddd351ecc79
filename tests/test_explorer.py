import ipywidgets
import pytest
import torch

from masktune_utils import data, evaluation, experiment, explorer, masking, models, saliency
from masktune_utils.experiment import Settings

NAMES = ["mean_0.9_upsample=nearest_grow=2", "top_k_0.3"]


@pytest.fixture
def settings(tmp_path) -> Settings:
    """Of an experiment with two fine-tuned models."""
    for k, rule in enumerate(({"method": "mean", "param": 0.9, "upsample": "nearest", "grow": 2}, {"param": 0.3})):
        made = Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, cam=("GradCAM", "XGradCAM")[k], **rule)
        path = made.checkpoint_path(NAMES[k])
        experiment.save_checkpoint(path, models.new_model(seed=k), made.identity(base=False), [])
    return Settings(directory=str(tmp_path), dataset="mnist5k", limit=200)


@pytest.fixture
def play(settings, splits, model) -> explorer.Explorer:
    """The explorer, started."""
    play = explorer.Explorer(settings, splits, model, [NAMES[0], "not_saved", NAMES[1]])
    play.start()
    return play


def shown(play: explorer.Play) -> tuple[str, list[torch.Tensor], torch.Tensor]:
    """Caption, pictures and probabilities of class 0, read from the figure itself."""
    pictures, (bars, *_), _, title = play.panel.rows[0]
    arrays = [torch.as_tensor(picture.get_array().filled()) for picture in pictures]
    return title.get_text(), arrays, torch.tensor([bar.get_width() for bar in bars])


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
@pytest.mark.parametrize("group", ["training, class 0, square", "biased test, class 1, square"])
@pytest.mark.parametrize(
    "rule", [{"method": "top_k", "param": 0.2}, {"method": "mean_std", "param": 1.5, "grow": 3}, {"upsample": "map"}]
)
def test_what_is_shown_is_what_the_other_modules_compute(play, splits, model, group, rule):
    play.choice["group"].value, play.choice["image"].value = group, 7
    for name, value in {"configuration": NAMES[1], **rule}.items():
        play.own[name].value = value
    split = splits.train if "training" in group else splits.biased
    index = ((split.labels == int("class 1" in group)) & split.has_square).nonzero()[7, 0]
    finetuned = models.new_model(seed=1).eval()
    before, after = (saliency.saliency_maps(each, split.images, split.labels)[index] for each in (model, finetuned))
    rule = {"method": "top_k", "param": 0.3} | rule
    mask = masking.image_masks(before, **rule)
    image = split.images[index] / 255
    masked = image * (1 - mask)
    with torch.no_grad():
        answers = torch.cat([each(torch.stack([image, masked])).softmax(1)[:, 0] for each in (model, finetuned)])

    caption, pictures, class_0 = shown(play)
    torch.testing.assert_close(class_0, answers, check_dtype=False, atol=1e-5, rtol=0)
    expected = [split.images[index].permute(1, 2, 0), before, mask, masked.permute(1, 2, 0), after]
    for picture, each in zip(pictures, expected, strict=True):
        torch.testing.assert_close(picture, each, atol=1e-5, rtol=0)
    ink = image.mean(0)
    ink[:6, :6] = 0
    digit, square = (mask * ink).sum() / ink.sum(), mask[:6, :6].mean()
    assert f"image {index:,}: digit {split.digits[index]}, class {split.labels[index]}" in caption
    assert caption.endswith(f"hidden: {100 * square:.0f} % of the square, {100 * digit:.0f} % of the digit's ink")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group", "training, class 1, no square"),
        ("image", 3),
        ("method", "threshold"),
        ("param", 2.0),
        ("upsample", "bilinear"),
        ("grow", 5),
        ("configuration", NAMES[1]),
    ],
)
def test_every_control_changes_the_picture_in_one_drawing(play, monkeypatch, name, value):
    before, png, drawn = bytes(play.picture.value), play.panel.png, []
    monkeypatch.setattr(play.panel, "png", lambda: drawn.append(name) or png())
    (play.choice | play.own)[name].value = value
    after = bytes(play.picture.value)
    assert after.startswith(b"\x89PNG") and after != before
    assert drawn == [name]


def test_a_random_patch_is_another_one_for_another_image_and_the_same_for_the_same(play):
    play.own["method"].value, play.own["param"].value = "random", 0.3
    masks = []
    for image in (0, 1, 2, 0):
        play.choice["image"].value = image
        masks.append(shown(play)[1][2])
    assert torch.equal(masks[0], masks[3])
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


def test_the_slider_follows_the_method_and_the_rule_the_configuration(play):
    own = play.own
    assert [own[name].value for name in experiment.MASK] == ["mean", 0.9, "nearest", 2]
    assert own["configuration"].options == (NAMES[0], NAMES[1])
    for method, (low, high) in masking.PARAM_RANGES.items():
        own["method"].value = method
        assert (own["param"].min, own["param"].max) == (low, min(high, 10))
        assert own["param"].value == explorer.STARTS[method]
    own["configuration"].value = NAMES[1]
    assert [own[name].value for name in experiment.MASK] == ["top_k", 0.3, "bilinear", 0]
    assert play.load(NAMES[0])[1].cam == "GradCAM"


def test_images_are_chosen_by_group_and_by_the_base_model(play, splits, model):
    right = evaluation.predict(model, splits.raw).argmax(1) == splits.raw.labels
    for answer, label in (("right", 1), ("wrong", 0), ("right or wrong", 0)):
        play.choice["group"].value = f"raw test, class {label}, no square"
        play.choice["ERM is"].value = answer
        members = (splits.raw.labels == label) & ((answer == "right or wrong") | (right == (answer == "right")))
        assert [offer.index for offer in play.found] == members.nonzero()[:, 0].tolist()
        assert play.choice["image"].max == members.sum() - 1
    before = shown(play)[0]
    for _ in range(5):
        play.at_random()
    assert shown(play)[0] != before


def test_without_fine_tuned_models_there_are_no_columns_for_them(settings, splits, model):
    play = explorer.Explorer(settings, splits, model)
    play.start()
    _, pictures, class_0 = shown(play)
    assert "configuration" not in play.own and len(pictures) == 4 and len(class_0) == 2


def test_headless_there_are_pictures_and_no_widgets(settings, splits, model, monkeypatch):
    displayed = []
    monkeypatch.setattr(explorer, "widgets", None)
    monkeypatch.setattr(explorer.plotting, "display", displayed.append)
    explorer.explore(settings, "03_explorer", splits, model)
    explorer.explore(settings, "05_explorer", splits, model, NAMES)
    explorer.square_test(settings, "05_square", splits.raw, model, settings.checkpoint_path(NAMES[0]), stride=11)
    assert all(picture.data.startswith(b"\x89PNG") for picture in displayed) and len(displayed) == 4
    names = ["03_explorer", "05_explorer", "05_square", "05_square_map"]
    assert sorted(path.stem for path in settings.folder("figures").iterdir()) == names


def test_live_there_is_a_panel_and_no_picture_beside_it(settings, splits, model, monkeypatch):
    displayed = []
    monkeypatch.setattr(explorer.progress, "is_live", lambda: True)
    monkeypatch.setattr(explorer, "display", displayed.append)
    explorer.explore(settings, "03_explorer", splits, model)
    assert [type(box) for box in displayed] == [ipywidgets.VBox]
    assert not settings.folder("figures").exists()


def test_the_map_of_squares_equals_direct_evaluation(splits, model):
    some = splits.raw[(splits.raw.labels == 1).nonzero()[:20, 0]]
    values = explorer.square_map(model, some, 4, "red", stride=8)
    assert values.shape == (4, 4)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        images = some.images / 255
        images[:, :, 8 * row : 8 * row + 4, 8 * column : 8 * column + 4] = torch.tensor([1.0, 0, 0]).view(3, 1, 1)
        with torch.no_grad():
            expected = model(images).softmax(1)[:, 0].mean()
        torch.testing.assert_close(values[row, column], expected, atol=1e-5, rtol=0)


def test_the_square_test_shows_the_answers_to_a_square_anywhere(settings, splits, model):
    other = models.new_model(seed=1).eval()
    play = explorer.SquareTest(settings, splits.raw, {"ERM": model, "fine-tuned": other})
    play.start()
    index = (splits.raw.digits == 7).nonzero()[0]
    for name, value in {"row": 5, "column": 11, "size": 9, "colour": "#ff8000"}.items():
        before = bytes(play.picture.value)
        play.own[name].value = value
        assert bytes(play.picture.value) != before
    image = data.add_square(splits.raw.images[index], torch.tensor([True]), 9, "#ff8000", (5, 11))
    with torch.no_grad():
        expected = torch.cat([each(image / 255).softmax(1)[:, 0] for each in (model, other)])
    caption, (picture,), class_0 = shown(play)
    assert caption == f"raw test image {index.item()}: digit 7, class 1\n#ff8000 9×9, row 5, column 11"
    assert torch.equal(picture, image[0].permute(1, 2, 0))
    torch.testing.assert_close(class_0, expected, check_dtype=False, atol=1e-5, rtol=0)
