"""The panel in JupyterLab, seen and moved in a real browser."""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import psutil
import pytest
from conftest import TINY
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from masktune_utils.runner import jobs

playwright = pytest.importorskip(
    "playwright.sync_api", reason="needs pip install playwright"
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
FLAGS += "--disable-component-update --disable-sync"
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs apt-get install chromium"
)


@pytest.fixture
def lab(tmp_path):
    """Address of notebook 03, with tiny parameters, in a JupyterLab."""
    values = TINY | {"directory": str(tmp_path)}
    notebook = load_notebook_node(str(jobs.NOTEBOOKS / "03_saliency_masks.ipynb"))
    nbformat.write(parameterize_notebook(notebook, values), tmp_path / "03.ipynb")
    options = ["--no-browser", "--allow-root", f"--ServerApp.root_dir={tmp_path}"]
    options.append("--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate")
    kinds = ["JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"]
    kinds += ["JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"]
    environment = os.environ | {kind: str(tmp_path / kind) for kind in kinds}
    with (tmp_path / "log").open("w") as log:
        command = [sys.executable, "-m", "jupyterlab", *options]
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    address = re.compile(r"(http://127.0.0.1:\d+/lab)(\?token=\w+)")
    log = tmp_path / "log"
    try:
        wait(lambda: address.search(log.read_text()), log)
        yield address.search(log.read_text()).expand(r"\1/tree/03.ipynb\2")
    finally:
        process = psutil.Process(server.pid)
        family = [process, *process.children(recursive=True)]
        server.terminate()  # and its kernels with it
        for left in psutil.wait_procs(family, timeout=10)[1]:
            left.kill()


def wait(ready: Callable, log: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)


@pytest.fixture
def page(tmp_path):
    """An empty page of a browser."""
    flags = [*FLAGS.split(), *["--no-sandbox"] * (os.geteuid() == 0)]
    options = {"executable_path": BROWSER, "args": flags}
    with playwright.sync_playwright() as driver:
        launch = driver.chromium.launch_persistent_context
        browser = launch(tmp_path / "profile", **options)
        yield browser.pages[0]
        browser.close()


@pytest.mark.slow
def test_the_picture_follows_the_slider(lab, page, tmp_path):
    page.goto(lab)
    page.get_by_text("| Idle").wait_for(timeout=60_000)
    page.locator(".lm-MenuBar-item", has_text="Run").click()
    page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
    picture = page.locator(".widget-interact .jp-OutputArea img")
    picture.wait_for(timeout=90_000)
    before = picture.get_attribute("src")
    slider = page.locator(".widget-slider", has_text="param").get_by_role("slider")
    for _ in range(2):  # one step need not be enough for another cell
        slider.press("ArrowRight")
    playwright.expect(picture).not_to_have_attribute("src", before, timeout=10_000)
    wide = "image => image.complete && image.naturalWidth > 500"
    wait(lambda: picture.evaluate(wide), tmp_path / "log", seconds=10)
