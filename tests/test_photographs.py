"""Folders of photographs: images, groups, networks of torchvision, and what is refused."""

import copy
import dataclasses
import os
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from masktune_utils import (
    data,
    evaluation,
    experiment,
    images,
    masking,
    models,
    results,
    saliency,
    shortcuts,
    store,
    training,
)
from masktune_utils.settings import Settings


def save(
    path: Path, color: object, mode: str = "RGB", size: tuple[int, int] = (40, 30)
) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return str(path)


def decode(*paths: str, side: int = 8) -> torch.Tensor:
    return images.decode(paths, side, Path(paths[0]).parent / "decoded")


@pytest.fixture
def photographs(tmp_path) -> Settings:
    """Two classes; in training without groups, in testing with one that only one of them has."""
    rng = np.random.default_rng(0)
    for path, count in {
        "train/Sumpf vögel": 12,
        "train/陸": 10,
        "test/Sumpf vögel/on water": 3,
        "test/Sumpf vögel/on land": 2,
        "test/陸/on land": 4,
    }.items():
        (tmp_path / path).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 256, (50, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / path / f"{k} é.png")
    folders = {f"{part}_folder": str(tmp_path / part) for part in ("train", "test")}
    more = {"epochs": 1, "batch_size": 4, "directory": str(tmp_path / "out")}
    return Settings(
        dataset="folder", **folders, model="resnet18", image_size=64, **more
    )


def test_groups_are_the_folders_below_the_classes(photographs):
    sets = shortcuts.load(photographs)
    assert {name: len(part) for name, part in sets.tests.items()} == {"test": 9}
    groups = {
        name: index.tolist() for name, index in shortcuts.groups(sets.raw).items()
    }
    assert groups == {
        "Sumpf vögel, on land": [0, 1],
        "Sumpf vögel, on water": [2, 3, 4],
        "陸, on land": [5, 6, 7, 8],
    }
    assert [*shortcuts.groups(sets.train)] == ["Sumpf vögel", "陸"]
    assert [*shortcuts.groups(sets.raw[5:])] == ["陸, on land"]


def test_a_limit_takes_equally_many_images_of_each_class_and_of_each_group_to_test_on(
    photographs,
):
    sets = shortcuts.load(photographs.replace(limit=20))
    assert sets.train.labels.bincount().tolist() == [10, 10]
    groups = shortcuts.groups(sets.raw)
    assert len(groups) == 3 and {len(index) for index in groups.values()} == {2}


def test_one_test_set_is_reported_by_group_and_nothing_is_raw_or_biased(photographs):
    sets = shortcuts.load(photographs)
    base = experiment.base_model(photographs, sets.train)
    row = experiment.record(base, sets)
    right = (evaluation.predict(base.model, sets.raw).argmax(1) == sets.raw.labels).double()
    assert row["test"] == right.mean().item() and not {"raw", "biased"} & row.keys()
    for name, index in shortcuts.groups(sets.raw).items():
        assert row[f"group {name}"] == right[index].mean().item()
    assert row["worst_group"] == min(row["metrics"]["groups"].values())
    table = results.summarize(results.collect(photographs.directory))
    assert [*table.columns] == ["test", "worst group", "seeds"]
    again, _ = store.load_checkpoint(photographs.checkpoint_path("base"))
    expected = evaluation.predict(base.model, sets.raw)
    assert torch.equal(evaluation.predict(again, sets.raw), expected)


def test_a_model_may_be_tested_on_other_photographs(photographs):
    sets = shortcuts.load(photographs)
    base = experiment.base_model(photographs, sets.train)
    other = dataclasses.replace(photographs, test_folder=photographs.train_folder)
    again = experiment.base_model(other, sets.train)
    assert again.seconds is None and again.sha256 == base.sha256
    row = experiment.record(again, shortcuts.load(other))
    assert {name for name in row if name.startswith("group ")} == {"group Sumpf vögel", "group 陸"}


