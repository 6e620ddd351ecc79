"""The network of the paper's MNIST experiment, its device, and the layer that is explained."""

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3×3 convolutions without padding and two linear layers, as in the authors' code.

    Args:
        num_classes: number of logits.
    """

    def __init__(self, num_classes: int = 2) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            *_conv(3, 16),
            *_conv(16, 16),
            nn.MaxPool2d(2),
            *_conv(16, 32),
            *_conv(32, 32),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.linear = nn.Sequential(
            nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, num_classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N×num_classes, of images N×3×28×28 in [0, 1]."""
        return self.linear(self.backbone(images))

    def get_grad_cam_target_layer(self) -> nn.Module:
        """The layer whose output is explained: the ReLU after the last convolution, N×32×8×8."""
        return self.backbone[-3]


def _conv(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out_channels, 3), nn.BatchNorm2d(out_channels), nn.ReLU()


def new_model(seed: int, device: str | torch.device = "cpu", num_classes: int = 2) -> SmallCNN:
    """A SmallCNN with initial weights that depend on the seed alone; the global generator is left as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(num_classes)
    return model.to(device, memory_format=torch.channels_last)


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes CUDA if there is one, then MPS, then the CPU.

    Raises:
        ValueError: PyTorch does not know the name, or this machine does not have the device.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = f"auto, cpu, or a device of this machine ({str(error).splitlines()[0]})"
        raise ValueError(f"device is {device!r}; allowed: {allowed}.") from None
    return torch.device(device)


def describe_device(device: torch.device) -> str:
    """Name of the device for records: `cpu`, `mps`, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def target_layer(model: nn.Module) -> nn.Module:
    """The layer of any network that is explained, from its method `get_grad_cam_target_layer()`.

    Raises:
        TypeError: the network has no such method, or the method does not return a module.
    """
    layer = getattr(model, "get_grad_cam_target_layer", lambda: None)()
    if not isinstance(layer, nn.Module):
        needed = "get_grad_cam_target_layer(), which returns the module to explain"
        raise TypeError(f"{type(model).__name__} names no layer; it needs a method {needed}.")
    return layer
