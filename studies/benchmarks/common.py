"""What the benchmarks share: the machine, its limits, and two ways to measure."""

import contextlib
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import torch
from torch.utils.flop_counter import FlopCounterMode

from masktune_utils import datasets, experiment, models
from masktune_utils.settings import Settings

BIN = Path(sys.executable).parent  # where masktune and papermill are installed


def machine() -> str:
    """Processor, cores, memory, bfloat16, accelerator, versions, in a line."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(": ")[1]
        for line in info.read_text().splitlines()
        if line.startswith("model name")
    ]
    device = models.resolve_device()
    accelerator = "none" if device.type == "cpu" else device.type
    if device.type == "cuda":
        accelerator = torch.cuda.get_device_name(device)
    can = torch.cpu.get_capabilities()
    hardware = [
        names[0] if names else platform.processor(),
        f"{torch.get_num_threads()} threads",
        f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        f"AMX {'yes' if can.get('amx_tile') else 'no'}",
        f"AVX-512 BF16 {'yes' if can.get('avx512_bf16') else 'no'}",
        f"accelerator {accelerator}",
        f"torch {torch.__version__.split('+')[0]}",
    ]
    return f"\n{', '.join(hardware)}\n"


def alternate(functions: dict[str, Callable[[], object]], repeats: int) -> pd.Series:
    """Median seconds of each function.

    They take turns, so that a slow minute of the machine meets all of them.
    """
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - started)
    return pd.DataFrame(seconds).median()


def measure(command: list[str]) -> float:
    """Seconds that a command took.

    Raises:
        RuntimeError: the command failed; with what it printed.
    """
    started = time.perf_counter()
    process = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - started
    if process.returncode:
        words = " ".join(map(str, command))
        raise RuntimeError(f"{words} failed:\n{process.stdout}")
    return seconds


def gflops(dtype: torch.dtype) -> float:
    """10⁹ operations a second, measured in a product of 2048×2048 matrices."""
    matrix = torch.randn(2048, 2048, dtype=dtype)
    return (
        2
        * 2048**3
        / alternate({"product": lambda: matrix @ matrix}, 10)["product"]
        / 1e9
    )


def bandwidth() -> float:
    """GB a second, read and written, measured in a copy of 256 MB."""
    source, target = (
        torch.ones(2**28, dtype=torch.uint8),
        torch.zeros(2**28, dtype=torch.uint8),
    )
    return (
        2 * 2**28 / alternate({"copy": lambda: target.copy_(source)}, 10)["copy"] / 1e9
    )


def work(backward: bool) -> tuple[float, float]:
    """The work of SmallCNN per image: forward, or forward and backward.

    Returns:
        Operations of its convolutions and linear layers, and numbers that all its
        layers give.
    """
    model, numbers = models.SmallCNN(), []
    for layer in [*model.backbone, *model.linear]:
        layer.register_forward_hook(
            lambda _layer, _inputs, output: numbers.append(output.numel())
        )
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.zeros(2, 3, 28, 28))
        if backward:
            logits.sum().backward()
    return counter.get_total_flops() / 2, sum(numbers) / 2


@contextlib.contextmanager
def base_model_alone():
    """A new directory with nothing but the base model of seed 0.

    Where it is not saved, it is trained first.
    """
    settings = Settings(dataset="mnist")
    saved = settings.checkpoint_path("base")
    if not saved.exists():
        experiment.base_model(settings, datasets.load(settings).train)
    with tempfile.TemporaryDirectory() as directory:
        path = Settings(dataset="mnist", directory=directory).checkpoint_path("base")
        path.parent.mkdir(parents=True)
        path.write_bytes(saved.read_bytes())
        yield directory
