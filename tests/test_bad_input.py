"""Bad input: one message that names the value and what is allowed; nothing is written."""

import gzip
import hashlib
import http.server
import os
import shutil
import socket
import struct
import threading
import time
from functools import partial
from pathlib import Path

import papermill
import pytest
from conftest import write_idx_files
from PIL import Image

from masktune_utils import data, models
from masktune_utils.runner import command
from masktune_utils.settings import REPOSITORY, Settings

SHORTCUTS = (
    "'square', 'square_anywhere', 'two_squares', 'frame', 'pixels', 'digit_color', "
)
SHORTCUTS += "'background' or 'none'"


@pytest.fixture
def refused(capsys, tmp_path):
    """Runs `masktune sweep`, which must end with a message and leave the folder as it is."""

    def files() -> dict[Path, int]:
        found = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
        return {
            path: found[path] for path in found if path.suffix != ".npy"
        }  # decoded images

    def run(message: str, *arguments: str) -> None:
        before = files()
        try:
            code, usage = (
                command.main(["sweep", *arguments, f"--directory={tmp_path}/new"]),
                [],
            )
        except SystemExit as stop:  # argparse's own
            code, usage = stop.code, [f"usage: {command.USAGE}"]
        printed = capsys.readouterr()
        *first, last = printed.err.split("\r")[-1].splitlines()  # after a progress bar
        assert (code, printed.out, first) == (2, "", usage)
        assert last.startswith("masktune: ") and message in last
        assert files() == before

    return run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--method foo",
            "method is 'foo'; allowed: 'threshold', 'top_k', 'mean', 'mean_std' or",
        ),
        (
            "--upsample map cubic",
            "upsample is 'cubic'; allowed: 'bilinear', 'nearest' or 'map'.",
        ),
        ("--param 7", "param is 7; allowed: 0 to 1 for method 'threshold'."),
        ("--param -0.1", "param is -0.1; allowed: greater than or equal to 0."),
        ("--param nan", "param is 'nan'; allowed: a valid number."),
        ("--param [0.1,0.2]", "param is [0.1, 0.2]; allowed: a valid number."),
        ("--param None", "param is None; allowed: a valid number."),
        ("--param", "argument --param: expected at least one argument"),
        ("--dataset cifar", "dataset is 'cifar'; allowed: 'auto', 'mnist', 'mnist5k'"),
        (
            "--dataset folder",
            "train_folder is ''; allowed: with dataset 'folder', a folder",
        ),
        (
            "--train_folder pets",
            "train_folder is 'pets'; allowed: with dataset 'folder', a",
        ),
        ("--seed x", "seed is 'x'; allowed: a valid integer."),
        (
            "--seed 99999999999",
            "seed is 99999999999; allowed: less than or equal to 4294967295.",
        ),
        ("--shortcut circle", f"shortcut is 'circle'; allowed: {SHORTCUTS}."),
        ("--fill white", "fill is 'white'; allowed: 'zero' or 'resample'."),
        (
            "--finetune_schedule cosine",
            "finetune_schedule is 'cosine'; allowed: 'constant' or 'li",
        ),
        (
            "--finetune_batch_size 1",
            "finetune_batch_size is 1; allowed: greater than or equal to",
        ),
        ("--rounds 0", "rounds is 0; allowed: greater than or equal to 1."),
        (
            "--finetune_epochs 0",
            "finetune_epochs is 0; allowed: greater than or equal to 1.",
        ),
        ("--half 0", "half is not a parameter of 04_finetune_sweep; leave it out."),
        ("--limit 33", "limit is 33; allowed: a multiple of 10."),
        ("--limit 0", "limit is 0; allowed: greater than or equal to 20."),
        ("--limit 5000", "limit is 5000; allowed: at most 4000 here."),
        (
            "--square_color blau",
            "square_color is 'blau'; allowed: name of a colour, such as",
        ),
        ("--square_size 2.5", "square_size is 2.5; allowed: a valid integer."),
        ("--epochs True", "epochs is True; allowed: a valid integer."),
        ("--lr 1e999", "lr is inf; allowed: a finite number."),
        (
            "--finetune_lr 0",
            "finetune_lr is 0; allowed: greater than or equal to 0.00000001.",
        ),
        ("--cross_fit 1", "cross_fit is 1; allowed: a valid boolean."),
        (
            "--device abacus",
            "device is 'abacus'; allowed: auto, cpu, or a device of this machine",
        ),
        (
            "--device cuda:99",
            "device is 'cuda:99'; allowed: auto, cpu, or a device of this",
        ),
        ("--metod top_k", "error: unrecognized arguments: --metod top_k"),
        ("--jobs 0", "argument --jobs: invalid choice: 0"),
        ("--jobs x", "argument --jobs: invalid int value: 'x'"),
        ("--dask nowhere", "missing port number in address 'nowhere'"),
    ],
)
def test_options_of_the_command(arguments, message, refused):
    refused(message, "--dataset=mnist5k", *arguments.split())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        ("- sede: 0", "sede is not a setting; allowed: directory, device"),
        ("- seed: [0, -1]", "seed is -1; allowed: greater than or equal to 0."),
        ("- param: 0.1\n- param: much", "param is 'much'; allowed: a valid number."),
        ("- seed: []", "'seed'"),
        ("- notebook: 02_ERM", "notebook is '02_ERM'; allowed: 01_dataset, 02_erm, "),
        (
            "- notebook: 02_erm\n  method: mean",
            "method is not a parameter of 02_erm; leave it out.",
        ),
        ("- 3: 4", "allowed: "),
        ("seed: 0", "allowed: "),
        ("", "allowed: "),
        ("[]", "allowed: "),
        ("- seed: [0", "expected ',' or ']'"),
        ("- !!python/object/apply:os.getpid []", "could not determine a constructor"),
        ("\x00", "unacceptable character"),
    ],
)
def test_grid_files(content, message, refused, tmp_path):
    path = tmp_path / "grid.yaml"
    if content is not None:
        path.write_text(content)
    for part in (f"{path}: ", message):
        refused(part, str(path), "--dataset=mnist5k")


