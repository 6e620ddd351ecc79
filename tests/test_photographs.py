"""Folders of photographs: images, groups, and networks of torchvision."""

import copy
import os
import shutil
import urllib.error
from pathlib import Path

import pytest
import torch
from conftest import write_photographs
from PIL import Image

from masktune_utils import (
    data,
    datasets,
    experiment,
    images,
    masking,
    metrics,
    models,
    results,
    saliency,
    shortcuts,
    store,
    training,
)
from masktune_utils.settings import Settings


def save(path: Path, color: object, mode: str = "RGB", width: int = 40) -> str:
    """A picture of one colour; returns its path."""
    Image.new(mode, (width, 30), color).save(path)
    return str(path)


def decode(*paths: str) -> torch.Tensor:
    return images.decode(paths, 8, Path(paths[0]).parent / "decoded")


@pytest.fixture
def photographs(tmp_path) -> Settings:
    """Two classes, to test on with groups, of which one is in one of them only."""
    counts = {
        "train/Sumpf vögel": 12,
        "train/陸": 10,
        "test/Sumpf vögel/on water": 3,
        "test/Sumpf vögel/on land": 2,
        "test/陸/on land": 4,
    }
    return Settings(
        **write_photographs(tmp_path, counts),
        model="resnet18",
        image_size=64,
        epochs=1,
        batch_size=4,
        directory=str(tmp_path / "out"),
    )


def test_groups_are_the_folders_below_the_classes(photographs):
    sets = datasets.load(photographs)
    assert [*sets.tests] == ["test"]
    assert len(sets.tests["test"]) == 9
    groups = shortcuts.groups(sets.raw)
    assert {name: index.tolist() for name, index in groups.items()} == {
        "Sumpf vögel, on land": [0, 1],
        "Sumpf vögel, on water": [2, 3, 4],
        "陸, on land": [5, 6, 7, 8],
    }
    assert [*shortcuts.groups(sets.train)] == ["Sumpf vögel", "陸"]
    assert [*shortcuts.groups(sets.raw[5:])] == ["陸, on land"]


def test_a_limit_takes_equally_many_images_of_each_class_and_group(photographs):
    sets = datasets.load(photographs.replace(limit=20))
    assert sets.train.labels.bincount().tolist() == [10, 10]
    groups = shortcuts.groups(sets.raw)
    assert [len(index) for index in groups.values()] == [2, 2, 2]


def test_one_test_set_is_reported_by_group_and_nothing_is_raw_or_biased(photographs):
    sets = datasets.load(photographs)
    base = experiment.base_model(photographs, sets.train)
    row = experiment.record(base, sets)
    logits = metrics.predict(base.model, sets.raw)
    is_right = (logits.argmax(1) == sets.raw.labels).double()
    assert row["test"] == is_right.mean().item()
    assert not {"raw", "biased"} & row.keys()
    for name, index in shortcuts.groups(sets.raw).items():
        assert row[f"group {name}"] == is_right[index].mean().item()
    assert row["worst_group"] == min(row["metrics"]["groups"].values())
    table = results.summarize(results.collect(photographs.directory))
    assert [*table.columns] == ["test", "worst group", "seeds"]
    again = store.load_checkpoint(photographs.checkpoint_path("base")).model
    assert torch.equal(metrics.predict(again, sets.raw), logits)


def test_a_model_may_be_tested_on_other_photographs(photographs):
    train = datasets.load(photographs).train
    base = experiment.base_model(photographs, train)
    other = photographs.replace(test_folder=photographs.train_folder)
    again = experiment.base_model(other, train)
    assert again.seconds is None
    assert again.sha256 == base.sha256
    row = experiment.record(again, datasets.load(other))
    groups = [name for name in row if name.startswith("group ")]
    assert groups == ["group Sumpf vögel", "group 陸"]


@pytest.mark.parametrize("change", ["other image", "another image", "another class"])
def test_a_model_of_other_training_images_is_refused(photographs, change):
    train = Path(photographs.train_folder)
    experiment.base_model(photographs, datasets.load(photographs).train)
    first = next(iter(sorted(train.rglob("*.png"))))
    if change == "other image":
        save(first, "red")
    elif change == "another image":
        shutil.copy(first, first.with_stem("new"))
    else:
        (train / "z").mkdir()
        shutil.copy(first, train / "z")
        shutil.copytree(train / "z", Path(photographs.test_folder) / "z" / "on land")
    message = "was made with train_images = '22 files, .*', not '2[23] files"
    with pytest.raises(store.CheckpointError, match=message):
        experiment.base_model(photographs, datasets.load(photographs).train)


def test_a_model_of_another_file_of_weights_is_refused(photographs, tmp_path):
    path = tmp_path / "weights.pth"
    settings = None
    for seed in (0, 1):
        torch.save(models.new_model(seed, name="resnet18")[1].state_dict(), path)
        settings = settings or photographs.replace(weights=str(path))
        train = datasets.load(settings).train
        if seed == 0:
            experiment.base_model(settings, train)
    with pytest.raises(store.CheckpointError, match="was made with weights_file = "):
        experiment.base_model(settings, train)


