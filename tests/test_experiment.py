import dataclasses
import pickle
import re

import numpy as np
import pytest
import torch

from masktune_utils import experiment, masking, models, saliency, training
from masktune_utils.experiment import CheckpointError, Settings, weights_sha256


@pytest.fixture
def settings(tmp_path) -> Settings:
    return Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, epochs=1)


@pytest.fixture
def saved(settings, model):
    path = settings.checkpoint_path("base")
    experiment.save_checkpoint(path, model, settings.identity(base=True), [{"epoch": 1, "loss": 0.5, "seconds": 3}])
    return path


def test_checkpoint_round_trip(settings, model, saved):
    loaded, about = experiment.load_checkpoint(saved, settings.identity(base=True))
    assert weights_sha256(loaded.state_dict()) == weights_sha256(model.state_dict()) == about["sha256"]
    assert about["history"] == [{"epoch": 1, "loss": 0.5}] and about["settings"]["epochs"] == 1
    assert not loaded.training


def test_same_run_writes_the_same_bytes(settings, splits, tmp_path):
    paths = [dataclasses.replace(settings, directory=str(tmp_path / name)) for name in "ab"]
    for one in paths:
        experiment.base_model(one, splits.train)
    first, second = (one.checkpoint_path("base").read_bytes() for one in paths)
    assert first == second


def test_a_flipped_bit_in_a_weight_is_found(settings, saved):
    content = bytearray(saved.read_bytes())
    weights = experiment.load_checkpoint(saved)[0].linear[0].weight.detach().numpy().tobytes()
    start = bytes(content).index(weights)
    content[start + 1234] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"CNN_checkpoint_base.pth is damaged"):
        experiment.load_checkpoint(saved, settings.identity(base=True))


def same(value: object, other: object) -> bool:
    """Equal in type, value and, of tensors, every bit."""
    if isinstance(value, dict) and isinstance(other, dict):
        return value.keys() == other.keys() and all(same(value[name], other[name]) for name in value)
    if isinstance(value, torch.Tensor):
        return torch.equal(value, other)
    return type(value) is type(other) and value == other


def test_random_damage_is_refused_by_name_or_touches_nothing(settings, saved):
    """At 200 offsets a byte is changed, another 200 times the file is cut off, of both the half near its ends."""
    whole, random = saved.read_bytes(), np.random.default_rng(0)
    model, about = experiment.load_checkpoint(saved, settings.identity(base=True))
    offsets = random.integers(len(whole), size=(2, 100))
    near_the_ends = random.integers(-4000, 4000, size=(2, 100)) % len(whole)
    refused = 0
    for cut, places in enumerate(np.concatenate([offsets, near_the_ends], axis=1).tolist()):
        for offset in places:
            changed = bytes([whole[offset] ^ random.integers(1, 256)])
            saved.write_bytes(whole[:offset] + (b"" if cut else changed + whole[offset + 1 :]))
            try:
                loaded, other = experiment.load_checkpoint(saved, settings.identity(base=True))
            except CheckpointError as error:
                assert str(saved) in str(error)
                refused += 1
            else:  # a byte of padding
                assert not cut and same(other, about) and same(dict(loaded.state_dict()), dict(model.state_dict()))
    assert refused > 350


def test_an_empty_file_is_refused_by_name(saved):
    saved.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"CNN_checkpoint_base.pth is damaged or not a checkpoint"):
        experiment.load_checkpoint(saved)


def test_what_is_refused_harms_no_good_file_beside_it(settings, splits, model, saved):
    """A fine-tuned model's checkpoint is damaged; the base model's, its own and the folder stay as they are."""
    bad = settings.checkpoint_path(settings.configuration)
    bad.write_bytes(saved.read_bytes()[:-5])
    before = {path.name: path.read_bytes() for path in saved.parent.iterdir()}
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), "top_k", 0.1)
    with pytest.raises(CheckpointError, match=re.escape(f"{bad} is damaged")):
        experiment.finetuned_model(settings, model, masked)
    assert {path.name: path.read_bytes() for path in saved.parent.iterdir()} == before


