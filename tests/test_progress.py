"""Progress bars, for people and for logs; that of the command is in test_sweep.py."""

import re
from types import SimpleNamespace

import pytest

from masktune_utils import progress


@pytest.fixture
def metadata(monkeypatch) -> dict[str, str]:
    """What the front end sends with a cell; this process looks like a kernel."""
    sent = {}
    shell = SimpleNamespace(kernel=None, get_parent=lambda: {"metadata": sent})
    monkeypatch.setattr(progress, "get_ipython", lambda: shell)
    return sent


def test_a_person_looks_on_if_the_front_end_names_the_cell(metadata):
    assert not progress.is_live()
    metadata["cellId"] = "03-13"
    assert progress.is_live()


@pytest.mark.usefixtures("metadata")
def test_a_headless_notebook_prints_nothing_for_short_work(capsys):
    assert list(progress.bar(range(1000))) == list(range(1000))
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("metadata")
def test_a_headless_notebook_prints_a_line_every_five_seconds(capsys, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("tqdm.std.time", lambda: clock.now)
    with progress.bar(total=100, desc="ERM") as bar:
        for _ in range(20):
            bar.update(5)
            clock.now += 1
    lines = [line for line in capsys.readouterr().out.split("\r") if line.strip()]
    assert 3 <= len(lines) <= 5
    assert lines[-1].startswith("ERM: 100%")


def test_of_what_a_headless_notebook_prints_the_command_shows_the_bars_alone(capsys):
    for text in ("Images: mnist.\n", "\rERM:  24%|##   |", "epoch 3\n"):
        progress.Bars().write(text)
    assert capsys.readouterr() == ("", "\rERM:  24%|##   |")


def test_a_terminal_gets_one_line_that_goes_away(capsys):
    assert list(progress.bar(range(3), desc="maps")) == [0, 1, 2]
    assert re.fullmatch(r"\rmaps:   0%.*\r +\r", capsys.readouterr().err)


def test_bars_are_silent_where_there_is_one_for_the_whole(capsys):
    with progress.silence():
        assert [*progress.bar(range(3), mininterval=0)] == [0, 1, 2]
        with progress.bar(total=2) as bar:
            assert not bar.update(1)
    assert capsys.readouterr() == ("", "")
    assert [*progress.bar(range(3), mininterval=0)] == [0, 1, 2]
    assert "3/3" in capsys.readouterr().err