def test_dropout_draws_from_the_seed():
    images, labels = torch.rand(8, 3, 64, 64), torch.arange(8) % 2
    found = set()
    for k in range(2):
        torch.manual_seed(
            k
        )  # what others did with the global generator has no influence
        model = models.new_model(0, name="mobilenet_v3_small")
        training.train(model, data.Split(images, labels), epochs=1, batch_size=4)
        found.add(store.weights_sha256(model.state_dict()))
    assert len(found) == 1


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGBA", (255, 0, 0, 9), "png", [255, 0, 0]),
        ("LA", (200, 9), "png", [200] * 3),
        ("1", 1, "png", [255] * 3),
        ("I;16", 65535, "png", [255] * 3),
        ("I;16", 32768, "tif", [128] * 3),
        ("CMYK", (0, 255, 255, 0), "tif", [255, 0, 0]),
    ],
)
def test_every_mode_becomes_rgb(mode, color, suffix, expected, tmp_path):
    path = save(tmp_path / f"a.{suffix}", color, mode)
    assert decode(path)[0, :, 3, 3].tolist() == expected


def test_the_first_picture_of_an_animation_and_the_turn_of_a_camera(tmp_path):
    first, second = (Image.new("RGB", (20, 20), color) for color in ("red", "blue"))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    turned, exif = Image.new("RGB", (40, 40), "red"), Image.Exif()
    turned.paste("blue", (0, 0, 40, 20))
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "b.jpg", exif=exif, quality=100)
    images = decode(str(tmp_path / "a.gif"), str(tmp_path / "b.jpg"))
    assert images[0, :, 3, 3].tolist() == [255, 0, 0]
    assert images[1, 0, 1, 3] > 250 and images[1, 2, 6, 3] > 250


def test_the_first_ten_broken_files_are_named_and_all_are_counted(tmp_path):
    paths = [save(tmp_path / f"{k:02}.png", "red") for k in range(20)]
    for path in paths[3:15]:
        os.truncate(path, 60)
    with pytest.raises(ValueError, match="12 of 20 images cannot be read") as error:
        decode(*paths)
    named = [path for path in paths if path in str(error.value)]
    assert named == paths[3:13]
    assert not list((tmp_path / "decoded").iterdir())


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", "red")
    first = decode(path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_read", None)
        assert torch.equal(decode(path), first)
    save(tmp_path / "a.png", "blue", size=(41, 30))
    assert decode(path)[0, :, 3, 3].tolist() == [0, 0, 255]
    for file in (tmp_path / "decoded").iterdir():
        os.truncate(file, 150)
    with pytest.raises(ValueError, match=r"npy is damaged \(.*\)\. Delete it"):
        decode(path)


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", "red")
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("", (), {"free": 10}))
    with pytest.raises(OSError, match=r"decoded has no room for 192 bytes of images"):
        decode(path)
    assert not list((tmp_path / "decoded").iterdir())


def test_images_in_a_file_give_the_same_as_in_memory(photographs, monkeypatch):
    found = []
    for limit in (images.IN_MEMORY, 0):
        monkeypatch.setattr(images, "IN_MEMORY", limit)
        monkeypatch.setattr(data, "IN_MEMORY", limit)
        sets = shortcuts.load(photographs)
        model = models.new_model(0, **photographs.network)
        history = training.train(model, sets.train, epochs=1, batch_size=4)
        maps = saliency.saliency_maps(model, sets.train.images, sets.train.labels)
        masked = masking.mask_dataset(
            sets.train, maps, "mean_std", 1.0, fill="resample"
        )
        found.append((history[0]["loss"], maps, masked.batch(torch.arange(3))[0]))
    assert found[0][0] == found[1][0]
    assert all(
        torch.equal(*pair) for pair in zip(found[0][1:], found[1][1:], strict=True)
    )
    with pytest.raises(
        ValueError, match=r"validation_share is 0\.2; allowed: 0 for more than"
    ):
        shortcuts.load(photographs.replace(validation_share=0.2))


