"""Progress with the time left, for people who look on and for logs."""

import sys
from typing import Any

from IPython import get_ipython
from tqdm import auto, std


def is_live() -> bool:
    """Whether a person runs this cell: JupyterLab names the cell to the kernel; papermill, nbval, nbconvert do not."""
    shell = get_ipython()
    return hasattr(shell, "kernel") and "cellId" in shell.get_parent().get("metadata", {})


def bar(*args: Any, **options: Any) -> std.tqdm:
    """A progress bar of tqdm: a widget in JupyterLab, a line in a terminal; neither is left behind.

    In a notebook that no one looks at it is a line of output every five seconds, for papermill's log; what takes less
    than that prints none.

    Args:
        *args: as of tqdm.
        **options: as of tqdm.
    """
    if hasattr(get_ipython(), "kernel") and not is_live():
        return std.tqdm(*args, **options | {"file": sys.stdout, "mininterval": 5, "delay": 5, "ncols": 120})
    return auto.tqdm(*args, leave=False, **options)
