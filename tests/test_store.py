"""Files: checkpoints, whole or refused by name."""

import io
import pickle
import tempfile
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from masktune_utils import models, store
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
    sha256 = weights_sha256(model.state_dict())
    assert weights_sha256(checkpoint.model.state_dict()) == sha256
    assert checkpoint.sha256 == sha256
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
        identity = settings.identity(base=not made_from)
        assert made_with == identity
        assert made_from in (None, base_sha256)


def random_offsets(length: int) -> tuple[list[int], list[int]]:
    """Two times 20 offsets in a file; half of them near its ends."""
    random = np.random.default_rng(0)
    anywhere = random.integers(length, size=(2, 10))
    near_the_ends = random.integers(-4000, 4000, size=(2, 10)) % length
    first, second = np.concatenate([anywhere, near_the_ends], axis=1).tolist()
    return first, second


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path):
    path = tmp_path / ("a" * 255)
    store.write_bytes(path, b"content")
    assert path.read_bytes() == b"content"


def test_random_damage_is_refused_by_name_or_touches_nothing(saved):
    whole = saved.read_bytes()
    undamaged = store.load_checkpoint(saved, IDENTITY)
    random = np.random.default_rng(0)
    offsets, _ = random_offsets(len(whole))
    refused = 0
    for offset in offsets:
        changed = bytes([whole[offset] ^ random.integers(1, 256)])
        saved.write_bytes(whole[:offset] + changed + whole[offset + 1 :])
        try:
            checkpoint = store.load_checkpoint(saved, IDENTITY)
        except CheckpointError as error:
            assert str(saved) in str(error)
            refused += 1
        else:  # it was a byte of padding
            assert checkpoint.settings == undamaged.settings
            assert checkpoint.history == undamaged.history
            sha256 = weights_sha256(checkpoint.model.state_dict())
            assert sha256 == undamaged.sha256
    assert refused > 15


def test_a_file_that_is_cut_off_anywhere_is_refused_by_name(saved):
    whole = saved.read_bytes()
    _, offsets = random_offsets(len(whole))
    for offset in offsets:
        saved.write_bytes(whole[:offset])
        with pytest.raises(CheckpointError, match=r"saved\.pth is damaged"):
            store.load_checkpoint(saved, IDENTITY)


WEIGHTS = models.new_model(0).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": 1}, "settings": {}, "history": []},
        {"state_dict": WEIGHTS, "settings": 1, "history": []},
        [1, 2],
        torch.nn.Linear(2, 2).state_dict(),
    ],
)
def test_foreign_files_are_refused_by_name(content, tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save(content, path)
    message = r"foreign\.pth is damaged, foreign or of another version \("
    with pytest.raises(CheckpointError, match=message):
        store.load_checkpoint(path)


def test_an_empty_file_is_refused_by_name_and_so_is_none(tmp_path):
    path = tmp_path / "empty.pth"
    message = r"empty\.pth is not a file; give the path of a checkpoint"
    with pytest.raises(FileNotFoundError, match=message):
        store.load_checkpoint(path)
    path.touch()
    with pytest.raises(CheckpointError, match=r"empty\.pth is damaged"):
        store.load_checkpoint(path)


class Malicious:
    """Would end the tests if it were unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_loading_runs_no_code(tmp_path):
    content = {"state_dict": Malicious()}
    torch.save(content, tmp_path / "archive.pth")
    (tmp_path / "pickle.pth").write_bytes(pickle.dumps(content, protocol=2))
    for path in tmp_path.iterdir():
        message = rf"{path.name} is damaged, foreign or of another version"
        with pytest.raises(CheckpointError, match=message):
            store.load_checkpoint(path)


def test_a_file_of_another_version_is_refused_by_name(model, tmp_path):
    path = tmp_path / "new.pth"
    newer = {"dropout": 0.5, "ema": True}
    store.save_checkpoint(path, model, IDENTITY | newer, [])
    names = "(dropout, ema|ema, dropout)"
    message = rf"new\.pth .* another version wrote it, with the setting {names}\)"
    for asked in (None, IDENTITY):
        with pytest.raises(CheckpointError, match=message):
            store.load_checkpoint(path, asked)


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default(model, tmp_path):
    path = tmp_path / "old.pth"
    made_with = dict(IDENTITY)
    del made_with["validation_share"]
    store.save_checkpoint(path, model, made_with, [])
    store.load_checkpoint(path, IDENTITY)
    hint = r"Delete it, use retrain = True, or use another directory\."
    message = rf"old\.pth was made with validation_share = 0\.0, not 0\.1\. {hint}"
    with pytest.raises(CheckpointError, match=message):
        store.load_checkpoint(path, IDENTITY | {"validation_share": 0.1})


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "new" / "file"
    store.write_bytes(path, b"old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*path.parent.iterdir()] == [path]


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


def test_a_refusal_tells_what_is_wrong(saved):
    whole = saved.read_bytes()
    content = store.read_tensors(saved)
    bytes_of_weights = content["state_dict"]["linear.0.weight"].numpy().tobytes()
    damaged = whole.replace(bytes_of_weights[:50], bytes(50))
    assert damaged != whole
    saved.write_bytes(damaged)
    reason = r"\(ValueError: its part .*/data/\d+ has another CRC\)\.$"
    with pytest.raises(CheckpointError, match=reason):
        store.load_checkpoint(saved)
    store.write_tensors(saved, content | {"sha256": "of other weights"})
    reason = r"\(ValueError: its weights have another SHA-256\)\.$"
    with pytest.raises(CheckpointError, match=reason):
        store.load_checkpoint(saved)


def test_a_file_is_written_beside_its_place_and_not_on_another_disk(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    store.write_bytes(tmp_path / "file", b"content")
    store.check_writable(str(tmp_path))
    assert (tmp_path / "file").read_bytes() == b"content"


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


def test_arrays_are_saved_and_read_back(tmp_path):
    path = tmp_path / "new" / "arrays.npz"
    arrays = {"numbers": np.arange(3), "names": np.array(["a", "ß"])}
    store.write_arrays(path, arrays | {"text": "a text"})
    read = store.read_arrays(path)
    np.testing.assert_array_equal(read["numbers"], arrays["numbers"])
    np.testing.assert_array_equal(read["names"], arrays["names"])
    assert read["text"] == "a text"
    first = path.read_bytes()
    store.write_arrays(path, arrays | {"text": "a text"})
    assert path.read_bytes() == first


def test_arrays_that_are_damaged_foreign_or_pickled_are_not_read(tmp_path):
    """They are refused by name where a choice is read, see test_choices.py."""
    path = tmp_path / "arrays.npz"
    store.write_arrays(path, {"numbers": np.arange(1000)})
    whole = path.read_bytes()
    contents = [whole[:length] for length in range(0, len(whole), 50)]
    for offset in range(100, 1000, 100):
        contents.append(whole[:offset] + bytes(4) + whole[offset + 4 :])
    contents.append(b"foreign")
    for save, array in (
        (np.savez, np.array([print], dtype=object)),
        (np.save, np.array([print], dtype=object)),
        (np.save, np.arange(3)),  # one array, and no archive of them
    ):
        buffer = io.BytesIO()
        save(buffer, array)
        contents.append(buffer.getvalue())
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(Exception):  # noqa: B017 - NumPy has several
            store.read_arrays(path)
