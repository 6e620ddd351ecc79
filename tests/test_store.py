"""Files: checkpoints, whole or refused by name."""

import pickle
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from masktune_utils import models, store
from masktune_utils.settings import REPOSITORY, Settings
from masktune_utils.store import CheckpointError, weights_sha256

IDENTITY = Settings(dataset="mnist5k").identity(base=True)


@pytest.fixture
def saved(tmp_path, model):
    history = [{"epoch": 1, "loss": 0.5, "seconds": 3}]
    store.save_checkpoint(tmp_path / "saved.pth", model, IDENTITY, history)
    return tmp_path / "saved.pth"


def test_checkpoint_round_trip(model, saved):
    checkpoint = store.load_checkpoint(saved, IDENTITY)
    sha256 = weights_sha256(model.state_dict())
    assert weights_sha256(checkpoint.model.state_dict()) == sha256 == checkpoint.sha256
    assert not checkpoint.model.training and checkpoint.settings == IDENTITY
    assert checkpoint.history == [{"epoch": 1, "loss": 0.5}]


COMMITTED = sorted(
    (REPOSITORY / "checkpoints" / "mnist" / "seed0").glob("CNN_checkpoint*.pth")
)


def test_the_committed_checkpoints_were_made_with_what_their_names_say():
<<<<<<< main
    assert len(COMMITTED) == 20
    base_sha256 = store.load_checkpoint(COMMITTED[0])[1]["sha256"]
=======
    assert len(COMMITTED) == 19
    base_sha256 = store.load_checkpoint(COMMITTED[0]).sha256
>>>>>>> redesign
    for path in COMMITTED:
        made_with = store.load_checkpoint(path).settings
        made_from = made_with.pop("base_sha256", None)
        settings = Settings(**made_with)
        assert (
            settings.checkpoint_path(settings.configuration if made_from else "base")
            == path
        )
        assert made_with.items() <= settings.identity(base=not made_from).items()
        assert made_from in (None, base_sha256)


def test_random_damage_is_refused_by_name_or_touches_nothing(saved):
    """At 200 offsets a byte is changed, at 200 the file is cut off; half lie near its ends."""
    whole, random = saved.read_bytes(), np.random.default_rng(0)
    about = store.load_checkpoint(saved, IDENTITY)
    anywhere = random.integers(len(whole), size=(2, 100))
    near_the_ends = random.integers(-4000, 4000, size=(2, 100)) % len(whole)
    refused = 0
    for cut, offsets in enumerate(
        np.concatenate([anywhere, near_the_ends], axis=1).tolist()
    ):
        for offset in offsets:
            changed = bytes([whole[offset] ^ random.integers(1, 256)])
            saved.write_bytes(
                whole[:offset] + (b"" if cut else changed + whole[offset + 1 :])
            )
            try:
                other = store.load_checkpoint(saved, IDENTITY)
            except CheckpointError as error:
                assert str(saved) in str(error)
                refused += 1
            else:  # a byte of padding
                assert not cut and other.settings == about.settings
                assert other.history == about.history
                assert weights_sha256(other.model.state_dict()) == about.sha256
    assert refused > 350


WEIGHTS = models.new_model(0).state_dict()


@pytest.mark.parametrize(
    "content",
    [
        {"state_dict": {"a": 1}, "settings": {}, "history": [], "sha256": ""},
        {
            "state_dict": WEIGHTS,
            "settings": 1,
            "history": [],
            "sha256": weights_sha256(WEIGHTS),
        },
        {
            "state_dict": WEIGHTS,
            "settings": {},
            "history": [],
            "sha256": "of other weights",
        },
        [1, 2],
        torch.nn.Linear(2, 2).state_dict(),
    ],
)
def test_foreign_files_are_refused_by_name(content, tmp_path):
    torch.save(content, tmp_path / "foreign.pth")
    with pytest.raises(
        CheckpointError, match=r"foreign\.pth is damaged or not a checkpoint \("
    ):
        store.load_checkpoint(tmp_path / "foreign.pth")


def test_an_empty_file_is_refused_by_name_and_so_is_none(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"empty\.pth is not a file; give the path of a"
    ):
        store.load_checkpoint(tmp_path / "empty.pth")
    (tmp_path / "empty.pth").touch()
    with pytest.raises(CheckpointError, match=r"empty\.pth is damaged"):
        store.load_checkpoint(tmp_path / "empty.pth")


class Malicious:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def test_loading_runs_no_code(tmp_path):
    torch.save({"state_dict": Malicious()}, tmp_path / "archive.pth")
    (tmp_path / "pickle.pth").write_bytes(
        pickle.dumps({"state_dict": Malicious()}, protocol=2)
    )
    for path in tmp_path.iterdir():
        with pytest.raises(
            CheckpointError, match=rf"{path.name} is damaged or not a checkpoint"
        ):
            store.load_checkpoint(path)


def test_a_file_of_a_newer_version_is_refused_by_name(model, tmp_path):
    store.save_checkpoint(tmp_path / "new.pth", model, IDENTITY | {"dropout": 0.5}, [])
    for asked in (None, IDENTITY):
        with pytest.raises(
            CheckpointError, match=r"new\.pth .* newer version .* setting dropout"
        ):
            store.load_checkpoint(tmp_path / "new.pth", asked)


def test_a_checkpoint_older_than_a_setting_was_made_with_its_default(model, tmp_path):
    made_with = {
        name: IDENTITY[name] for name in IDENTITY if name != "validation_share"
    }
    store.save_checkpoint(tmp_path / "old.pth", model, made_with, [])
    store.load_checkpoint(tmp_path / "old.pth", IDENTITY)
    hint = r"Use retrain = True to replace it, or another directory\."
    message = rf"old\.pth was made with validation_share = 0\.0, not 0\.1\. {hint}"
    with pytest.raises(CheckpointError, match=message):
        store.load_checkpoint(
            tmp_path / "old.pth", IDENTITY | {"validation_share": 0.1}
        )


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(monkeypatch, tmp_path):
    path = tmp_path / "new" / "file"
    store.write_bytes(path, b"old")
    monkeypatch.setattr("os.fsync", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and [*path.parent.iterdir()] == [path]


def test_settings_that_are_no_more_are_known_at_the_value_that_is_todays(saved, model):
    old = IDENTITY | {"iterations": 1, "accumulate": False, "restart": False}
    store.save_checkpoint(saved, model, old, [])
    assert store.load_checkpoint(saved, IDENTITY).settings == IDENTITY
    store.save_checkpoint(saved, model, old | {"iterations": 3}, [])
    with pytest.raises(
        CheckpointError, match="an older version wrote it, with iterations other th"
    ):
        store.load_checkpoint(saved)
