"""Kernels that execute notebook after notebook; each forgets one before the next."""

import atexit
import contextlib
import gc
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from IPython import get_ipython
from jupyter_client import KernelClient, KernelManager

RESET = "from masktune_utils.runner import kernels; kernels.reset()"
ARGUMENTS = ["--log-level=50", "--HistoryManager.hist_file=:memory:"]
CLIENT = "jupyter_client.asynchronous.AsyncKernelClient"  # what papermill needs
PATIENCE = 60  # seconds

# Of a fresh kernel:
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


# Kernels that are kept for later: number of threads → kernels.
idle: dict[str, list[Manager]] = defaultdict(list)


@contextlib.contextmanager
def take(threads: int) -> Iterator[Manager]:
    """A kernel that has forgotten what it did before; kept, unless its use fails.

    Args:
        threads: with which it computes, unless `OMP_NUM_THREADS` is set.

    Raises:
        RuntimeError: it does not start or answer, or cannot forget.
    """
    environment = {"OMP_NUM_THREADS": f"{threads}", **os.environ}
    kept = idle[environment["OMP_NUM_THREADS"]]
    try:
        manager = kept.pop()
    except IndexError:  # there is none, or another thread was quicker
        manager = Manager(client_class=CLIENT)
    try:
        if not manager.is_alive():
            manager = Manager(client_class=CLIENT)
            manager.start_kernel(extra_arguments=ARGUMENTS, env=environment)
        client = manager.blocking_client()
        client.start_channels()
        client.wait_for_ready(timeout=PATIENCE)
        reply = client.execute(RESET, store_history=False, reply=True, timeout=PATIENCE)
        client.stop_channels()
        if reply["content"]["status"] != "ok":
            raise RuntimeError(f"a kernel cannot forget: {reply['content']}")
        yield manager
        manager.latest.stop_channels()
    except BaseException:
        manager.shutdown_kernel(now=True)
        raise
    kept.append(manager)


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
    gc.freeze()  # what is left are modules; the next collection passes over them
    torch.cuda.empty_cache()
    torch.set_rng_state(_torch_random)
    torch.set_num_threads(_threads)
    os.chdir(_folder)
    warnings.resetwarnings()  # Python also forgets which were shown already
    warnings.filters.extend(_filters)
