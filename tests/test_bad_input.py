"""Bad input: one clear message that names the value and what is allowed, nothing written, an exit code that is not 0."""

import gzip
import hashlib
import http.server
import os
import re
import shutil
import socket
import struct
import threading
from functools import partial
from pathlib import Path

import papermill
import pytest
import torch
from conftest import write_idx_files
from PIL import Image

from masktune_utils import data, evaluation, experiment, masking, models, saliency, sweep, training


def refused(arguments: list[str], message: str, capsys, folder: Path) -> None:
    """Let the command `masktune sweep` end with that message in its last line; what lies in the folder stays as it is."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        sweep.main(["sweep", *arguments])
    printed = capsys.readouterr()
    assert stop.value.code == 2
    assert message in printed.err.strip().splitlines()[-1]
    assert "Traceback" not in printed.err and not printed.out
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--methods foo", "method is 'foo'; allowed: 'threshold', 'top_k', 'mean'"),
        ("-p method foo", "method is 'foo'; allowed: 'threshold', 'top_k', 'mean'"),
        ("-p method 3", "method is 3; allowed: str"),
        ("--params 7", "param is 7.0; allowed for method 'threshold': 0 to 1"),
        ("-p param 7", "param is 7.0; allowed for method 'threshold': 0 to 1"),
        ("--params nan", "param is nan; allowed for method"),
        ("--params x", "argument --params: invalid float value: 'x'"),
        ("-p param much", "param is 'much'; allowed: float"),
        ("-p param [0.1,0.2]", "param is [0.1, 0.2]; allowed: float"),
        ("-p param None", "param is None; allowed: float"),
        (
            "--dataset cifar",
            "dataset is 'cifar'; allowed: 'auto', 'mnist5k', 'mnist', 'fashion_mnist', 'kmnist', 'folder'",
        ),
        ("--dataset folder", "train_folder is ''; allowed with dataset='folder': a folder with a folder of images for"),
        ("-p train_folder pets", "train_folder is 'pets'; allowed: '', unless dataset is 'folder'"),
        ("--seeds x", "argument --seeds: invalid int value: 'x'"),
        ("--seeds -1", "seed is -1; allowed: 0 to 4.29497e+09"),
        ("--seeds 99999999999", "seed is 99999999999; allowed: 0 to 4.29497e+09"),
        ("-p limit 33", "limit is 33; allowed: None, or a multiple of 10 from 20 to 4000"),
        ("-p limit 0", "limit is 0; allowed: None, or a multiple of 10 from 20 to 4000"),
        ("-p limit -20", "limit is -20; allowed: None, or a multiple of 10 from 20 to 4000"),
        ("-p limit 5000", "limit is 5000; allowed: None, or a multiple of 10 from 20 to 4000"),
        ("-p limit many", "limit is 'many'; allowed: int | None"),
        ("-p limit", "-p limit: give a name and values; names: dataset, train_folder"),
        ("-p square_size 0", "square_size is 0; allowed: 1 to 28"),
        ("-p square_size 29", "square_size is 29; allowed: 1 to 28"),
        ("-p square_size 2.5", "square_size is 2.5; allowed: int"),
        ("-p square_color blau", "square_color is 'blau'; allowed: a colour's name, such as 'blue', or '#rrggbb'"),
        ("-p placement left", "placement is 'left'; allowed: 'random', 'ordered'"),
        ("-p square_share_0 1.5", "square_share_0 is 1.5; allowed: 0 to 1"),
        ("-p square_share_1 nan", "square_share_1 is 'nan'; allowed: float"),
        ("-p holdout 0.9", "holdout is 0.9; allowed: 0 to 0.5"),
        ("--epochs 0", "epochs is 0; allowed: 1 to 10000"),
        ("--epochs -3", "epochs is -3; allowed: 1 to 10000"),
        ("-p epochs True", "epochs is True; allowed: int"),
        ("-p batch_size 0", "batch_size is 0; allowed: 2 to 60000"),
        ("-p batch_size -8", "batch_size is -8; allowed: 2 to 60000"),
        ("-p lr 0", "lr is 0.0; allowed: 1e-08 to 10"),
        ("-p lr -0.1", "lr is -0.1; allowed: 1e-08 to 10"),
        ("-p lr 1e999", "lr is inf; allowed: 1e-08 to 10"),
        ("-p cam ScoreCAM", "cam is 'ScoreCAM'; allowed: 'XGradCAM', 'GradCAM'"),
        ("-p upsample map cubic", "upsample is 'cubic'; allowed: 'bilinear', 'nearest', 'map'"),
        ("-p grow -1", "grow is -1; allowed: 0 to 27"),
        ("-p grow 28", "grow is 28; allowed: 0 to 27"),
        ("-p finetune_optimizer lion", "finetune_optimizer is 'lion'; allowed: 'sgd', 'adam'"),
        ("-p finetune_lr 0", "finetune_lr is 0.0; allowed: 1e-08 to 10"),
        ("-p iterations 0", "iterations is 0; allowed: 1 to 100"),
        ("-p accumulate 1", "accumulate is 1; allowed: bool"),
        ("--device abacus", "device is 'abacus'; allowed: 'auto', 'cpu', or a 'cuda' or 'mps' device that is here"),
        ("--device cuda:99", "device is 'cuda:99'; allowed: 'auto', 'cpu', or a 'cuda' or 'mps' device that is here"),
        ("-p metod top_k", "-p metod top_k: give a name and values; names: dataset, train_folder"),
        ("-p momentum 0.5", "-p momentum 0.5: give a name and values"),  # a setting, but of no notebook
        ("--preset papers", "argument --preset: invalid choice: 'papers'"),
        ("--epoch 3", "unknown arguments: --epoch 3"),
        ("--jobs 0", "--jobs is 0; allowed: 1 and more"),
        ("--dask tcp://127.0.0.1:1", "tcp://127.0.0.1:1"),
    ],
)
def test_arguments_of_the_command(arguments, message, capsys, tmp_path):
    directory = ["--dataset", "mnist5k", "--directory", str(tmp_path / "new")]
    refused([*directory, *arguments.split()], message, capsys, tmp_path)


def test_the_directory_is_a_file(capsys, tmp_path):
    (tmp_path / "file").touch()
    for name in ("file", "file/below"):
        message = f"allowed: a folder to write to, or a new one ({tmp_path / 'file'} is a file)"
        refused(["--dataset", "mnist5k", "--directory", str(tmp_path / name)], message, capsys, tmp_path)


def test_the_directory_cannot_be_written_to(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    refused(
        ["--dataset", "mnist5k", "--directory", str(tmp_path)], f"({tmp_path} cannot be written to)", capsys, tmp_path
    )


@pytest.mark.parametrize("stem", ["01_dataset", "02_erm", "03_saliency_masks", "04_finetune_sweep", "05_plots"])
def test_parameters_of_the_notebooks_under_papermill_alone(stem, tmp_path):
    parameters, message = {
        "01_dataset": ({"seed": -1}, "seed is -1; allowed: 0 to"),
        "02_erm": ({"epoch": 3}, "unknown parameter epoch; this notebook has: directory, dataset"),
        "03_saliency_masks": ({"cam": "ScoreCAM"}, "cam is 'ScoreCAM'; allowed: 'XGradCAM'"),
        "04_finetune_sweep": ({"param": "0.1"}, "param is '0.1'; allowed: float"),
        "05_plots": ({"finetuned_model": "nowhere.pth"}, "nowhere.pth is no file; give the path of a checkpoint"),
    }[stem]
    parameters |= {"directory": str(tmp_path), "dataset": "mnist5k"}
    with pytest.raises(papermill.PapermillExecutionError, match=re.escape(message)):
        papermill.execute_notebook(
            sweep.NOTEBOOKS / f"{stem}.ipynb", tmp_path / "out.ipynb", parameters, progress_bar=False
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


# --- data ---


@pytest.fixture
def root(monkeypatch, tmp_path) -> Path:
    """An empty `MASKTUNE_DATA`, and no network."""
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    for name in ("MNIST", "FashionMNIST", "KMNIST"):
        monkeypatch.setattr(f"torchvision.datasets.{name}.mirrors", ["http://127.0.0.1:1/"])
    return tmp_path


@pytest.mark.parametrize("dataset", ["auto", "mnist", "fashion_mnist"])
@pytest.mark.parametrize("kind", ["nowhere", "a file"])
def test_masktune_data_is_no_folder(dataset, kind, monkeypatch, capsys, tmp_path):
    path = tmp_path / "data"
    if kind == "a file":
        path.touch()
    monkeypatch.setenv("MASKTUNE_DATA", str(path))
    message = f"MASKTUNE_DATA is {str(path)!r}; allowed: a folder. Correct it, make the folder, or unset it."
    refused(["--dataset", dataset, "--directory", str(tmp_path)], message, capsys, tmp_path)


@pytest.mark.parametrize("dataset", ["mnist", "fashion_mnist", "kmnist"])
def test_masktune_data_is_empty_and_there_is_no_network(dataset, root, capsys):
    message = f"{data.TORCHVISION[dataset]} is neither in {root} nor can it be downloaded"
    refused(["--dataset", dataset, "--directory", str(root)], message, capsys, root)


def flip(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


@pytest.mark.skipif("MASKTUNE_DATA" not in os.environ, reason="MASKTUNE_DATA does not point at the full MNIST")
@pytest.mark.parametrize("dataset", ["auto", "mnist"])
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("train-images-idx3-ubyte", lambda path: os.truncate(path, 1_000_000)),
        ("train-images-idx3-ubyte", lambda path: flip(path, 12_345)),
        ("train-labels-idx1-ubyte", lambda path: flip(path, 1_234)),
        ("t10k-images-idx3-ubyte", lambda path: flip(path, 0)),
        ("t10k-labels-idx1-ubyte", lambda path: os.truncate(path, 0)),
    ],
)
def test_damaged_files_of_mnist(name, damage, dataset, capsys, monkeypatch, tmp_path):
    whole = data.data_root() / "MNIST" / "raw"
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for path in whole.glob("*ubyte"):
        (shutil.copy if path.name == name else os.symlink)(path, raw / path.name)
    damage(raw / name)
    monkeypatch.setenv("MASKTUNE_DATA", str(tmp_path))
    message = f"{raw} holds damaged files ({name} has another MD5 than MNIST's). Delete them"
    refused(["--dataset", dataset, "--directory", str(tmp_path)], message, capsys, tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", b"\x00\x00"),
        ("train-images-idx3-ubyte", struct.pack(">4i", 0x803, 20, 28, 28) + bytes(28 * 28 * 19)),
        ("train-images-idx3-ubyte", struct.pack(">4i", 0x803, 20, 20, 20) + bytes(20 * 20 * 20)),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 3) + bytes(3)),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 0x801, 20) + bytes(range(20))),
        ("t10k-labels-idx1-ubyte", b"<html>not found</html>"),
        ("t10k-labels-idx1-ubyte", gzip.compress(bytes(20))),
    ],
)
def test_damaged_files_of_other_sets(name, content, root, capsys):
    raw = root / "KMNIST" / "raw"
    write_idx_files(raw, list(range(10)) * 2)
    (raw / name).write_bytes(content)
    message = f"{raw} holds damaged files ("
    refused(["--dataset", "kmnist", "--directory", str(root)], message, capsys, root)


@pytest.mark.parametrize(
    ("labels", "test_labels", "message"),
    [
        ([0, 1, 2], [0, 7], "the training images of 'kmnist' are of the classes [0]; allowed: 2 and more"),
        ([0, 7], [8, 9], "the test images of 'kmnist' are of the classes [1]; allowed: 2 and more"),
        ([0, 7], [], "holds damaged files"),
        ([], [], "holds damaged files"),
    ],
)
def test_one_class_only_and_no_images_at_all(labels, test_labels, message, root, capsys):
    write_idx_files(root / "KMNIST" / "raw", labels, test_labels)
    refused(["--dataset", "kmnist", "--directory", str(root)], message, capsys, root)


def test_a_server_that_never_answers_is_given_up(root, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        monkeypatch.setattr(data, "SILENCE", 0.3)
        with pytest.raises(FileNotFoundError, match=r"nor can it be downloaded \(.*timed out"):
            data.load("mnist")
        with pytest.warns(UserWarning, match="'mnist5k'"):
            assert data.resolve_dataset("auto") == "mnist5k"
    assert socket.getdefaulttimeout() is None and not list(root.iterdir())


def test_a_server_that_stops_halfway_leaves_nothing_behind(root, monkeypatch):
    def answer(server):
        while True:
            connection, _ = server.accept()
            connection.recv(9999)
            connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Length: 9999\r\n\r\nhalf")
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=answer, args=(server,), daemon=True).start()
        monkeypatch.setattr("torchvision.datasets.MNIST.mirrors", [f"http://127.0.0.1:{server.getsockname()[1]}/"])
        with pytest.raises(FileNotFoundError, match="nor can it be downloaded"):
            data.load("mnist")
    assert not list(root.iterdir())


def test_a_download_is_there_whole_or_not_at_all(root, monkeypatch, tmp_path_factory):
    """Served from this machine, in the files that torchvision asks for."""
    source = tmp_path_factory.mktemp("server")
    write_idx_files(source / "raw", list(range(10)) * 2)
    resources = []
    for path in sorted((source / "raw").iterdir()):
        packed = gzip.compress(path.read_bytes())
        (source / f"{path.name}.gz").write_bytes(packed)
        resources.append((f"{path.name}.gz", hashlib.md5(packed).hexdigest()))
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=source)
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("torchvision.datasets.KMNIST.mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        monkeypatch.setattr("torchvision.datasets.KMNIST.resources", [*resources[:3], (resources[3][0], "0" * 32)])
        with pytest.raises(FileNotFoundError, match="nor can it be downloaded"):
            data.load("kmnist")
        assert not list(root.iterdir())
        monkeypatch.setattr("torchvision.datasets.KMNIST.resources", resources)
        assert len(data.load("kmnist").train) == 20
        server.shutdown()
    names = {path.name for path in (root / "KMNIST" / "raw").iterdir()}
    assert {name.removesuffix(".gz") for name, _ in resources} <= names and len(list(root.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: shutil.rmtree(root / "train" / "a"), "has the classes ['b'] and test_folder"),
        (lambda root: (root / "test" / "a").rename(root / "test" / "c"), "['b', 'c']; allowed: 2 to 10, with the same"),
        (lambda root: (root / "test" / "b" / "0.png").unlink(), "lacks images in a folder for each class"),
        (
            lambda root: [shutil.rmtree(root / "test" / name) for name in "ab"],
            "lacks images in a folder for each class",
        ),
        (
            lambda root: (root / "train" / "a" / "0.png").write_bytes(b"no image"),
            "train/a/0.png cannot be read as an image",
        ),
        (lambda root: os.truncate(root / "train" / "a" / "0.png", 60), "train/a/0.png cannot be read as an image"),
        (lambda root: shutil.rmtree(root / "test"), "test_folder is '{root}/test'; allowed with dataset='folder'"),
    ],
)
def test_folders_of_images(change, message, capsys, tmp_path):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (40, 40), "red").save(tmp_path / name / "0.png")
    change(tmp_path)
    folders = ["-p", "train_folder", str(tmp_path / "train"), "-p", "test_folder", str(tmp_path / "test")]
    arguments = ["--dataset", "folder", *folders, "--directory", str(tmp_path)]
    refused(arguments, message.replace("{root}", str(tmp_path)), capsys, tmp_path)


# --- the package's own functions ---

IMAGES = torch.zeros(4, 3, 28, 28)
LABELS = torch.tensor([0, 1, 0, 1])
MAPS = torch.zeros(4, 8, 8)


def split(images: torch.Tensor = IMAGES, labels: torch.Tensor = LABELS, squares: int = 4) -> data.Split:
    return data.Split(images, labels, labels, torch.zeros(squares, dtype=torch.bool))


class WrongLayer(models.SmallCNN):
    def get_grad_cam_target_layer(self):
        return "backbone.10"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: split(IMAGES.numpy()), TypeError, "images are a ndarray; allowed: a tensor"),
        (lambda: split(labels=[0, 1, 0, 1]), TypeError, "labels are a list; allowed: a tensor"),
        (lambda: split(IMAGES[:, 0]), ValueError, "images are 4×28×28; allowed: N×C×H×W"),
        (lambda: split(IMAGES.int()), TypeError, "images are torch.int32; allowed: uint8, or floating point in [0, 1]"),
        (lambda: split(IMAGES + 255), ValueError, "images are from 255 to 255; allowed: 0 to 1, or uint8"),
        (lambda: split(IMAGES / 0), ValueError, "images are from nan to nan; allowed: 0 to 1, or uint8"),
        (lambda: split(labels=LABELS.float()), TypeError, "labels are torch.float32; allowed: int64"),
        (lambda: split(labels=LABELS - 1), ValueError, "a label is -1; allowed: 0, 1"),
        (lambda: split(labels=LABELS[:3]), ValueError, "4 images and 3 labels; give one label an image"),
        (lambda: split(squares=3), ValueError, "4 images and 3 has_square; give one an image"),
        (lambda: data.load("mnist5k", square_size=40), ValueError, "square_size is 40; allowed: 1 to 28"),
        (lambda: data.load("mnist5k", square_shares=(2, 0)), ValueError, "square_share_0 is 2; allowed: 0 to 1"),
        (lambda: data.load("mnist5k", holdout="0.1"), TypeError, "holdout is '0.1'; allowed: a number from 0 to 0.5"),
        (lambda: saliency.saliency_maps(torch.nn.Flatten(), IMAGES, LABELS), TypeError, "Flatten does not say which"),
        (
            lambda: saliency.saliency_maps(WrongLayer(), IMAGES, LABELS),
            TypeError,
            "WrongLayer does not say which layer",
        ),
        (lambda: saliency.saliency_maps(models.SmallCNN(), IMAGES, LABELS, "CAM"), ValueError, "cam is 'CAM'; allowed"),
        (
            lambda: saliency.saliency_maps(models.SmallCNN(), IMAGES[0], LABELS),
            ValueError,
            "images are 3×28×28; allowed",
        ),
        (
            lambda: saliency.saliency_maps(models.SmallCNN(), IMAGES, LABELS + 1),
            ValueError,
            "a label is 2; allowed: less than 2",
        ),
        (
            lambda: training.train(models.SmallCNN(), split(labels=LABELS + 1), epochs=1),
            ValueError,
            "a label is 2; allowed: less",
        ),
        (
            lambda: training.train(models.SmallCNN(), split()[:1], epochs=1),
            ValueError,
            "1 images to train on; allowed: 2 and",
        ),
        (lambda: training.train(models.SmallCNN(), split(), epochs=0), ValueError, "epochs is 0; allowed: 1 to 10000"),
        (
            lambda: training.train(models.SmallCNN(), split(), epochs=1, batch_size=-1),
            ValueError,
            "batch_size is -1; allowed",
        ),
        (
            lambda: training.train(models.SmallCNN(), split(), epochs=1, lr="fast"),
            TypeError,
            "lr is 'fast'; allowed: a number",
        ),
        (
            lambda: training.train(models.SmallCNN(), split(), epochs=1, optimizer="lion"),
            ValueError,
            "optimizer is 'lion'",
        ),
        (
            lambda: masking.create_mask(MAPS[0, 0], "mean", 1),
            ValueError,
            "a saliency map has 1 dimensions; allowed: ...×H×W",
        ),
        (
            lambda: masking.create_mask(MAPS.int(), "mean", 1),
            TypeError,
            "saliency maps are torch.int32; allowed: floating",
        ),
        (
            lambda: masking.create_mask(MAPS, "mean", "1"),
            TypeError,
            "param is '1'; allowed for method 'mean': a number from",
        ),
        (
            lambda: masking.create_mask(MAPS, "random", 0.1),
            ValueError,
            "method is 'random'; allowed: 'threshold', 'top_k'",
        ),
        (lambda: masking.image_masks(MAPS, "mean", 1, grow=-1), ValueError, "grow is -1; allowed: 0 to 27"),
        (
            lambda: masking.apply_mask(IMAGES, MAPS, "map"),
            ValueError,
            "upsample is 'map'; allowed: 'bilinear', 'nearest'",
        ),
        (
            lambda: masking.mask_dataset(split(), MAPS[:3], "mean", 1),
            ValueError,
            "4 images and 3 saliency maps; give one map",
        ),
        (
            lambda: masking.mask_dataset(split(), MAPS, "mean", 99),
            ValueError,
            "param is 99; allowed for method 'mean': 0 to 64",
        ),
        (
            lambda: evaluation.metrics(torch.zeros(4, 2), LABELS[:3]),
            ValueError,
            "4 predictions and 3 labels; allowed: one",
        ),
        (
            lambda: evaluation.metrics(torch.zeros(0, 2), LABELS[:0]),
            ValueError,
            "0 predictions and 0 labels; allowed: one",
        ),
        (lambda: evaluation.metrics(torch.zeros(4, 2), LABELS + 1), ValueError, "labels are 1 to 2; allowed: 0 to 1"),
        (lambda: experiment.load_checkpoint("none.pth"), FileNotFoundError, "none.pth is no file; give the path of a"),
        (lambda: experiment.load_checkpoint("/"), FileNotFoundError, "/ is no file; give the path of a checkpoint"),
        (lambda: experiment.Settings(seed="0"), TypeError, "seed is '0'; allowed: int"),
        (lambda: experiment.Settings(retrain=1), TypeError, "retrain is 1; allowed: bool"),
    ],
)
def test_arguments_of_functions(call, error, message):
    with pytest.raises(error, match=re.escape(message)):
        call()
