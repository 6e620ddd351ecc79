"""The command `masktune` on tiny data, as a plugin of pytest (PYTEST_DONT_REWRITE)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import MASKTUNE, outcome
from PIL import Image

from masktune_utils.runner import command
from masktune_utils.runner import kernels as kept
from masktune_utils.settings import Settings

TINY = {"dataset": "mnist5k", "limit": 200, "epochs": 2, "batch_size": 20}
OPTIONS = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
OPTIONS += ["--method", "top_k"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def tiny(directory: Path, **settings: object) -> Settings:
    return Settings(**TINY, directory=str(directory), **settings)


def masktune(directory: Path, *arguments: str) -> int:
    """Exit code of `masktune sweep` in this process."""
    return command.main(["sweep", *OPTIONS, "--directory", str(directory), *arguments])


def start(directory: Path, *arguments: str) -> subprocess.Popen:
    """`masktune sweep`, in a process group that hears Ctrl-C even if pytest does not."""
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    )
    code += "from masktune_utils.command import main; sys.exit(main())"
    process = [
        sys.executable,
        "-c",
        code,
        "sweep",
        *OPTIONS,
        "--directory",
        str(directory),
    ]
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    options |= {"start_new_session": True, "env": os.environ | ONE_THREAD}
    return subprocess.Popen([*process, *arguments], **options)


def kernels(process: subprocess.Popen) -> list[psutil.Process]:
    """The kernels that a running command has started."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [
        child for child in family if "ipykernel_launcher" in " ".join(child.cmdline())
    ]


def contents(directory: Path) -> dict[tuple[Path, str], object]:
    """What `masktune` left of the digits with seed 0, by folder and name, see `outcome`."""
    return {
        (folder.relative_to(directory), name): content
        for folder in directory.glob("*/mnist5k*/seed0")
        for name, content in outcome(folder).items()
    }


class Run(NamedTuple):
    directory: Path
    code: int
    printed: str
    error: str


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory) -> Run:
    """`masktune run` with a grid of two blocks: digits, and folders of images in three classes."""
    directory = tmp_path_factory.mktemp("run")
    for part, count in {"train": 20, "test": 5}.items():
        for name, color in {"a": "red", "b": "lime", "c": "blue"}.items():
            (directory / part / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (30 + k, 30), color).save(
                    directory / part / name / f"{k}.png"
                )
    folders = f"train_folder: {directory}/train, test_folder: {directory}/test"
    blocks = (
        "{dataset: mnist5k, limit: 200, param: [0.1, 0.3]}",
        f"{{dataset: folder, {folders}}}",
    )
    (directory / "grid.yaml").write_text("".join(f"- {block}\n" for block in blocks))
    given = [
        "--epochs",
        "2",
        "--batch_size",
        "20",
        "--directory",
        directory,
        "--jobs",
        "2",
    ]
    run = [MASKTUNE, "run", directory / "grid.yaml", *given]
    options = {"capture_output": True, "text": True, "env": os.environ | ONE_THREAD}
    done = subprocess.run(run, check=False, **options)
    return Run(directory, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def one_thread(monkeypatch):
    """Notebooks compute with one thread; no kernel is kept from before, or for later."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kept.close()
    yield
    kept.close()


@pytest.fixture
def all_cores(one_thread, monkeypatch):
    """Notebooks share the cores, whatever the environment says; no kernel is kept from before."""
    monkeypatch.delenv("OMP_NUM_THREADS")


@pytest.fixture
def directory(whole_run, tmp_path) -> Path:
    """A copy of what that left, to do things to."""
    return shutil.copytree(whole_run.directory, tmp_path / "copy")
