"""The panel in JupyterLab, seen and moved in a real browser."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import psutil
import pytest

from masktune_utils import sweep

playwright = pytest.importorskip("playwright.sync_api", reason="needs pip install playwright")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
TINY = {"dataset": "mnist5k", "epochs": 1, "limit": 200}
pytestmark = pytest.mark.skipif(BROWSER is None, reason="needs apt-get install chromium")


@pytest.fixture
def lab(tmp_path):
    """Address of a JupyterLab over a copy of notebook 03 with tiny parameters."""
    folder, token = tmp_path / "notebooks", os.urandom(16).hex()
    folder.mkdir()
    notebook = nbformat.read(sweep.NOTEBOOKS / "03_saliency_masks.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", []))
    for name, value in (TINY | {"directory": str(tmp_path)}).items():
        line = f"{name} = {value!r}"
        cell.source = re.sub(rf"^{name} = .*$", line, cell.source, flags=re.MULTILINE)
    nbformat.write(notebook, folder / "03.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", f"--port={port}", "--ServerApp.port_retries=0", "--allow-root"]
    options += [f"--ServerApp.root_dir={folder}", f"--IdentityProvider.token={token}"]
    options.append("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    kinds = ("JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {kind: str(tmp_path / kind) for kind in kinds}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        wait(lambda: answers(f"http://127.0.0.1:{port}/api/status?token={token}"), tmp_path / "log")
        yield f"http://127.0.0.1:{port}/lab/tree/03.ipynb?token={token}"
    finally:
        end(server)


def wait(ready, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


def answers(address: str) -> bool:
    try:
        return urllib.request.urlopen(address, timeout=5).status == 200
    except OSError:
        return False


def end(server: subprocess.Popen) -> None:
    """Ask the server to end with its kernels, and kill what is left after ten seconds."""
    family = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    server.send_signal(signal.SIGTERM)
    for left in psutil.wait_procs(family, timeout=10)[1]:
        left.kill()
    server.wait()


def test_the_picture_follows_the_slider(lab, tmp_path):
    with playwright.sync_playwright() as driver:
        flags = [*FLAGS.split(), *["--no-sandbox"] * (os.geteuid() == 0)]
        options = {"executable_path": BROWSER, "args": flags}
        options |= {"viewport": {"width": 1400, "height": 1000}}
        browser = driver.chromium.launch_persistent_context(tmp_path / "profile", **options)
        page = browser.pages[0]
        page.goto(lab)
        page.get_by_text("| Idle").wait_for(timeout=60_000)
        page.locator(".lm-MenuBar-item", has_text="Run").click()
        page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
        picture = page.locator(".widget-interact .jp-OutputArea img")
        picture.wait_for(timeout=90_000)
        before = picture.get_attribute("src")
        slider = page.locator(".widget-slider", has_text="param").get_by_role("slider")
        for _ in range(10):  # one step need not be enough for another cell
            slider.press("ArrowRight")
        playwright.expect(picture).not_to_have_attribute("src", before, timeout=10_000)
        wide = "image => image.complete && image.naturalWidth > 500"
        wait(lambda: picture.evaluate(wide), tmp_path / "log", seconds=10)
        browser.close()
