"""The command `masktune` on tiny data, as a plugin of pytest (PYTEST_DONT_REWRITE)."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from conftest import MASKTUNE, TINY

from masktune_utils.runner import command
from masktune_utils.settings import Settings

OPTIONS = []  # of the command
for setting, value in TINY.items():
    OPTIONS += [f"--{setting}", str(value)]
OPTIONS += ["--method", "top_k"]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# A process group of its own does not hear Ctrl-C, unless it is told to.
SWEEP = """
import signal, sys
from masktune_utils.runner.command import main
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(main())
"""


def tiny(directory, **settings):
    return Settings(**(TINY | settings), directory=str(directory))


def sweep(directory, *arguments):
    """The arguments of `masktune sweep`."""
    return ["sweep", *OPTIONS, "--directory", str(directory), *arguments]


def masktune(directory, *arguments):
    """Exit code of `masktune sweep` in this process."""
    return command.main(sweep(directory, *arguments))


def start(directory, *arguments):
    """`masktune sweep` in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SWEEP, *sweep(directory, *arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | ONE_THREAD,
    )


def kernels_of(pid):
    """The kernels that a process has started."""
    family = psutil.Process(pid).children(recursive=True)
    return [child for child in family if "ipykernel_launcher" in child.cmdline()]


class Run(NamedTuple):
    """What a finished `masktune run` left, and what it printed."""

    directory: Path
    printed: str


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, worker_id) -> Run:
    """`masktune run` with two configurations, which all processes of pytest share."""
    directory = tmp_path_factory.getbasetemp() / "run"
    if worker_id != "master":  # each process has a folder of its own in a shared one
        directory = directory.parents[1] / "run"
    printed = directory.with_suffix(".txt")
    with directory.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            options = [*OPTIONS, "--param", "0.1", "0.3", "--directory", directory]
            printed.write_text(
                subprocess.check_output(
                    [MASKTUNE, "run", *options],
                    text=True,
                    env=os.environ | ONE_THREAD,
                )
            )
    return Run(directory, printed.read_text())


@pytest.fixture
def one_thread(monkeypatch):
    """Notebooks compute with one thread, as in that run."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def directory(whole_run, tmp_path) -> Path:
    """A copy of what that run left, to do things to."""
    return shutil.copytree(whole_run.directory, tmp_path / "copy")