def test_a_directory_that_cannot_be_written_to(capsys):
    """Nothing can be made below /proc, not even by root."""
    arguments = [
        "run",
        "--dataset",
        "mnist5k",
        "--directory",
        "/proc/new",
        "--epochs",
        "1",
    ]
    assert command.main(arguments) == 2
    message = "masktune: directory is '/proc/new'; allowed: a folder to write to, or a new one ("
    assert message in capsys.readouterr().err


PARAMETERS = {
    "02_erm": ({"epoch": 3}, "epoch is not a parameter; allowed: directory, device"),
    "05_plots": (
        {"finetuned_model": "nowhere.pth"},
        "nowhere.pth is not a file; give the path of",
    ),
}


@pytest.mark.parametrize("stem", PARAMETERS)
def test_parameters_of_a_notebook_under_papermill_alone(stem, tmp_path):
    source, target = REPOSITORY / "notebooks" / f"{stem}.ipynb", tmp_path / "out.ipynb"
    values = {"directory": str(tmp_path), "dataset": "mnist5k"} | PARAMETERS[stem][0]
    with pytest.raises(papermill.PapermillExecutionError, match=PARAMETERS[stem][1]):
        papermill.execute_notebook(source, target, values, progress_bar=False)
    assert [*tmp_path.iterdir()] == [target]


# --- images ---


@pytest.fixture
def root(monkeypatch, tmp_path) -> Path:
    """An empty `MASKTUNE_DATA`, and no network."""
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    for name in data.TORCHVISION.values():
        mirrors = f"torchvision.datasets.{name}.mirrors"
        monkeypatch.setattr(mirrors, ["http://127.0.0.1:1/"])
    return tmp_path


@pytest.mark.parametrize("dataset", ["auto", "mnist", "fashion_mnist"])
def test_masktune_data_is_no_folder(dataset, root, refused, monkeypatch):
    (root / "file").touch()
    for path in (str(root / "none"), str(root / "file")):
        monkeypatch.setenv("MASKTUNE_DATA", path)
        message = f"MASKTUNE_DATA is {path!r}; allowed: a folder. Correct or unset it."
        refused(message, f"--dataset={dataset}")


@pytest.mark.parametrize("dataset", data.TORCHVISION)
def test_masktune_data_is_empty_and_there_is_no_network(dataset, root, refused):
    name = data.TORCHVISION[dataset]
    refused(
        f"{name} is neither in {root} nor can it be downloaded", f"--dataset={dataset}"
    )


