"""The audit of a classifier that looks at a bar; classifiers as files."""

import importlib
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from masktune_utils.choice import audit, hide
from masktune_utils.choice.audit import _halves, region_of
from masktune_utils.choice.chosen import as_region
from masktune_utils.choice.exchange import (
    ClassSwaps,
    Swaps,
    exchange_map,
    swap,
    swap_classes,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.models import from_onnx

BAR = (..., slice(20, 26))  # on the right
MEANS = """
<ir_version: 8, opset_import: ["": 13]>
means (float[batch, 3, 8, 8] x) => (float[batch, 3] y) {
    y = ReduceMean <axes = [2, 3], keepdims = 0> (x)
}
"""


def toy(mistakes):
    """A hundred images of noise; a bar is bright in class 1, and in some of 0."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(100, 3, 28, 28, generator=generator) / 2
    labels = torch.arange(100) % 2
    is_bright = labels == 1
    is_bright[: 2 * mistakes : 2] = True
    images[BAR][is_bright] = 1
    return Split(images.numpy(), labels.tolist(), class_names=("dark", "bright"))


def logits(images):
    bars = images[BAR]
    brightness = bars.mean((1, 2, 3))
    darkness = 1 - brightness
    return 5 * torch.stack([darkness, brightness], 1)


def test_an_audit_names_the_part_with_which_mistakes_move():
    """Half of the mistakes find it, the other half is counted."""
    images = toy(mistakes=12)
    found = audit(logits, images)
    assert found.found_by == "mistakes"
    assert found.region[BAR].all()
    assert found.region.float().mean() < 0.5
    counted = found.swaps.mistakes
    assert len(counted) == 6
    assert len(found.swaps.moving) == 6
    others = found.predicted.clone()
    others[counted] = images.labels[counted]
    of_others = exchange_map(logits, images, others)
    assert torch.equal(found.maps["mistakes"], of_others)
    assert [len(swaps.moving) for swaps, _ in found.elsewhere] == [0, 0, 0, 0]
    lines = found.reason.splitlines()
    assert lines[0] == "Accuracy: 88.0%; mistakes: 12 of 100."
    assert lines[1].startswith("If the top right (")
    assert "6 of 6 mistakes move with it; with the other places 0." in lines
    assert lines[-1] == "Is your class about this part? If not, hide it."


def test_a_classifier_at_chance_is_called_so():
    found = audit(lambda images: -logits(images), toy(mistakes=12), place=(0, 0, 1, 1))
    lines = found.reason.splitlines()
    assert lines[0] == "Accuracy: 12.0%; mistakes: 88 of 100."
    assert lines[1].startswith("One class for all images would be right as often.")
    assert lines[1].endswith("in this order: dark, bright?")


def test_without_mistakes_a_place_is_found_by_what_predictions_rely_on():
    found = audit(logits, toy(mistakes=0))
    assert found.found_by == "reliance"
    assert found.region[BAR].all()
    assert found.class_swaps.worst == 0  # each prediction follows the bar
    assert found.class_swaps.changed == 1
    for _, elsewhere in found.elsewhere:
        assert elsewhere.changed < 0.5
    assert not len(found.swaps.mistakes)
    assert "mistakes move" not in found.reason
    assert found.reason.splitlines()[2:4] == [
        (
            "and 100% of the right predictions change. With this shape at four other "
            "places: 44 to 100%,"
        ),
        "and 0 to 28% change.",
    ]


@pytest.mark.parametrize(
    ("mistakes", "reliance", "expected"),
    [(10, 9, "reliance"), (9, 10, "mistakes"), (16, 17, "mistakes"), (17, 18, "")],
)
def test_of_both_places_the_smaller_is_proposed(
    mistakes, reliance, expected, monkeypatch
):
    """None is larger than half of the image: 19×19 pixels, with what is around."""
    module = importlib.import_module("masktune_utils.choice.audit")
    for kind, side in {"exchange_map": mistakes, "reliance_map": reliance}.items():
        values = torch.zeros(28, 28)
        values[:side, :side] = 1
        monkeypatch.setattr(module, kind, lambda *_, values=values: values)
    found = audit(logits, toy(mistakes=12))
    assert found.found_by == expected
    assert found.region.any() == bool(expected)


def test_fewer_than_five_mistakes_in_a_half_find_no_place():
    """Then all of them are counted."""
    found = audit(logits, toy(mistakes=8))
    assert found.found_by == "reliance"
    assert len(found.swaps.mistakes) == 8
    assert audit(logits, toy(mistakes=10)).found_by == "mistakes"


def test_a_place_is_where_a_map_is_above_half_of_its_maximum_and_around():
    values = torch.zeros(28, 28)
    values[14, 14:17] = torch.tensor([1, 0.6, 0.4])
    values[4, 20] = -2
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[11:18, 11:19] = True
    assert torch.equal(region_of(values, (28, 28)), expected)


def test_each_half_has_as_many_mistakes_of_each_kind():
    labels = torch.tensor([0, 1, 0, 1, 0, 2, 0, 2, 0])
    predicted = torch.tensor([1, 0, 1, 0, 2, 0, 2, 0, 0])
    halves = _halves(labels, predicted)
    for half in halves:
        kinds = torch.stack([labels, half], 1)[half != labels]
        assert sorted(kinds.tolist()) == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert torch.equal(sum(halves), labels + predicted)


def test_the_seed_decides_from_which_images_a_place_comes():
    images = toy(mistakes=12)

    def of_seed(seed):
        found = audit(logits, images, seed)
        return {
            **found.maps,
            "swaps": found.swaps.partners,
            "classes": found.class_swaps.by_class,
            "hidden": found.hide(images, seed=seed).masked.partners,
        }

    first, same, other = map(of_seed, (1, 1, 3))
    for name, values in first.items():
        assert torch.equal(values, same[name]), name
        assert not torch.equal(values, other[name]), name


ALL = slice(None)
EYE = torch.eye(16, dtype=torch.bool).repeat_interleave(2, 1)


@pytest.mark.parametrize("bar", [(ALL, slice(6, 8)), (slice(6, 8), ALL), EYE])
def test_no_other_place_of_a_thin_bar_is_on_the_bar(bar):
    """Be it upright, level or diagonal, in images that are wider than high."""
    region = torch.zeros(16, 32, dtype=torch.bool)
    region[bar] = True
    labels = torch.arange(20) % 2
    images = Split(region * labels[:, None, None, None].float(), labels)

    def of_bar(images):
        brightness = images[..., region].mean((1, 2))
        return torch.stack([0.5 - brightness, brightness - 0.5], 1)

    found = audit(of_bar, images, place=region)
    assert found.class_swaps.changed == 1
    assert [classes.changed for _, classes in found.elsewhere] == [0, 0, 0, 0]


@pytest.mark.parametrize(("right", "moves"), [(0, True), (1, False)])
def test_a_mistake_moves_only_if_the_other_image_is_mistaken_for_the_same_class(
    right, moves
):
    """Two images of two pixels: the left one is swapped, the right one is not."""
    pixels = torch.tensor([[1.0, 0], [0, right]]).view(2, 1, 1, 2)

    def classify(images):
        left, right = images[:, 0, 0].long().T
        return nn.functional.one_hot(left + left * right, 3)

    split = Split(pixels, [0, 0])
    masked = MaskedDataset(split, torch.tensor([[[True, False]]] * 2))
    swaps = swap(classify, masked, torch.tensor([1, 0]))
    assert (swaps.moves == moves).all()


def test_a_mistake_moves_that_does_so_in_half_of_the_swaps():
    moves = torch.tensor([[True, True], [True, False], [False, False], [False, False]])
    swaps = Swaps(torch.tensor([4, 7]), torch.zeros(4, 2), moves)
    assert swaps.moving.tolist() == [4]


def test_what_depends_on_a_place_is_what_plain_code_finds():
    """Three classes; of each, the harder one of the other two."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(90, 3, 4, 4, generator=generator)
    labels = torch.arange(90) % 3
    split = Split(images, labels)
    region = torch.zeros(4, 4, dtype=torch.bool)
    region[0, :2] = True

    def classify(images):
        return torch.stack([images[:, k, 0, k] for k in range(3)], 1)

    predicted = classify(images).argmax(1)
    found = swap_classes(classify, split, region, predicted, seed=2)
    random = torch.Generator().manual_seed(2)
    harder = []
    changed = []
    for label in range(3):
        members = (labels == label).nonzero()[:, 0].repeat(2)  # sixty
        shares = []
        for other in range(3):
            if other == label:
                continue
            donors = (labels == other).nonzero()[:, 0]
            drawn = donors[torch.randint(30, (60,), generator=random)]
            swapped = images[members].clone()
            swapped[:, :, 0, :2] = images[drawn][:, :, 0, :2]
            right = classify(swapped).argmax(1) == label
            shares.append(right.float().mean().item())
            changed += (~right[predicted[members] == label]).tolist()
        harder.append(min(shares))
    np.testing.assert_allclose(found.by_class, harder)
    assert found.classes.tolist() == [0, 1, 2]
    assert found.swaps.tolist() == [60, 60, 60]
    assert found.changed == pytest.approx(np.mean(changed))


def test_of_many_classes_the_harder_half_counts():
    """Of class 7 and three others, without its own column."""
    accuracy = torch.full((4, 4), 0.9)
    accuracy[2] = torch.tensor([0.4, 0.8, torch.nan, 0.2])
    swaps = torch.full((4,), 60)
    found = ClassSwaps(torch.tensor([1, 4, 7, 9]), accuracy, swaps, changed=0.5)
    assert found.worst == pytest.approx(0.3)
    assert found.worst_class == 7
    assert found.error == pytest.approx((0.3 * 0.7 / 60) ** 0.5)


def test_a_place_that_a_person_points_at_is_measured_and_hidden():
    images = toy(mistakes=6)
    place = (20 / 28, 0, 26 / 28, 1)
    found = audit(logits, images, place=place)
    assert found.found_by == "you"
    assert not found.maps
    expected = torch.zeros(28, 28, dtype=torch.bool)
    expected[BAR] = True
    assert torch.equal(found.region, expected)
    for again in (expected, expected.numpy(), torch.tensor(place)):
        assert audit(logits, images, place=again).reason == found.reason
    choice = found.hide(images)
    assert choice.reason == "By hand: the top right (21% of the image) is hidden."
    hidden, _ = choice.masked.batch(slice(None))
    partners = images.images[choice.masked.partners]
    assert torch.equal(hidden, torch.where(expected, partners, images.images))

    def schedule(network, masked):
        network.bias.data += len(masked)
        return network

    network = nn.Linear(1, 1)
    bias = network.bias.item()
    tuned = hide(images, place, schedule).finetune(network)
    assert tuned.bias.item() == pytest.approx(bias + 100)
    assert not tuned.training
    assert network.bias.item() == bias
    with pytest.raises(ValueError, match="name is 'a'; allowed: ERM"):
        choice.take("a")
    kept = choice.take("ERM")
    assert kept.keeps_erm
    assert kept.finetune(network).bias.item() == bias
    as_they_are, _ = kept.masked.batch(slice(None))
    assert torch.equal(as_they_are, images.images)


@pytest.mark.parametrize(
    "place",
    [
        (0.5, 0, 0.5, 1),
        (0, 0, 1, 1.2),
        (-0.1, 0, 1, 1),
        (0, 1),
        (),
        0.5,
        torch.zeros(28, 28),
        torch.ones(4, 4),
    ],
)
def test_what_is_no_place_is_refused(place):
    images = toy(mistakes=6)
    for step in (partial(audit, logits, images), partial(hide, images)):
        with pytest.raises(ValueError, match=r"the place is .*; allowed: left, top"):
            step(place=place)


def test_the_edges_of_a_place_are_rounded():
    region = as_region((0, 0, 0.35, 1), (10, 10))  # to 3.5 pixels, or 4
    assert region.sum() == 40


def test_an_audit_takes_probabilities_of_a_network_as_well():
    class Network(nn.Module):  # which has no weights
        def forward(self, images):
            return logits(images).softmax(1)

    images = toy(mistakes=6)
    found = audit(Network(), images)
    assert found.reason == audit(logits, images).reason


def test_what_is_no_classifier_and_no_images_are_refused():
    images = toy(mistakes=4)
    with pytest.raises(ValueError, match="predicts 1 classes; allowed: the 2 of the"):
        audit(lambda images: logits(images)[:, :1], images)
    with pytest.raises(TypeError, match="allowed: logits, a tensor N×classes"):
        audit(lambda _: np.ones((100, 2)), images)
    with pytest.raises(TypeError, match="the images are a list; allowed: a Split"):
        audit(logits, [*images])
    with pytest.raises(ValueError, match=r"are \[0\]; allowed: 2 or more"):
        audit(logits, images[::2])


def test_a_classifier_that_looks_at_nothing_is_said_to_have_no_region():
    found = audit(lambda images: torch.ones(len(images), 2), toy(6), np.int64(0))
    assert found.found_by == ""
    assert "No map points at a place of at most 50% of the image." in found.reason


def test_a_classifier_is_read_from_a_file_or_refused_by_its_name(tmp_path):
    onnx = pytest.importorskip("onnx")
    path = tmp_path / "network.onnx"
    model = onnx.parser.parse_model(MEANS)
    onnx.save(model, path)
    mean = [0.5, 0, 0]
    std = np.array([2, 1, 1])
    classify = from_onnx(path, 8, mean, std)
    white = torch.ones(1, 3, 8, 8)
    expected = torch.tensor([[0.25, 1, 1]])
    for images in (white, white.double()):
        torch.testing.assert_close(classify(images), expected)

    def refuse(size, reason):
        words = rf"network\.onnx does not classify images of 3×{size}×{size} \("
        with pytest.raises(ValueError, match=f"(?s){words}.*{reason}"):
            from_onnx(path, size, mean, std)

    refuse(9, "Expected: 8")
    fixed = MEANS.replace("batch", "1")
    onnx.save(onnx.parser.parse_model(fixed), path)
    refuse(8, "Expected: 1")
    reduced = MEANS.replace("y =", "each =").replace(
        "(x)\n", "(x)\n    y = ReduceMean <axes = [0], keepdims = 1> (each)\n"
    )
    onnx.save(onnx.parser.parse_model(reduced), path)
    refuse(8, r"2 images give \(1, 3\)")
    path.write_bytes(b"no network")
    refuse(8, "Protobuf")
    path.unlink()
    refuse(8, "File doesn't exist")
