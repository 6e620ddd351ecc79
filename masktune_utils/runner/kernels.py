"""Kernels that execute notebook after notebook; each forgets one before the next."""

import atexit
import contextlib
import gc
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from IPython import get_ipython
from jupyter_client import KernelClient, KernelManager

RESET = "from masktune_utils.runner import kernels; kernels.reset()"
ARGUMENTS = ["--log-level=50", "--HistoryManager.hist_file=:memory:"]
CLIENT = "jupyter_client.asynchronous.AsyncKernelClient"  # what papermill needs

# By their number of threads:
idle_kernels: dict[str, list["Manager"]] = defaultdict(list)
# Of a fresh kernel:
_python_random = random.getstate()
_numpy_random = np.random.get_state()
_torch_random = torch.get_rng_state()
_filters = list(warnings.filters)
_folder = Path.cwd()
_threads = torch.get_num_threads()


class Manager(KernelManager):
    """A kernel manager that knows the client that papermill takes, and leaves open."""

    def client(self, **options: Any) -> KernelClient:
        """See jupyter_client."""
        self.latest = super().client(**options)
        return self.latest


@contextlib.contextmanager
def warm(folder: Path, threads: int) -> Iterator[Manager]:
    """A kernel that is kept for later, unless what it is used for fails.

    Args:
        folder: the working directory of a new one; a kept one stays in its own.
        threads: with which it computes, unless `OMP_NUM_THREADS` is set.

    Raises:
        RuntimeError: it does not start, or no longer answers.
    """
    environment = {"OMP_NUM_THREADS": f"{threads}", **os.environ}
    idle = idle_kernels[environment["OMP_NUM_THREADS"]]
    manager = _idle_or_new(idle)
    try:
        if not manager.is_alive():
            manager.start_kernel(extra_arguments=ARGUMENTS, cwd=folder, env=environment)
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=60)
        # a kernel keeps the order of what it is sent
        client.execute(RESET, store_history=False)
        client.stop_channels()
        yield manager
        manager.latest.stop_channels()
    except BaseException:
        manager.shutdown_kernel(now=True)
        raise
    idle.append(manager)


def _idle_or_new(idle: list[Manager]) -> Manager:
    while True:
        try:
            manager = idle.pop()
        except IndexError:  # there is none, or another thread was quicker
            return Manager(client_class=CLIENT)
        if manager.is_alive():
            return manager


@atexit.register
def close() -> None:
    """End the kernels of this process."""
    for managers in idle_kernels.values():
        for manager in managers:
            manager.shutdown_kernel(now=True)
    idle_kernels.clear()


def reset() -> None:
    """Undo, in a kernel, what a notebook has left behind."""
    from matplotlib import pyplot as plt  # heavy, and of no use to the command

    get_ipython().reset(new_session=True)  # names, In and Out
    plt.close("all")
    gc.collect()  # with the names go models, hooks and images
    gc.freeze()  # what is left are modules; the next collection passes over them
    torch.cuda.empty_cache()
    random.setstate(_python_random)
    np.random.set_state(_numpy_random)
    torch.set_rng_state(_torch_random)
    torch.set_num_threads(_threads)
    os.chdir(_folder)
    warnings.resetwarnings()  # Python also forgets which were shown already
    warnings.filters.extend(_filters)
