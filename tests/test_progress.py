"""Progress bars, for people who look on."""

import re
from types import SimpleNamespace

from masktune_utils import progress


def test_a_notebook_has_a_bar_only_where_a_person_looks_on(monkeypatch, capsys):
    metadata = {}  # which the front end sends with a cell
    shell = SimpleNamespace(kernel=None)
    shell.get_parent = lambda: {"metadata": metadata}
    monkeypatch.setattr("IPython.get_ipython", lambda: shell)
    hidden = progress.bar(range(3), mininterval=0)
    assert hidden.disable
    assert list(hidden) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")
    metadata["cellId"] = "03-13"
    assert not progress.bar(range(3)).disable


def test_a_terminal_gets_one_line_that_goes_away(capsys, monkeypatch):
    """A process that works for another has none."""
    stderr = SimpleNamespace(isatty=lambda: True)
    terminal = SimpleNamespace(stderr=stderr, modules={})
    monkeypatch.setattr(progress, "sys", terminal)
    shown = progress.bar(range(3), desc="maps")
    assert list(shown) == [0, 1, 2]
    printed = capsys.readouterr().err
    assert re.fullmatch(r"\rmaps:   0%.*\r +\r", printed)
    worker = SimpleNamespace(name="LokyProcess-1")
    monkeypatch.setattr(progress, "current_process", lambda: worker)
    assert progress.bar(range(3)).disable
