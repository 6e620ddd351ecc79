"""A pretended GPU: tensors that are computed on the CPU and say `cuda:0`.

They raise the error of CUDA where they meet a tensor of the CPU that has a dimension,
unless it is an index, and they have no NumPy array. The numerics are those of the CPU.
"""

import contextlib
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
INDEXED = {Tensor.__getitem__, Tensor.__setitem__, Tensor.index_select}
MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.copy_, Tensor.type_as}


class OnGPU(Tensor):
    """A tensor of the pretended GPU."""

    @property
    def device(self):
        return GPU

    @property
    def is_cuda(self):
        return True

    def numpy(self, *_, **__):
        raise TypeError("can't convert cuda:0 device type tensor to numpy.")

    __array__ = numpy

    def __deepcopy__(self, memo):
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        if isinstance(self, torch.nn.Parameter):
            copied._is_param = True
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        raise AssertionError("the mode is not active")


def put(value, device):
    """All tensors in a value, seen as tensors of a device."""
    kind = OnGPU if device.type == "cuda" else Tensor

    def seen(leaf):
        if not isinstance(leaf, Tensor) or type(leaf) is kind:
            return leaf
        is_parameter = isinstance(leaf, torch.nn.Parameter)
        with torch._C.DisableTorchFunction():
            other = leaf.as_subclass(kind)
            if is_parameter:
                other._is_param = True
        return other

    return tree_map(seen, value)


def on_cpu(leaf):
    """The CPU in place of the GPU."""
    is_device = isinstance(leaf, str | torch.device)
    return CPU if is_device and f"{leaf}".startswith("cuda") else leaf


class Mode(TorchFunctionMode):
    """Sees every function of torch, and refuses to mix devices."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch._has_compatible_shallow_copy_type:
            return False  # the parameters of a module are replaced
        options = dict(options or {})
        leaves = tree_leaves((arguments, options))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        is_gpu = [isinstance(tensor, OnGPU) for tensor in tensors]
        met = tensors[:1] if function in INDEXED else tensors
        on_cpu_too = [
            leaf for leaf in met if not isinstance(leaf, OnGPU) and leaf.dim()
        ]
        if function not in MOVES and any(is_gpu) and on_cpu_too:
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least "
                f"two devices, cuda:0 and cpu! ({function.__name__})"
            )
        if function is Tensor.register_hook:
            tensor, hook = arguments
            seen_on = GPU if any(is_gpu) else CPU
            arguments = (tensor, lambda gradient: hook(put(gradient, seen_on)))
        target = GPU if any(is_gpu) else CPU
        asked = [options.get("device"), *(arguments[1:] if function in MOVES else ())]
        for value in asked:
            if isinstance(value, str | torch.device):
                with contextlib.suppress(RuntimeError):
                    target = torch.device(value)
        if function is Tensor.cpu:
            target = CPU
        if function is Tensor.copy_:
            target = GPU if is_gpu[0] else CPU

        if function in MOVES:
            arguments = tree_map(on_cpu, arguments)
        if "device" in options:
            options["device"] = on_cpu(options["device"])
        with torch._C.DisableTorchFunctionSubclass():
            outcome = function(*arguments, **options)
        return put(outcome, target)


@contextlib.contextmanager
def pretended_gpu():
    """A machine with one GPU."""
    functions = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
        "_lazy_call": lambda *_, **__: None,
        "get_rng_state": lambda *_: torch.zeros(1, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "is_bf16_supported": lambda **_: False,
        "get_device_name": lambda *_: "pretended",
    }
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with (
            patch.multiple(torch.cuda, **functions),
            patch.multiple(
                torch.accelerator, current_accelerator=lambda **_: torch.device("cuda")
            ),
            Mode(),
        ):
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
