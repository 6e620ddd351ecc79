"""Kernels that are kept between notebooks: nothing of a notebook is left for the next."""

import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from tiny_runs import contents, tiny

from masktune_utils.runner import jobs, kernels

pytest_plugins = ["tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

LITTER = """
import gc, os, random, sys, warnings
import numpy as np, torch
from IPython import get_ipython
from matplotlib import pyplot as plt
x, big = 1, torch.ones(10**6)
layer = torch.nn.Linear(2, 2)
layer.register_forward_hook(print)
plt.plot([1, 2])
warnings.simplefilter("error")
random.seed(7), np.random.seed(7), torch.manual_seed(7)
torch.set_num_threads(torch.get_num_threads() + 1)
os.chdir("/")
"""
STATE = """
import gc, os, random, sys, warnings
import numpy as np, torch
from matplotlib import pyplot as plt
print(sorted(name for name in globals() if not name.startswith("_")))
print([*filter(None, In)][:-1], Out, plt.get_fignums(), os.getcwd(), torch.get_num_threads())
print(warnings.filters)
gc.unfreeze()
left = [o for o in gc.get_objects() if type(o) in (torch.nn.Linear, torch.Tensor)]
print([o for o in left if type(o) is torch.nn.Linear or o.numel() > 10**5])
print("random:", torch.rand(1), np.random.rand())
"""


def run(folder: Path, *sources: str, **options: object) -> str:
    """What a notebook of these cells prints."""
    path = folder / "notebook.ipynb"
    metadata = {
        "kernelspec": {
            "name": "python3",
            "language": "python",
            "display_name": "Python",
        }
    }
    cells = [new_code_cell(source) for source in sources]
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    done = papermill.execute_notebook(
        path, None, progress_bar=False, cwd=folder, **options
    )
    return "".join(
        output.get("text", "") for cell in done.cells for output in cell.outputs
    )


def test_a_notebook_leaves_nothing_behind_for_the_next(tmp_path):
    cold, printed, pids = run(tmp_path, "1 + 1", STATE), [], []
    for sources in (("1 + 1", STATE), (LITTER,), ("1 + 1", STATE)):
        with kernels.warm(tmp_path, 1) as kernel:
            printed.append(run(tmp_path, *sources, km=kernel))
            pids.append(kernel.provisioner.pid)
    assert printed[0] == printed[2] and len(set(pids)) == 1
    assert printed[0].partition("random:")[0] == cold.partition("random:")[0] != ""


def test_warnings_that_were_shown_once_are_shown_again(tmp_path):
    source = "import warnings\nfor _ in range(2): warnings.warn('look')"
    for _ in range(2):
        with kernels.warm(tmp_path, 1) as kernel:
            done = run(tmp_path, source, km=kernel)
        assert done.count("UserWarning: look") == 1


def outputs(path: Path) -> list:
    """What the cells printed and displayed, and their numbers."""
    found = []
    for cell in nbformat.read(path, as_version=4).cells:
        printed = "".join(output.get("text", "") for output in cell.get("outputs", []))
        shown = [
            output.get("data") for output in cell.get("outputs", []) if "data" in output
        ]
        found.append((cell.get("execution_count"), printed, shown))
    return found


def test_warm_and_cold_and_in_any_order_the_same(whole_run, tmp_path):
    names = "02_erm", "03_saliency_masks", "04_finetune_sweep"
    found = []
    for folder, params in {"a": (0.1, 0.3), "b": (0.3, 0.1)}.items():
        grid = [tiny(tmp_path / folder, param=param) for param in params]
        for stem in names:
            for job in jobs.make_stage(stem, grid):
                assert job.run(1) == (job, None)
        left = contents(tmp_path / folder)
        copies = sorted((tmp_path / folder).glob("runs/*/*/*.ipynb"))
        found.append((left, {path.name: outputs(path) for path in copies}))
    assert found[0] == found[1] and len(found[0][1]) == 4
    expected = contents(whole_run.directory)
    assert [name for name in found[0][0] if found[0][0][name] != expected[name]] == []
    assert len(kernels.idle_kernels["1"]) == 1


def test_a_kernel_that_failed_or_died_is_replaced(tmp_path):
    with (
        pytest.raises(papermill.PapermillExecutionError),
        kernels.warm(tmp_path, 1) as kernel,
    ):
        run(tmp_path, "1 / 0", km=kernel)
    assert not kernels.idle_kernels["1"] and not kernel.is_alive()
    with kernels.warm(tmp_path, 1) as kernel:
        run(tmp_path, "1", km=kernel)
        pid = kernel.provisioner.pid
    psutil.Process(pid).kill()
    while kernel.is_alive():
        time.sleep(0.01)
    with kernels.warm(tmp_path, 1) as kernel:
        assert kernel.provisioner.pid != pid
        assert run(tmp_path, "print(6)", km=kernel) == "6\n"
    kernels.close()
    assert not kernel.is_alive()


def test_two_at_once_have_two_kernels(tmp_path):
    with kernels.warm(tmp_path, 1) as one, kernels.warm(tmp_path, 1) as other:
        assert run(tmp_path, "1", km=one) == run(tmp_path, "1", km=other) == ""
        assert one.provisioner.pid != other.provisioner.pid
    assert len(kernels.idle_kernels["1"]) == 2
