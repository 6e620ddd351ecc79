"""Bad input: one message with the value and what is allowed; nothing is written."""

import asyncio
import socket
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torchvision
from conftest import times_of_writing, write_idx_files

from masktune_utils import datasets, store
from masktune_utils.runner import command, jobs
from masktune_utils.settings import Settings


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs `masktune sweep`, which must end with a message and write nothing."""

    def run(message, *arguments):
        before = times_of_writing(tmp_path)
        assert command.main(["sweep", f"--directory={tmp_path}/new", *arguments]) == 2
        printed = capsys.readouterr()
        (line,) = printed.err.split("\r")[-1].splitlines()  # after a progress bar
        assert printed.out == ""
        assert line.startswith("masktune: ")
        assert message in line
        assert times_of_writing(tmp_path) == before

    return run


BAD_OPTIONS = {
    "--method foo": "method = 'foo': Input should be 'threshold', ",
    "--limit 33": "limit = '33': Input should be a multiple of 10",
    "--device mps": "device = 'mps'; here there are auto, cpu",
    "--directory ~who_is_not_here/x": "Could not determine home directory",
    "--dask nowhere": "--dask 'nowhere': there is no Dask scheduler",
}
BAD_GRIDS = {
    "- sede: 0": "sede = 0: Extra inputs are not permitted; known: directory, device",
    "- seed: [0, -1]": "seed = -1: Input should be greater than or equal to 0",
    "- seed: []": "Parameter grid for parameter 'seed' need to be a non-empty",
    "- {dataset: mnist5k, limit: [20, 5000]}": "limit = 5000: at most 4000 here",
    "[]": "List should have at least 1 item",
    "- seed: [0": "while parsing a flow sequence",
    "- !!python/object/apply:os.getpid []": "could not determine a constructor",
    "- notebook: ../x": "notebook = '../x': allowed are 01_dataset, 02_erm,",
    "- notebook: [01_dataset]": "notebook = ['01_dataset']: allowed are 01_dataset,",
}


@pytest.mark.parametrize("arguments", BAD_OPTIONS)
def test_options_of_the_command(arguments, refused):
    refused(BAD_OPTIONS[arguments], "--dataset=mnist5k", *arguments.split())


@pytest.mark.parametrize("content", BAD_GRIDS)
def test_grid_files(content, refused, tmp_path):
    path = tmp_path / "grid.yaml"
    refused("No such file or directory", str(path))
    path.write_text(content)
    refused(BAD_GRIDS[content], str(path))


def test_a_server_that_accepts_and_stays_silent_is_no_scheduler(refused, monkeypatch):
    quick = partial(asyncio.wait_for, timeout=0.1)
    impatient = Mock(
        wraps=asyncio, wait_for=lambda connecting, _seconds: quick(connecting)
    )
    monkeypatch.setattr(jobs, "asyncio", impatient)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        refused(f"--dask {address!r}: there is no Dask", "--dask", address)


def test_without_distributed_it_is_told_how_to_install_it(refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    refused("--dask: first run pip install distributed", "--dask=tcp://x:1")


# --- images ---

DIGITS = list(range(10))


@pytest.fixture
def root(monkeypatch, tmp_path) -> Path:
    """An empty `MASKTUNE_DATA`, and no network."""
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    for name in datasets.TORCHVISION.values():
        mirrors = f"torchvision.datasets.{name}.mirrors"
        monkeypatch.setattr(mirrors, ["http://127.0.0.1:1/"])
    return tmp_path


def test_masktune_data_is_no_folder(root, refused, monkeypatch):
    path = root / "file"
    path.touch()
    monkeypatch.setenv("MASKTUNE_DATA", str(path))
    refused(f"MASKTUNE_DATA = '{path}': no folder. Correct or unset it.")


def test_masktune_data_is_empty_and_there_is_no_network(root, refused):
    folder = root / "KMNIST"
    message = f"{folder} is not there and cannot be downloaded, unlike 'mnist5k'"
    refused(message, "--dataset=kmnist")


def test_files_that_are_not_those_of_mnist(root, refused, monkeypatch):
    """Among them those of an early torchvision, which are read if they are there."""
    folder = root / "MNIST"
    message = f"{folder} has other images or labels than MNIST. Delete it."
    images = torch.from_numpy(write_idx_files(folder / "raw", DIGITS))
    refused(message)
    content = {"images": images, "labels": torch.arange(10)}
    digests = [store.sha256(content)] * 2
    monkeypatch.setattr(datasets, "MNIST_SHA256", digests)
    assert datasets.resolve_dataset("auto") == "mnist"
    (folder / "processed").mkdir()
    for name in ("training.pt", "test.pt"):
        torch.save((images, torch.arange(10).roll(1)), folder / "processed" / name)
    refused(message)


def test_without_mnist_and_a_network_the_5000_of_mnist5k_are_taken(root):
    assert not [*root.iterdir()]
    with pytest.warns(UserWarning, match="'mnist5k'.*MASKTUNE_DATA"):
        train, _ = datasets.read(Settings())
    assert len(train) == 4000


def test_a_download_is_there_whole_or_not_at_all(root, monkeypatch):
    problems = ["File not found or corrupted."]
    images = []

    def download(dataset):
        images[:] = write_idx_files(Path(dataset.raw_folder), DIGITS)
        if problems:
            raise RuntimeError(problems.pop())

    monkeypatch.setattr(torchvision.datasets.KMNIST, "download", download)
    settings = Settings(dataset="kmnist")
    with pytest.raises(FileNotFoundError, match="cannot be downloaded"):
        datasets.read(settings)
    assert not list(root.iterdir())
    train, _ = datasets.read(settings)
    assert train.groups.tolist() == DIGITS
    assert (train.images[:, 0].numpy() == images).all()
    # Another process was quicker.
    datasets._download(torchvision.datasets.KMNIST, root / "KMNIST")
    assert [path.name for path in root.iterdir()] == ["KMNIST"]
