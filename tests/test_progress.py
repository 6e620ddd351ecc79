import io
import re
import time
from types import SimpleNamespace

import nbclient
import nbformat

from masktune_utils import progress


def pretend(monkeypatch, metadata):
    """Let this process look like a kernel whose front end sent that metadata with the cell."""
    shell = SimpleNamespace(kernel=None, get_parent=lambda: {"metadata": metadata})
    monkeypatch.setattr(progress, "get_ipython", lambda: shell)


def test_a_person_is_there_where_the_front_end_names_the_cell(monkeypatch):
    assert not progress.is_live()  # no notebook at all
    pretend(monkeypatch, {"cellId": "03-13"})
    assert progress.is_live()
    pretend(monkeypatch, {})
    assert not progress.is_live()


def test_a_notebook_run_headless_is_not_live(monkeypatch):
    monkeypatch.setenv("JPY_SESSION_NAME", "notebook.ipynb")  # as where papermill is started from within JupyterLab
    cell = nbformat.v4.new_code_cell("from masktune_utils import progress\nprint(progress.is_live())")
    notebook = nbclient.execute(nbformat.v4.new_notebook(cells=[cell]))
    assert notebook.cells[0].outputs[0].text == "False\n"


def test_a_headless_notebook_prints_a_line_every_few_seconds_and_none_for_what_is_quick(monkeypatch):
    pretend(monkeypatch, {})
    printed = io.StringIO()
    monkeypatch.setattr("sys.stdout", printed)
    assert list(progress.bar(range(1000))) == list(range(1000))
    assert printed.getvalue() == ""
    started = time.time()
    with progress.bar(total=100, desc="ERM") as bar:
        for second in range(20):
            now = started + second
            bar._time = lambda now=now: now  # the bar's clock
            bar.update(5)
    lines = [line for line in printed.getvalue().split("\r") if line.strip()]
    assert 3 <= len(lines) <= 5 and lines[-1].startswith("ERM: 100%")


def test_a_terminal_gets_one_line_that_goes_away(capsys):
    assert list(progress.bar(range(3), desc="maps")) == [0, 1, 2]
    assert re.fullmatch(r"\rmaps:   0%.*\r +\r", capsys.readouterr().err)
