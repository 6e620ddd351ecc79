"""Files: checkpoints, whole or refused by name."""

import pickle
import tempfile
from unittest.mock import Mock

import pytest
import torch

from masktune_utils import store
from masktune_utils.settings import REPOSITORY, Settings
from masktune_utils.store import CheckpointError, weights_sha256

IDENTITY = Settings(dataset="mnist5k").identity(base=True)
COMMITTED_FOLDER = REPOSITORY / "checkpoints" / "mnist" / "seed0"
COMMITTED = sorted(COMMITTED_FOLDER.glob("CNN_checkpoint*.pth"))


@pytest.fixture
def saved(tmp_path, model):
    history = [{"epoch": 1, "loss": 0.5, "seconds": 3}]
    store.save_checkpoint(tmp_path / "saved.pth", model, IDENTITY, history)
    return tmp_path / "saved.pth"


def test_checkpoint_round_trip(model, saved):
    checkpoint = store.load_checkpoint(saved, IDENTITY)
    assert checkpoint.sha256 == weights_sha256(model.state_dict())
    assert checkpoint.sha256 == weights_sha256(checkpoint.model.state_dict())
    assert not checkpoint.model.training
    assert checkpoint.settings == IDENTITY
    assert checkpoint.history == [{"epoch": 1, "loss": 0.5}]


def test_the_committed_checkpoints_were_made_with_what_their_names_say():
    assert len(COMMITTED) == 20
    base_sha256 = store.load_checkpoint(COMMITTED[0]).sha256
    for path in COMMITTED:
        made_with = store.load_checkpoint(path).settings
        made_from = made_with.pop("base_sha256", None)
        settings = Settings(**made_with)
        names = [settings.configuration, "chosen"] if made_from else ["base"]
        assert path in [settings.checkpoint_path(name) for name in names]
        assert made_with == settings.identity(base=not made_from)
        assert made_from in (None, base_sha256)


def refuse(path, message: str, settings: dict | None = None) -> None:
    with pytest.raises(CheckpointError, match=rf"{path.name} {message}"):
        store.load_checkpoint(path, settings)


def test_a_damaged_file_is_refused_by_name_with_what_is_wrong(saved):
    whole = saved.read_bytes()
    content = store.read_tensors(saved)
    for length in (0, 100, len(whole) // 2, len(whole) - 5):
        saved.write_bytes(whole[:length])
        refuse(saved, "is damaged")
    bytes_of_weights = content["state_dict"]["linear.0.weight"].numpy().tobytes()
    saved.write_bytes(whole.replace(bytes_of_weights[:50], bytes(50)))
    refuse(saved, r"is damaged.* \(ValueError: its part .* has another CRC\)\.$")
    store.write_tensors(saved, content | {"sha256": "of other weights"})
    refuse(saved, r"is damaged.* \(ValueError: its weights have another SHA-256\)\.$")
    saved.unlink()
    message = r"saved\.pth is not a file; give the path of a checkpoint"
    with pytest.raises(FileNotFoundError, match=message):
        store.load_checkpoint(saved)


class Malicious:
    """Would end the tests if it were unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_a_foreign_file_is_refused_by_name_and_its_code_is_not_run(saved):
    whole = store.read_tensors(saved)
    contents = [
        {"state_dict": Malicious()},
        whole | {"state_dict": {"a": 1}},
        whole | {"settings": 1},
        [1, 2],
        torch.nn.Linear(2, 2).state_dict(),
    ]
    message = r"is damaged, foreign or of another version \("
    for content in contents:
        torch.save(content, saved)
        refuse(saved, message)
    saved.write_bytes(pickle.dumps(contents[0], protocol=2))
    refuse(saved, message)


def test_a_file_of_another_version_is_refused_by_name(model, tmp_path):
    path = tmp_path / "new.pth"
    store.save_checkpoint(path, model, IDENTITY | {"dropout": 0.5}, [])
    message = r".* another version wrote it, with the setting dropout\)"
    for asked in (None, IDENTITY):
        refuse(path, message, asked)


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default(model, tmp_path):
    path = tmp_path / "old.pth"
    made_with = dict(IDENTITY)
    del made_with["validation_share"]
    store.save_checkpoint(path, model, made_with, [])
    store.load_checkpoint(path, IDENTITY)
    hint = r"Delete it, use retrain = True, or use another directory\."
    message = rf"was made with validation_share = 0\.0, not 0\.1\. {hint}"
    refuse(path, message, IDENTITY | {"validation_share": 0.1})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "new" / "file"
    store.write_bytes(path, b"old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*path.parent.iterdir()] == [path]


def test_a_file_is_written_beside_its_place(tmp_path, monkeypatch):
    """And not on another disk, where a rename would fail."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    path = tmp_path / ("a" * 240)
    store.write_bytes(path, b"content")
    store.check_writable(str(tmp_path))
    assert path.read_bytes() == b"content"


def test_a_loaded_model_is_put_on_the_device_with_channels_last(saved):
    model = store.load_checkpoint(saved, device="meta").model
    assert {weights.device.type for weights in model.parameters()} == {"meta"}
    convolution = model.backbone[3].weight
    assert convolution.is_contiguous(memory_format=torch.channels_last)


def test_weights_that_were_saved_on_a_gpu_are_loaded_without_one(
    model, tmp_path, monkeypatch
):
    path = tmp_path / "theirs.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _storage: "cuda:0")
        torch.save(model.state_dict(), path)
    loaded = store.load_checkpoint(path)
    assert loaded.sha256 == weights_sha256(model.state_dict())


def test_a_directory_is_made_unless_it_cannot_be_written_to(tmp_path):
    file = tmp_path / "file"
    file.touch()
    for directory in (file, file / "below", "/proc/new", "/proc"):
        allowed = r"a folder to write to, or a new one \("
        message = f"^directory is '{directory}'; allowed: {allowed}"
        with pytest.raises(ValueError, match=message):
            store.check_writable(str(directory))
    store.check_writable(str(tmp_path / "a" / "b"))
    assert [*(tmp_path / "a").rglob("*")] == [tmp_path / "a" / "b"]
