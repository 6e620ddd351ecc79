"""Files: kept, whole, or refused by name."""

import pickle
import tempfile
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from masktune_utils import experiment, models, store
from masktune_utils.settings import REPOSITORY, Settings
from masktune_utils.store import CheckpointError

MADE_WITH = {"seed": 0, "lr": 0.1}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "new" / "kept.pth"


def keep(path, value=1.0, made_with=MADE_WITH):
    """What is kept of a value."""
    content = {"values": torch.full((50,), value)}
    return store.load_or_make(path, made_with, lambda: content)["values"]


def test_what_is_kept_is_made_once_with_the_same_bytes(path, tmp_path):
    assert keep(path).eq(1).all()
    assert keep(path, 2.0).eq(1).all()
    other = tmp_path / "other" / "kept.pth"
    keep(other)
    assert other.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("made_with", "message"),
    [
        ({"seed": 1, "lr": 0.1}, "seed = 0, not 1"),
        ({"seed": 0, "lr": 0.1, "shared": True}, "shared = None, not True"),
        ({"seed": 0}, "lr = 0.1, not None"),  # another version made it
    ],
)
def test_what_was_made_with_something_else_is_refused_by_name(path, made_with, message):
    keep(path)
    before = path.read_bytes()
    message = f"kept.pth was made with {message}. Delete it, or use another directory."
    with pytest.raises(CheckpointError, match=message):
        keep(path, made_with=made_with)
    assert path.read_bytes() == before


def test_a_name_that_a_file_does_not_have_counts_as_its_default(path):
    """A new setting refuses no file that exists, and one that has gone neither."""
    keep(path)
    newer = {"seed": 0, "warmup": 0}  # without lr

    def load(**changes):
        made_with = {**newer, **changes}
        store.load_or_make(path, made_with, dict, warmup=0, lr=0.1)

    load()
    with pytest.raises(CheckpointError, match="was made with warmup = 0, not 3"):
        load(warmup=3)
    with pytest.raises(CheckpointError, match=r"with lr = 0\.1, not 0\.2"):
        load(lr=0.2)


def test_checkpoints_of_other_versions_are_loaded_if_they_mean_the_same(
    splits, settings
):
    path = settings.checkpoint_path("base")
    content = {"state_dict": models.new_model(0).state_dict(), "history": []}
    earlier = {**settings.base.identity, "rounds": 1}
    del earlier["labels"]
    store.load_or_make(path, earlier, lambda: content)
    assert experiment.base_model(settings, splits.train).history == []
    path.unlink()
    store.load_or_make(path, {**earlier, "rounds": 2}, lambda: content)
    with pytest.raises(CheckpointError, match="was made with rounds = 2, not 1"):
        experiment.base_model(settings, splits.train)


def full_disk():
    """A file in which nothing can be written."""
    return Path("/dev/full").open("wb")


def test_what_cannot_be_written_is_not_made(path, monkeypatch):
    """Not after hours of training."""
    make = Mock()
    with pytest.raises(OSError, match="/proc"):
        store.load_or_make(Path("/proc/kept.pth"), MADE_WITH, make)
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: full_disk())
    with pytest.raises(OSError, match="No space left"):
        store.load_or_make(path, MADE_WITH, make)
    make.assert_not_called()
    assert not [*path.parent.iterdir()]


def test_a_damaged_file_is_refused_by_name_with_what_is_wrong(path):
    values = keep(path)
    whole = path.read_bytes()
    damaged = [whole[:length] for length in (0, 100, len(whole) - 5)]
    damaged.append(whole.replace(values.numpy().tobytes(), bytes(200)))
    for content in damaged:
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"kept.pth is damaged.*Delete it"):
            keep(path)
        assert path.read_bytes() == content


class Malicious:
    """Would end the tests if it were unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit",)


@pytest.mark.parametrize("content", [Malicious(), {"settings": 1}, {}])
def test_a_foreign_file_is_refused_by_name_and_its_code_is_not_run(path, content):
    path.parent.mkdir()
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"kept.pth is damaged, foreign or"):
        keep(path)
    path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(CheckpointError, match=r"kept.pth is damaged, foreign or"):
        keep(path)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, path):
    store.write_bytes(path, b"old")
    monkeypatch.setattr(Path, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [*path.parent.iterdir()] == [path]


def test_the_committed_checkpoints_were_made_with_what_their_names_say():
    folder = REPOSITORY / "checkpoints" / "mnist" / "seed0"
    base = experiment.with_weights(folder / "CNN_checkpoint_base.pth")
    base_sha256 = store.sha256(base.state_dict())
    committed = folder.glob("CNN_checkpoint*.pth")
    paths = [path for path in committed if "chosen" not in path.name]
    assert len(paths) == 19
    for path in paths:
        made_with = store.read(path)["settings"]
        made_from = made_with.pop("base_sha256", None)
        settings = Settings(**made_with)
        name = settings.configuration if made_from else "base"
        assert path == settings.checkpoint_path(name)
        if not made_from:
            settings = settings.base
        assert settings.identity | made_with == settings.identity
        assert made_from in (None, base_sha256)


def test_weights_of_a_plain_state_dict_are_loaded_wherever_they_were_saved(
    tmp_path, monkeypatch
):
    weights = models.new_model(0, num_classes=10).state_dict()
    path = tmp_path / "theirs.pth"
    monkeypatch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
    torch.save(weights, path)
    loaded = experiment.with_weights(str(path))
    assert not loaded.training
    assert store.sha256(loaded.state_dict()) == store.sha256(weights)


@pytest.mark.parametrize("content", [[1], {"a": 1}])
def test_what_are_no_weights_is_refused_by_name(content, tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"foreign.pth is damaged, foreign or"):
        experiment.with_weights(path)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"foreign.pth"):
        experiment.with_weights(path)
