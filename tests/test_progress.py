"""Progress bars, for people and for logs; `test_sweep.py` has that of a running notebook."""

import re
import time
from types import SimpleNamespace

import pytest

from masktune_utils import progress


@pytest.fixture
def kernel(monkeypatch) -> dict[str, str]:
    """Let this process look like a kernel; what the front end sends with the cell."""
    metadata = {}
    shell = SimpleNamespace(kernel=None, get_parent=lambda: {"metadata": metadata})
    monkeypatch.setattr(progress, "get_ipython", lambda: shell)
    return metadata


def test_a_person_looks_on_if_the_front_end_names_the_cell(kernel):
    assert not progress.is_live()
    kernel["cellId"] = "03-13"
    assert progress.is_live()


def test_a_headless_notebook_prints_a_line_every_five_seconds_and_none_for_short_work(
    kernel, capsys
):
    assert list(progress.bar(range(1000))) == list(range(1000))
    assert capsys.readouterr().out == ""
    started = time.time()
    with progress.bar(total=100, desc="ERM") as bar:
        for second in range(20):
            bar._time = lambda now=started + second: now  # the bar's clock
            bar.update(5)
    lines = [line for line in capsys.readouterr().out.split("\r") if line.strip()]
    assert 3 <= len(lines) <= 5 and lines[-1].startswith("ERM: 100%")


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
