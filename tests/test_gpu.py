"""On a pretended GPU: nothing mixes devices. Real GPUs differ in numerics and speed."""

from pathlib import Path
from unittest.mock import Mock

import papermill
import pytest
import torch
from conftest import TINY
from pretended_gpu import CPU, GPU, pretended_gpu

from masktune_utils import metrics, models, training
from masktune_utils.choice import choose
from masktune_utils.data import Split
from masktune_utils.masking import Rule
from masktune_utils.runner import command, jobs
from masktune_utils.saliency import saliency_maps

RULE = Rule(dilation=2, fill="resample", rounds=2)


@pytest.fixture
def gpu():
    with pretended_gpu():
        yield


@pytest.fixture
def train(splits, few_windows) -> Split:
    """Fifty images."""
    return splits.train[::4]


def test_the_pretended_gpu_refuses_what_cuda_refuses(gpu):
    on_gpu = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        on_gpu + torch.ones(3)
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        on_gpu.numpy()


@pytest.mark.parametrize(
    ("network_device", "image_device"),
    [(GPU, CPU), (CPU, GPU)],
    ids=str,
)
def test_network_and_images_may_be_on_different_devices(
    gpu, train, network_device, image_device
):
    images = train.to(image_device)

    def fit(fold, _share=1.0):
        network = models.new_model(0, network_device)
        training.train(network, fold, epochs=3, batch_size=20)
        return network

    choice = choose(images, fit, candidates=[RULE])
    masked = choice.held_out.masked[choice.verdict.best]
    assert masked.images.device == image_device
    tuned = choice.schedule(fit(images), masked)
    assert next(tuned.parameters()).device == network_device


@pytest.mark.parametrize("chosen", ["tf32", "ieee"])
def test_predictions_and_maps_are_in_float32(train, chosen, monkeypatch):
    """Also where tf32 is asked for everywhere, by the switch that is newer."""
    monkeypatch.setattr(torch.backends, "fp32_precision", chosen)
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    precisions = []
    network = models.new_model(0)
    network.register_forward_hook(
        lambda *_: precisions.append(convolutions.fp32_precision)
    )
    metrics.predict(network, train)
    saliency_maps(network, train.images, train.labels)
    assert precisions == ["ieee", "ieee"]
    assert convolutions.fp32_precision == before


def test_one_notebook_at_a_time_runs_on_a_gpu(gpu, tmp_path, monkeypatch):
    execute = Mock(return_value={})
    monkeypatch.setattr(jobs, "execute", execute)
    command.main(["sweep", "--device=cuda", f"--directory={tmp_path}"])
    assert execute.call_args.args[-1] == 1


ENTER = [
    f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})",
    "import pretended_gpu; device = pretended_gpu.pretended_gpu()",
    "device.__enter__(); sys.modules['kept for later'] = device; del device",
]


@pytest.mark.slow
def test_the_course_runs_on_it(tmp_path):
    """Notebooks 01 to 06, on tiny data."""
    values = TINY | {"directory": str(tmp_path), "device": "cuda"}
    for path in sorted(jobs.NOTEBOOKS.glob("0[1-6]_*.ipynb")):
        executed = papermill.execute_notebook(
            path,
            None,
            values,
            cwd=path.parent,
            progress_bar=False,
            extra_arguments=[f"--IPKernelApp.exec_lines={ENTER!r}"],
        )
        assert "Device: cuda." in str(executed.cells)
    assert len(list(tmp_path.rglob("*base.pth"))) == 1
