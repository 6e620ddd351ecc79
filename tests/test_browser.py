"""The panels in JupyterLab, in a browser without a window."""

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import write_notebook

from masktune_utils.settings import REPOSITORY

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

CHROMIUM = shutil.which("chromium")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium-driver"),
]
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--window-size=1200,3000",  # JupyterLab draws only the cells that are seen
]
MOVE_SQUARE = """
from masktune_utils import datasets, models, panels
from masktune_utils.settings import Settings
settings = Settings(dataset="mnist5k", limit=200, conflicting_share=0.2, device="cpu")
panels.move_square({"network": models.new_model(0)}, datasets.eight(settings))
"""
EXPLORE = """
from test_plotting import choice_of_two
panels.explore(choice_of_two(datasets.load(settings).train))
"""
POINT = """
from masktune_utils import training
splits = datasets.load(settings)
network = models.new_model(0)
training.train(network, splits.train, epochs=5, batch_size=20)
panels.point(network, splits.biased[::5], splits.train)
"""
KERNEL = "jupyterapp.shell.currentWidget.sessionContext.session.kernel"


@pytest.fixture
def address(tmp_path):
    """JupyterLab with a notebook that has a panel in each cell, `panels.ipynb`."""
    write_notebook(tmp_path / "panels.ipynb", [MOVE_SQUARE, EXPLORE, POINT])
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    tests = Path(__file__).parent
    server = subprocess.Popen(
        [
            *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
            *("--expose-app-in-browser", "--IdentityProvider.token="),
            f"--ServerApp.root_dir={tmp_path}",
            f"--ServerApp.port={port}",
        ],
        env={
            **os.environ,
            "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tests}",
            "JUPYTER_CONFIG_DIR": str(tmp_path),
        },
        stderr=(tmp_path / "log.txt").open("w"),
    )
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait()


@pytest.fixture
def browser():
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in FLAGS:
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


def test_each_panel_answers(address, browser):
    not_yet = [WebDriverException, IndexError, TypeError]
    wait = WebDriverWait(browser, 120, ignored_exceptions=not_yet)

    def cell(number):
        return browser.find_elements(By.CLASS_NAME, "jp-CodeCell")[number]

    def picture(number):
        images = cell(number).find_elements(By.TAG_NAME, "img")
        return images[-1].get_attribute("src")

    def worst_class():
        return re.search(r"worst class \(.*\) has (\d+)%", cell(2).text)[1]

    wait.until(lambda _: browser.get(f"{address}/doc/tree/panels.ipynb") is None)
    wait.until(lambda _: browser.execute_script(f"return {KERNEL}.status") == "idle")
    browser.execute_script("jupyterapp.commands.execute('notebook:run-all-cells')")
    before = wait.until(lambda _: picture(0))
    handle = cell(0).find_elements(By.CLASS_NAME, "noUi-handle")[1]
    handle.send_keys(Keys.ARROW_RIGHT)
    wait.until(lambda _: picture(0) != before)
    assert "Error" not in cell(0).text

    before = wait.until(lambda _: picture(1))
    Select(cell(1).find_element(By.TAG_NAME, "select")).select_by_value("b")
    wait.until(lambda _: 'By hand: "b"' in cell(1).text)
    wait.until(lambda _: picture(1) != before)

    before = wait.until(lambda _: worst_class())
    handle = cell(2).find_elements(By.CLASS_NAME, "noUi-handle")[0]
    handle.send_keys(6 * Keys.ARROW_RIGHT)  # only a row of the corner is left
    wait.until(lambda _: worst_class() != before)
    cell(2).find_element(By.CLASS_NAME, "widget-button").click()
    wait.until(lambda _: "Once it is hidden:" in cell(2).text)
    assert "Error" not in cell(2).text
    _, found, hidden = cell(2).text.split("If the ")
    assert not found.startswith(hidden)  # the network is another one