def test_a_finished_model_of_downloaded_weights_is_opened_offline(
    photographs, monkeypatch
):
    settings = photographs.replace(weights="DEFAULT")
    weights = models.build("resnet18", 1000)[1].state_dict()
    asked = []

    def online(name, weights_name):
        asked.append((name, weights_name))
        return weights

    def offline(name, weights_name):
        raise OSError(f"no network for {weights_name} of {name}")

    train = datasets.load(settings).train
    monkeypatch.setattr(store, "_read_weights", online)
    base = experiment.base_model(settings, train)
    assert asked == [("resnet18", "DEFAULT")]
    monkeypatch.setattr(store, "_read_weights", offline)
    again = experiment.base_model(settings, train)
    assert again.sha256 == base.sha256
    assert again.seconds is None
    with pytest.raises(ValueError, match="weights are DEFAULT: no weights of resnet18"):
        experiment.base_model(settings, train, retrain=True)


def test_dropout_draws_from_the_seed():
    split = data.Split(torch.rand(8, 3, 64, 64), torch.arange(8) % 2)
    hashes = set()
    for global_seed in range(2):  # which has no influence
        torch.manual_seed(global_seed)
        model = models.new_model(0, name="mobilenet_v3_small")
        training.train(model, split, epochs=1, batch_size=4)
        hashes.add(store.weights_sha256(model.state_dict()))
    assert len(hashes) == 1


@pytest.mark.parametrize(
    ("mode", "color", "suffix", "expected"),
    [
        ("RGBA", (255, 0, 0, 9), "png", [255, 0, 0]),
        ("LA", (200, 9), "png", [200] * 3),
        ("1", 1, "png", [255] * 3),
        ("I;16", 65535, "png", [255] * 3),
        ("I;16", 32768, "tif", [128] * 3),
        ("I;16B", 32768, "tif", [128] * 3),
        ("CMYK", (0, 255, 255, 0), "tif", [255, 0, 0]),
    ],
)
def test_every_mode_becomes_rgb(mode, color, suffix, expected, tmp_path):
    path = save(tmp_path / f"a.{suffix}", color, mode)
    assert decode(path)[0, :, 3, 3].tolist() == expected


def test_the_first_picture_of_an_animation_is_read(tmp_path):
    path = tmp_path / "a.gif"
    first = Image.new("RGB", (20, 20), "red")
    second = Image.new("RGB", (20, 20), "blue")
    first.save(path, save_all=True, append_images=[second])
    assert decode(str(path))[0, :, 3, 3].tolist() == [255, 0, 0]


def test_a_picture_is_turned_as_its_camera_was(tmp_path):
    path = tmp_path / "b.jpg"
    image = Image.new("RGB", (40, 40), "red")
    image.paste("blue", (0, 0, 40, 20))
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image.save(path, exif=exif, quality=100)
    (decoded,) = decode(str(path))
    red, _, blue = decoded
    assert red[1, 3] > 250
    assert blue[6, 3] > 250


def test_the_first_ten_broken_files_are_named_and_all_are_counted(tmp_path):
    paths = [save(tmp_path / f"{k:02}.png", "red") for k in range(20)]
    for path in paths[3:15]:
        os.truncate(path, 60)
    with pytest.raises(ValueError, match="12 of 20 images cannot be read") as error:
        decode(*paths)
    named = [path for path in paths if path in str(error.value)]
    assert named == paths[3:13]
    assert not list((tmp_path / "decoded").rglob("*.npy"))