def test_a_file_of_a_newer_version_is_refused_by_name(settings, model):
    path = settings.checkpoint_path("base")
    experiment.save_checkpoint(path, model, settings.identity(base=True) | {"dropout": 0.5}, [])
    for asked in (None, settings.identity(base=True)):
        with pytest.raises(
            CheckpointError, match=r"base.pth was written by a newer version: it has the setting dropout"
        ):
            experiment.load_checkpoint(path, asked)


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {}, "settings": {}},
        {"state_dict": {"a": 1}, "settings": {}, "history": [], "sha256": ""},
        {"state_dict": 1, "settings": {}, "history": [], "sha256": ""},
        [1, 2],
        {"state_dict": {}, "settings": [], "history": [], "sha256": weights_sha256({})},
        {"backbone.0.weight": torch.zeros(3)},
        torch.nn.Linear(2, 2).state_dict(),
        {name: weights.half() for name, weights in models.new_model(0).state_dict().items() if "bias" in name},
        models.new_model(0, num_classes=10).state_dict(),
        {},
    ],
)
def test_foreign_files_are_refused_by_name(content, tmp_path):
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(CheckpointError, match=r"foreign\.pth"):
        experiment.load_checkpoint(tmp_path / "foreign.pth")


@pytest.mark.parametrize(
    "save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_loading_runs_no_code(save, tmp_path):
    target = tmp_path / "was-here"

    class Malicious:
        def __reduce__(self):
            return exec, (f"open({str(target)!r}, 'w').close()",)

    save({"state_dict": Malicious()}, tmp_path / "malicious.pth")
    with pytest.raises(CheckpointError, match=r"malicious\.pth"):
        experiment.load_checkpoint(tmp_path / "malicious.pth")
    assert not target.exists()


def test_other_settings_are_refused_by_their_name(settings, splits, saved):
    changed = dataclasses.replace(settings, momentum=0.5)
    changed.checkpoint_path("base").parent.mkdir(parents=True)
    saved.rename(changed.checkpoint_path("base"))
    with pytest.raises(CheckpointError, match=r"was made with momentum = 0.9, not 0.5.*retrain = True"):
        experiment.base_model(changed, splits.train)


def test_finetuned_model_of_another_base_model_is_refused(settings, splits, model):
    maps = torch.rand(200, 8, 8, generator=torch.Generator().manual_seed(0))
    masked = masking.mask_dataset(splits.train, maps, "top_k", 0.1)
    before = weights_sha256(model.state_dict())
    first, _ = experiment.finetuned_model(settings, model, masked)
    assert weights_sha256(model.state_dict()) == before != weights_sha256(first.state_dict())
    with torch.no_grad():
        model.linear[3].bias += 1
    with pytest.raises(CheckpointError, match="was made with base_sha256"):
        experiment.finetuned_model(settings, model, masked)
    experiment.finetuned_model(settings, model, masked, retrain=True)


@pytest.mark.parametrize(("finetune_lr", "expected"), [(None, 0.0025), (0.01, 0.01)])
def test_finetuning_takes_the_rate_that_the_base_model_ended_with(settings, splits, model, finetune_lr, expected):
    settings = dataclasses.replace(settings, epochs=50, finetune_lr=finetune_lr)
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), "top_k", 0.1)
    _, history = experiment.finetuned_model(settings, model, masked)
    assert [epoch["lr"] for epoch in history] == [expected]


@pytest.mark.parametrize("accumulate", [False, True])
def test_iterations_mask_again_by_what_the_finetuned_model_looks_at(settings, splits, model, accumulate):
    def masked_by(explained, earlier=None):
        maps = saliency.saliency_maps(explained, splits.train.images, splits.train.labels)
        return masking.mask_dataset(splits.train, maps, **settings.mask_rule, earlier=earlier)

    first = masked_by(model)
    once, _ = experiment.finetuned_model(settings, model, first)
    again = masked_by(once, first if accumulate else None)
    training.train(once, again, epochs=1, lr=settings.lr, seed=settings.seed)
    settings = dataclasses.replace(settings, iterations=2, accumulate=accumulate)
    twice, history = experiment.finetuned_model(settings, model, first)
    assert [epoch["epoch"] for epoch in history] == [1, 2]
    assert weights_sha256(twice.state_dict()) == weights_sha256(once.state_dict())


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default(settings, model):
    path = settings.checkpoint_path("base")
    made_with = settings.identity(base=True)
    del made_with["holdout"]
    experiment.save_checkpoint(path, model, made_with, [])
    experiment.load_checkpoint(path, settings.identity(base=True))
    with pytest.raises(CheckpointError, match=r"was made with holdout = 0.0, not 0.1"):
        experiment.load_checkpoint(path, dataclasses.replace(settings, holdout=0.1).identity(base=True))


def test_numbers_of_numpy_are_numbers():
    settings = Settings(seed=np.int64(3), lr=np.float32(0.5), param=np.int32(1), limit=np.int64(20))
    assert settings == Settings(seed=3, lr=0.5, param=1.0, limit=20)
    assert [type(getattr(settings, name)) for name in ("seed", "lr", "param", "limit")] == [int, float, float, int]
    with pytest.raises(TypeError, match=r"seed is 3.0; allowed: int"):
        Settings(seed=np.float64(3))


