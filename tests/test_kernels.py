"""Kernels that are kept between notebooks: nothing is left for the next."""

import time

import nbformat
import papermill
import psutil
import pytest
from conftest import tiny, write_notebook
from papermill.exceptions import PapermillExecutionError

from masktune_utils.runner import jobs, kernels

LITTER = """
import random, warnings
import numpy as np
import torch
x = 1
big = torch.ones(10**6)
layer = torch.nn.Linear(2, 2)
layer.register_forward_hook(print)
warnings.simplefilter("error")
torch.manual_seed(7)
np.random.seed(7)
random.seed(7)
torch.set_num_threads(torch.get_num_threads() + 1)
"""
STATE = """
import gc, random, warnings
import numpy as np
import torch
print(sorted(name for name in globals() if not name.startswith("_")))
print([*filter(None, In)][:-1], Out)
print(torch.get_num_threads())
print(warnings.filters)
left = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
print([tensor.shape for tensor in left if tensor.numel() > 10**5])
print([thing for thing in gc.get_objects() if type(thing) is torch.nn.Linear])
print("random:", torch.rand(1), np.random.rand(), random.random())
for _ in range(2):
    warnings.warn("is shown once, and in the next notebook again")
"""
PARALLEL = """
import joblib, os
print(joblib.Parallel(2)(joblib.delayed(os.path.exists)(name) for name in "ab"))
"""


@pytest.fixture(autouse=True)
def no_kernels():
    """None is kept from before, or for after."""
    kernels.close()
    yield
    kernels.close()


def run(folder, *sources, **options):
    """What a notebook of these cells prints."""
    path = folder / "notebook.ipynb"
    write_notebook(path, sources)
    executed = papermill.execute_notebook(
        path, None, progress_bar=False, cwd=folder, **options
    )
    return "".join(map(printed, executed.cells))


def outputs(notebook):
    """What the cells printed, displayed, and their numbers."""
    shown = []
    for cell in notebook.cells:
        rich = [each for each in cell.get("outputs", []) if "text" not in each]
        # A busy kernel sends what a cell prints in several pieces.
        shown.append((printed(cell), rich, cell.get("execution_count")))
    return shown


def printed(cell):
    """What a cell printed."""
    return "".join(output.get("text", "") for output in cell.get("outputs", []))


def test_a_notebook_leaves_nothing_behind_for_the_next(tmp_path, monkeypatch):
    """And no process of it imports a module of the working directory."""
    monkeypatch.chdir(tmp_path)
    cold = run(tmp_path, "1 + 1", STATE)
    for name in ("torch.py", "joblib.py"):
        (tmp_path / name).write_text("1 / 0")
    printed = []
    pids = set()
    for sources in (["1 + 1", STATE], [LITTER], ["1 + 1", STATE], [PARALLEL]):
        with kernels.take(1) as kernel:
            printed.append(run(tmp_path, *sources, km=kernel))
            pids.add(kernel.provisioner.pid)
    before_litter, _, after_litter, in_parallel = printed
    assert before_litter == after_litter
    assert in_parallel == "[False, False]\n"
    assert len(pids) == 1
    state, _, random = cold.partition("random:")
    assert before_litter.startswith(state)
    # which is not the same in another process
    assert random.count("UserWarning: is shown once") == 1
    kernels.close()
    assert not kernel.is_alive()


@pytest.mark.slow
def test_in_one_warm_kernel_and_in_another_order_the_same(whole_run, tmp_path):
    grid = [tiny(tmp_path, param=param) for param in (0.3, 0.1)]
    for stem in ("02_erm", "03_saliency_masks", "04_finetune_sweep"):
        for job in jobs.make_stage(stem, grid):
            assert job.run(together=1) is None
            (copy,) = whole_run.directory.glob(f"runs/*/*/{job.copy.name}")
            warm, cold = [nbformat.read(path, 4) for path in (job.copy, copy)]
            assert outputs(warm) == outputs(cold)
    assert len(kernels.idle[1]) == 1


def test_a_kernel_that_died_or_in_which_a_notebook_failed_is_not_used_again(tmp_path):
    with kernels.take(1) as kernel:
        run(tmp_path, "1", km=kernel)
        pid = kernel.provisioner.pid
    psutil.Process(pid).kill()
    while kernel.is_alive():
        time.sleep(0.01)
    with pytest.raises(PapermillExecutionError), kernels.take(1) as kernel:
        assert kernel.provisioner.pid != pid
        run(tmp_path, "1 / 0", km=kernel)
    assert not kernels.idle[1]
    assert not kernel.is_alive()