def test_files_that_are_not_those_of_mnist(root, refused):
    write_idx_files(root / "MNIST" / "raw", list(range(10)))
    message = f"{root}/MNIST/raw holds damaged files (their MD5 is not that of MNIST). Replace"
    for dataset in ("auto", "mnist"):
        refused(message, f"--dataset={dataset}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        (
            "train-images-idx3-ubyte",
            struct.pack(">4i", 0x803, 20, 28, 28) + bytes(28 * 28 * 19),
        ),
        (
            "train-images-idx3-ubyte",
            struct.pack(">4i", 0x803, 20, 20, 20) + bytes(20 * 20 * 20),
        ),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 3) + bytes(3)),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 20) + bytes(range(20))),
        ("t10k-labels-idx1-ubyte", b"<html>not found</html>"),
    ],
)
def test_damaged_files_of_other_sets(name, content, root, refused):
    raw = root / "KMNIST" / "raw"
    write_idx_files(raw, list(range(10)) * 2)
    (raw / name).write_bytes(content)
    refused(f"{raw} holds damaged files (", "--dataset=kmnist")


@pytest.mark.parametrize(
    ("labels", "test_labels", "message"),
    [
        (
            [0, 1],
            [0, 7],
            "kmnist has images of one class only; allowed: 2 classes or more.",
        ),
        (
            [0, 7],
            [8, 9],
            "kmnist has images of one class only; allowed: 2 classes or more.",
        ),
        ([0, 7], [], "holds damaged files"),
    ],
)
def test_one_class_only_and_no_images_at_all(
    labels, test_labels, message, root, refused
):
    write_idx_files(root / "KMNIST" / "raw", labels, test_labels)
    refused(message, "--dataset=kmnist")


def answer_by_half(server: socket.socket) -> None:
    while True:
        connection, _ = server.accept()
        connection.recv(9999)
        connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")
        connection.close()


@pytest.mark.parametrize("replies", [False, True])
def test_a_server_that_is_silent_or_stops_halfway_is_given_up(
    replies, root, monkeypatch
):
    monkeypatch.setattr(models, "SILENCE", 0.3)
    started = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        if replies:
            threading.Thread(target=answer_by_half, args=(server,), daemon=True).start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}/"
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [url])
        reason = r"nor can it be downloaded" + ("" if replies else r".* \(.*timed out")
        with pytest.raises(FileNotFoundError, match=reason):
            data.load(Settings(dataset="mnist"))
        with pytest.warns(UserWarning, match="'mnist5k'"):
            assert data.resolve_dataset("auto") == "mnist5k"
    assert time.monotonic() - started < 8
    assert socket.getdefaulttimeout() is None and not list(root.iterdir())


def test_a_download_is_there_whole_or_not_at_all(root, monkeypatch, tmp_path_factory):
    """Served from this machine, in the files that torchvision expects."""
    source, resources = tmp_path_factory.mktemp("server"), []
    write_idx_files(source / "raw", list(range(10)) * 2)
    for path in sorted((source / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (source / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    wrong = [*resources[:3], (resources[3][0], "0" * 32)]
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=source)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        kind = "torchvision.datasets.KMNIST"
        monkeypatch.setattr(
            f"{kind}.mirrors", [f"http://127.0.0.1:{server.server_port}/"]
        )
        monkeypatch.setattr(f"{kind}.resources", wrong)
        with pytest.raises(FileNotFoundError, match="nor can it be downloaded"):
            data.load(Settings(dataset="kmnist"))
        assert not list(root.iterdir())
        monkeypatch.setattr(f"{kind}.resources", resources)
        assert len(data.load(Settings(dataset="kmnist"))[0]) == 20
        server.shutdown()
    assert [path.name for path in root.iterdir()] == ["KMNIST"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda test: shutil.rmtree(test), "test_folder is '{test}'; allowed: "),
        (
            lambda test: shutil.rmtree(test / "a"),
            "classes are ['a', 'b'], ['b']; allowed: the",
        ),
        (
            lambda test: (test / "b").rename(test / "c"),
            "classes are ['a', 'b'], ['a', 'c']; allo",
        ),
        (lambda test: (test / "b/0.png").unlink(), "no valid file for the classes b"),
        (
            lambda test: (test / "b/0.png").write_text("no image"),
            "1 of 2 images cannot be read: {test}/b/0.png (",
        ),
        (
            lambda test: os.truncate(test / "b/0.png", 60),
            "1 of 2 images cannot be read: {test}/b/0.png (",
        ),
    ],
)
def test_folders_of_images(change, message, refused, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / name / "0.png")
    change(tmp_path / "test")
    folders = [f"--{part}_folder={tmp_path / part}" for part in ("train", "test")]
    refused(message.replace("{test}", f"{tmp_path}/test"), "--dataset=folder", *folders)
