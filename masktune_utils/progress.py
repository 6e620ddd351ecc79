"""Progress bars, for people who look on and for logs."""

import contextlib
import io
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from IPython import get_ipython
from tqdm import auto, std

_is_silent = ContextVar("_is_silent", default=False)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Show no bars in this block; the caller has one for all of it."""
    token = _is_silent.set(True)
    try:
        yield
    finally:
        _is_silent.reset(token)


def is_live() -> bool:
    """Whether a person runs this cell.

    JupyterLab sends the cell's ID; papermill, nbval and nbconvert do not.
    """
    shell = get_ipython()
    return hasattr(shell, "kernel") and "cellId" in shell.get_parent().get(
        "metadata", {}
    )


def bar(*args: Any, **options: Any) -> std.tqdm:
    """A tqdm progress bar: a widget in JupyterLab, a line in a terminal.

    It goes away when it is done.
    In a notebook that runs headless, it prints a line every five seconds, and nothing
    for shorter work.

    Args:
        *args: see tqdm.
        **options: see tqdm.
    """
    if _is_silent.get():
        return std.tqdm(*args, **{**options, "disable": True})
    if hasattr(get_ipython(), "kernel") and not is_live():
        headless = {"file": sys.stdout, "mininterval": 5, "delay": 5, "ncols": 110}
        return std.tqdm(*args, **{**options, **headless})
    return auto.tqdm(*args, leave=False, **options)


class Bars(io.TextIOBase):
    """Passes on the bars that a headless notebook prints, and nothing else."""

    def write(self, text: str) -> int:
        """Write to stderr."""
        return sys.stderr.write(text) if text.startswith("\r") else 0