def test_presets_are_settings():
    for preset in experiment.PRESETS.values():
        assert Settings(**preset) != Settings()


def test_base_model_is_trained_once(settings, splits):
    first, history = experiment.base_model(settings, splits.train)
    assert history[0].pop("seconds") > 0
    written = settings.checkpoint_path("base").stat().st_mtime_ns
    second, same_history = experiment.base_model(settings, splits.train)
    assert weights_sha256(first.state_dict()) == weights_sha256(second.state_dict()) and history == same_history
    assert settings.checkpoint_path("base").stat().st_mtime_ns == written
    experiment.base_model(settings, splits.train, retrain=True)
    assert settings.checkpoint_path("base").stat().st_mtime_ns != written


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_saliency_is_computed_once_per_base_model(settings, splits, model, monkeypatch):
    first = experiment.training_saliency(settings, model, splits.train)
    calls = []
    compute = experiment.saliency.saliency_maps
    monkeypatch.setattr(experiment.saliency, "saliency_maps", lambda *a: calls.append(1) or compute(*a))
    assert torch.equal(experiment.training_saliency(settings, model, splits.train), first) and not calls
    settings.saliency_path.write_bytes(b"damaged")
    assert torch.equal(experiment.training_saliency(settings, model, splits.train), first) and len(calls) == 1
    with torch.no_grad():
        model.linear[0].weight += torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(experiment.training_saliency(settings, model, splits.train), first)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    experiment.write_json(tmp_path / "result.json", {"old": 1})
    with pytest.raises(TypeError):
        experiment.write_json(tmp_path / "result.json", {"new": object()})
    with pytest.raises(KeyboardInterrupt), experiment.atomic_write(tmp_path / "result.json") as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert experiment.read_json(tmp_path / "result.json") == {"old": 1}
    assert experiment.read_json(tmp_path / "none.json") is None
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_damaged_result_is_refused_by_name(tmp_path):
    (tmp_path / "result.json").write_text('{"raw": ')
    with pytest.raises(ValueError, match=r"result\.json is damaged"):
        experiment.read_json(tmp_path / "result.json")


def test_names_of_the_default_settings(tmp_path):
    settings = Settings(directory=str(tmp_path), dataset="mnist")
    folder = tmp_path / "checkpoints" / "mnist" / "seed0"
    assert settings.checkpoint_path("base") == folder / "CNN_checkpoint_base.pth"
    path = settings.checkpoint_path(settings.configuration)
    assert path == folder / "CNN_checkpoint_finetuned_top_k_0.1.pth"
    assert Settings(dataset="mnist").folder("figures") == experiment.REPOSITORY / "figures" / "mnist" / "seed0"


def test_other_settings_never_share_a_file_with_the_defaults():
    other = {"dataset": "mnist5k", "seed": 1, "limit": 100, "square_size": 4, "square_color": "red", "epochs": 2}
    other |= {"placement": "ordered", "batch_size": 64, "lr": 0.1, "momentum": 0.0, "weight_decay": 0.0}
    other |= {"lr_decay_epochs": 5, "lr_decay_factor": 0.1, "cam": "GradCAM", "method": "mean", "param": 0.2}
    other |= {"upsample": "map", "finetune_optimizer": "adam", "finetune_lr": 0.001, "grow": 1, "iterations": 2}
    other |= {"square_share_0": 0.5, "square_share_1": 0.5, "holdout": 0.1, "accumulate": True}
    assert other.keys() | {"train_folder", "test_folder"} == Settings().identity(base=False).keys()
    for name, value in other.items():
        default, changed = Settings(dataset="mnist"), dataclasses.replace(Settings(dataset="mnist"), **{name: value})
        assert default.checkpoint_path(default.configuration) != changed.checkpoint_path(changed.configuration)
        same_base = default.checkpoint_path("base") == changed.checkpoint_path("base")
        assert same_base == (name in experiment.FINETUNE)


def test_settings_of_a_notebook_and_unknown_parameters():
    cells = ["", 'dataset = "auto"\nseed = 0  # of every random choice', "# Parameters\nseed = 3\n", "rest"]
    namespace = {"In": cells, "dataset": "mnist5k", "seed": 3, "lrs": [1]}
    assert experiment.from_notebook(namespace) == Settings(dataset="mnist5k", seed=3)
    cells[2] = "# Parameters\nsede = 3\n"
    with pytest.raises(ValueError, match="unknown parameter sede; this notebook has: dataset, seed"):
        experiment.from_notebook(namespace)