@pytest.mark.parametrize(
    "name", ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "swin_t"]
)
def test_networks_of_torchvision_are_explained_one_by_one_as_in_batches(name, monkeypatch):
    """In float64, since a small network's map may amplify the rounding of float32."""
    find = models.target_layer

    def target_layer(model, shape):
        single = copy.deepcopy(model).float()  # torchcam looks for the layer in float32
        names = {layer: layer_name for layer_name, layer in single.named_modules()}
        return model.get_submodule(names[find(single, shape)])

    monkeypatch.setattr(models, "target_layer", target_layer)
    torch.manual_seed(0)
    images, labels = torch.rand(6, 3, 96, 96), torch.arange(6) % 3
    model = models.new_model(0, num_classes=3, name=name).double()
    images = images.double()
    maps = saliency.saliency_maps(model, images, labels)
    assert min(maps.shape[1:]) >= 2 and 0.5 < maps.amax() <= 1
    alone = [
        saliency.saliency_maps(model, images[k : k + 1], labels[k : k + 1])
        for k in range(6)
    ]
    torch.testing.assert_close(torch.cat(alone), maps, rtol=0, atol=1e-6)


def test_weights_for_other_classes_are_loaded_but_for_the_last_layer(tmp_path):
    known, path = (
        models.new_model(1, num_classes=10, name="resnet18")[1],
        tmp_path / "weights.pth",
    )
    torch.save(known.state_dict(), path)
    model = models.new_model(0, num_classes=2, name="resnet18", weights=str(path))[1]
    own = models.new_model(0, num_classes=2, name="resnet18")[1]
    assert torch.equal(model.conv1.weight, known.conv1.weight)
    assert torch.equal(model.fc.weight, own.fc.weight) and model.fc.out_features == 2
    same = models.new_model(0, num_classes=10, name="resnet18", weights=str(path))[1]
    assert torch.equal(same.fc.weight, known.fc.weight)
    with pytest.raises(
        ValueError, match=r"weights.pth: no weights of resnet34 \(.*; allowed: DEF"
    ):
        models.new_model(0, name="resnet34", weights=str(path))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no weights of resnet18"):
        models.new_model(0, name="resnet18", weights=str(path))


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: "/nowhere")
    with pytest.raises(
        ValueError, match=r"weights are DEFAULT: no weights of resnet18 .*network"
    ):
        models.new_model(0, name="resnet18", weights="DEFAULT")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            (96, "resnet", ""),
            "model is 'resnet'; allowed: small_cnn, alexnet, .*resnet18",
        ),
        ((96, "googlenet", ""), "model is 'googlenet'; allowed: small_cnn, alexnet"),
        ((96, "small_cnn", ""), "image_size is 96; allowed: 28 with small_cnn"),
        ((16, "convnext_tiny", ""), "image_size is 16; allowed: 28 with small_cnn"),
        (
            (96, "vit_b_16", ""),
            r"image_size is 96; .*\(Wrong image height! Expected 224",
        ),
        ((8, "alexnet", ""), "image_size is 8; allowed: 28 with small_cnn"),
    ],
)
def test_networks_that_do_not_exist_or_do_not_fit_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        models.check(*given)


def test_the_size_of_digits_is_fixed():
    with pytest.raises(
        ValueError, match="image_size is 96; allowed: 28, except with dataset"
    ):
        Settings(image_size=96)


class Spy(torch.nn.Module):
    """Keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(2, 1)), []

    def forward(self, images):
        self.seen += [*images]
        return images.mean((1, 2, 3))[:, None] @ self.weight.T


def test_flip_mirrors_half_of_the_images(splits):
    spy, few = Spy(), splits.train[:100]
    training.train(spy, few, epochs=1, batch_size=25, flip=True)
    originals = data.to_float(few.images)
    mirrored = 0
    for image in spy.seen:
        same, turned = (
            (originals == one).flatten(1).all(1).any()
            for one in (image, image.flip(-1))
        )
        assert same or turned
        mirrored += not same
    assert len(spy.seen) == 100 and 30 < mirrored < 70


def test_dilation_grows_with_the_side():
    mask = torch.zeros(56, 56)
    mask[20, 20] = 1
    wide = masking.image_masks(mask, (56, 56), "threshold", 0.5, "nearest", 3)
    assert wide.sum() == 13**2 and wide[14:27, 14:27].all()
