"""Progress bars, for people who look on."""

import re
from types import SimpleNamespace

import pytest
from joblib import Parallel, delayed

from masktune_utils import progress


@pytest.fixture
def metadata(monkeypatch) -> dict[str, str]:
    """What the front end sends with a cell; this process looks like a kernel."""
    sent = {}
    shell = SimpleNamespace(kernel=None, get_parent=lambda: {"metadata": sent})
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    return sent


def test_a_notebook_has_a_bar_only_where_a_person_looks_on(metadata, capsys):
    assert progress.bar(range(3), mininterval=0).disable
    assert [*progress.bar(range(3), mininterval=0)] == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    metadata["cellId"] = "03-13"
    assert not progress.bar(range(3)).disable


@pytest.fixture
def terminal(capsys, monkeypatch):
    """Messages go to a terminal, and not to a file."""
    stderr = SimpleNamespace(isatty=lambda: True)
    terminal = SimpleNamespace(stderr=stderr, modules={})
    monkeypatch.setattr(progress, "sys", terminal)
    return capsys


def test_a_terminal_gets_one_line_that_goes_away(terminal):
    assert list(progress.bar(range(3), desc="maps")) == [0, 1, 2]
    assert re.fullmatch(r"\rmaps:   0%.*\r +\r", terminal.readouterr().err)


def has_no_bar() -> bool:
    return progress.bar(range(3)).disable


def test_a_process_that_works_for_another_has_no_bar(terminal):
    assert Parallel(2)([delayed(has_no_bar)()] * 2) == [True, True]
    assert not has_no_bar()
