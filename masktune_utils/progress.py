"""Progress bars, for people who look on."""

import sys
from multiprocessing import current_process
from typing import Any

from tqdm import auto


def is_live() -> bool:
    """Whether a person runs this cell.

    JupyterLab sends the cell's ID; papermill, nbval and nbconvert do not.
    """
    ipython = sys.modules.get("IPython")  # a kernel has imported it
    shell = ipython and ipython.get_ipython()
    return hasattr(shell, "kernel") and "cellId" in shell.get_parent().get(
        "metadata", {}
    )


def bar(*args: Any, **options: Any) -> auto.tqdm:
    """A tqdm progress bar: a widget in JupyterLab, a line in a terminal.

    It goes away when it is done. A notebook that runs headless has none, nor has a
    process that works for another, or one whose messages go to a file.

    Args:
        *args: see tqdm.
        **options: see tqdm.
    """
    is_worker = current_process().name != "MainProcess"
    is_seen = is_live() or sys.stderr.isatty()
    return auto.tqdm(*args, leave=False, disable=is_worker or not is_seen, **options)