def test_images_are_decoded_once_and_again_when_a_file_changes(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png", "red")
    first = decode(path)
    with monkeypatch.context() as patch:
        patch.setattr(Image, "open", None)
        assert torch.equal(decode(path), first)
    save(tmp_path / "a.png", "blue")
    assert decode(path)[0, :, 3, 3].tolist() == [0, 0, 255]
    assert len([*(tmp_path / "decoded").rglob("output.pkl")]) == 1


def test_the_decoded_images_of_another_folder_are_kept(tmp_path, monkeypatch):
    paths = []
    for name in ("train", "test"):
        (tmp_path / name).mkdir()
        paths.append(save(tmp_path / name / "a.png", "red"))
        images.decode(paths[-1:], 8, tmp_path / "decoded")
    monkeypatch.setattr(Image, "open", None)
    for path in paths:
        images.decode([path], 8, tmp_path / "decoded")


@pytest.mark.filterwarnings("ignore:Exception while loading results")
def test_damaged_decoded_images_are_decoded_again(tmp_path):
    path = save(tmp_path / "a.png", "red")
    first = decode(path).clone()
    for file in (tmp_path / "decoded").rglob("output.pkl"):
        os.truncate(file, 150)
    assert torch.equal(decode(path), first)


NETWORKS = ["resnet18", "mobilenet_v3_small", "densenet121", "squeezenet1_1", "swin_t"]


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_of_torchvision_are_explained_one_by_one_as_in_batches(
    name, monkeypatch
):
    """In float64, since a small network's map may amplify the rounding of float32."""
    find = models.target_layer

    def target_layer(model, shape, layer):
        # torchcam looks for the layer in float32
        single = copy.deepcopy(model).float()
        layer = find(single, shape, layer)
        names = {module: name for name, module in single.named_modules()}
        return model.get_submodule(names[layer])

    monkeypatch.setattr(models, "target_layer", target_layer)
    generator = torch.Generator().manual_seed(0)
    pictures = torch.rand(6, 3, 96, 96, generator=generator).double()
    labels = torch.arange(6) % 3
    model = models.new_model(0, num_classes=3, name=name).double()
    maps = saliency.saliency_maps(model, pictures, labels)
    assert min(maps.shape[1:]) >= 2
    assert 0.5 < maps.amax() <= 1
    alone = saliency.saliency_maps(model, pictures, labels, batch_size=1)
    torch.testing.assert_close(alone, maps, rtol=0, atol=1e-6)


def with_weights(name: str, weights: str, num_classes: int = 2) -> torch.nn.Module:
    model = models.new_model(0, num_classes=num_classes, name=name)
    store.load_weights(model, name, weights)
    return model[1]


def test_weights_for_other_classes_are_loaded_but_for_the_last_layer(tmp_path):
    path = tmp_path / "weights.pth"
    source = models.new_model(1, num_classes=10, name="resnet18")[1]
    torch.save(source.state_dict(), path)
    options = {"name": "resnet18", "num_classes": 2}
    random = models.new_model(0, **options)[1]
    loaded = with_weights(**options, weights=str(path))
    assert torch.equal(loaded.conv1.weight, source.conv1.weight)
    assert torch.equal(loaded.fc.weight, random.fc.weight)
    assert loaded.fc.out_features == 2
    options["num_classes"] = 10
    loaded = with_weights(**options, weights=str(path))
    assert torch.equal(loaded.fc.weight, source.fc.weight)


def test_weights_that_cannot_be_read_are_refused(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(models.build("resnet18", 2)[1].state_dict(), path)
    message = r"weights\.pth: no weights of resnet34 \(.*; allowed: DEFAULT"
    with pytest.raises(ValueError, match=message):
        with_weights(name="resnet34", weights=str(path))
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="no weights of resnet18"):
        with_weights(name="resnet18", weights=str(path))


def test_weights_that_cannot_be_downloaded(monkeypatch, tmp_path):
    def offline(*_arguments, **_options):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    message = "weights are DEFAULT: no weights of resnet18 .*network"
    with pytest.raises(ValueError, match=message):
        with_weights(name="resnet18", weights="DEFAULT")


@pytest.mark.parametrize(
    ("image_size", "name", "message"),
    [
        (96, "resnet", "model is 'resnet'; allowed: small_cnn, alexnet, .*resnet18"),
        (96, "googlenet", "model is 'googlenet'; allowed: small_cnn, alexnet"),
        (96, "small_cnn", "image_size is 96; allowed: 28 with small_cnn"),
        (16, "convnext_tiny", "image_size is 16; allowed: 28 with small_cnn"),
        (
            32,
            "convnext_tiny",
            r"image_size is 32; .*\(the layer gives N×1×1×768",
        ),
        (96, "vit_b_16", r"image_size is 96; .*\(Wrong image height! Expected 224"),
        (8, "alexnet", "image_size is 8; allowed: 28 with small_cnn"),
    ],
)
def test_networks_that_do_not_exist_or_do_not_fit_are_refused(
    image_size, name, message
):
    with pytest.raises(ValueError, match=message):
        experiment.map_size(image_size, name, "")


def test_weights_of_torchvision_are_checked_without_a_download(monkeypatch):
    monkeypatch.setattr(store, "_read_weights", lambda *_: pytest.fail("downloaded"))
    assert experiment.map_size(64, "resnet18", "DEFAULT") == 2
    message = "weights are 'DEFAULT'; allowed with small_cnn: empty, or the path"
    with pytest.raises(ValueError, match=message):
        experiment.map_size(28, "small_cnn", "DEFAULT")


def test_the_size_of_digits_is_fixed():
    message = "image_size is 96; allowed: 28, except with dataset 'folder'"
    with pytest.raises(ValueError, match=message):
        Settings(image_size=96)


def test_dilation_grows_with_the_side():
    mask = torch.zeros(56, 56)
    mask[20, 20] = 1
    wide = masking.Rule("threshold", 0.5, "nearest", 3).image_masks(mask, (56, 56))
    assert wide.sum() == 13**2
    assert wide[14:27, 14:27].all()
