"""Kernels that execute notebook after notebook; each forgets one before the next.

It forgets names, the random state of PyTorch, NumPy and Python, the number of threads,
and warnings: what notebooks change. The rest stays as it is: the working
directory, the environment, options of libraries.
"""

import atexit
import contextlib
import gc
import os
import random
import warnings
from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from IPython import get_ipython
from jupyter_client import KernelClient, KernelManager

RESET = "from masktune_utils.runner import kernels; kernels.reset()"
ARGUMENTS = ["--log-level=50", "--HistoryManager.hist_file=:memory:"]

# How a kernel is made as it was, and how it was when it was fresh.
FRESH = [
    (random.setstate, random.getstate()),
    (np.random.set_state, np.random.get_state()),
    (torch.set_rng_state, torch.get_rng_state()),
    (torch.set_num_threads, torch.get_num_threads()),
    (warnings.filters.extend, list(warnings.filters)),
]


class Manager(KernelManager):
    """A kernel manager that knows the client that papermill takes, and leaves open."""

    client_class = "jupyter_client.asynchronous.AsyncKernelClient"  # for papermill

    def client(self, **options: object) -> KernelClient:
        """See jupyter_client."""
        self.latest = super().client(**options)
        return self.latest


# Kernels that are kept for later: number of cores → kernels.
idle = defaultdict(list)


@contextlib.contextmanager
def take(cores: int) -> Iterator[Manager]:
    """A kernel that has forgotten what it did before; kept, unless its use fails.

    Args:
        cores: how many it uses; as many threads, unless `OMP_NUM_THREADS` is set.

    Raises:
        RuntimeError: it cannot forget.
        TimeoutError: it does not start or answer.
    """
    try:
        manager = idle[cores].pop()
    except IndexError:  # there is none, or another thread was quicker
        manager = Manager()
    try:
        if not manager.is_alive():
            manager.start_kernel(
                extra_arguments=ARGUMENTS,
                env={
                    "OMP_NUM_THREADS": f"{cores}",
                    **os.environ,
                    "LOKY_MAX_CPU_COUNT": f"{cores}",
                    # A torch.py in the working directory is not imported.
                    "PYTHONSAFEPATH": "1",
                },
            )
        client = manager.blocking_client()
        client.start_channels()
        # In this time a new kernel starts, and imports PyTorch.
        reply = client.execute(RESET, store_history=False, reply=True, timeout=120)
        client.stop_channels()
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"a kernel cannot forget: {reply['content']}")
        yield manager
        manager.latest.stop_channels()
    except BaseException:
        manager.shutdown_kernel(now=True)
        raise
    idle[cores].append(manager)


@atexit.register
def close() -> None:
    """End the kernels that are kept."""
    for managers in idle.values():
        for manager in managers:
            manager.shutdown_kernel(now=True)
    idle.clear()


def reset() -> None:
    """Undo, in a kernel, what a notebook has left behind."""
    get_ipython().reset(new_session=True)  # names, In and Out
    gc.collect()  # with the names go models, hooks and images
    torch.cuda.empty_cache()
    warnings.resetwarnings()  # Python also forgets which were shown already
    for restore, value in FRESH:
        restore(value)
