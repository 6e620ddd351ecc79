"""Networks, and the layer that is explained."""

import contextlib
import copy

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3×3 convolutions without padding and two linear layers, as the authors have.

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
            nn.Linear(512, 256),
            nn.BatchNorm1d(256),
            nn.ReLU(),
            nn.Linear(256, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N×num_classes, of images N×3×28×28 in [0, 1]."""
        return self.linear(self.backbone(images))

    def get_grad_cam_target_layer(self) -> nn.Module:
        """The layer to explain: the ReLU after the last convolution, N×32×8×8."""
        return self.backbone[-3]


def _conv(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out_channels, 3), nn.BatchNorm2d(out_channels), nn.ReLU()


def new_model(
    seed: int, device: str | torch.device = "cpu", num_classes: int = 2
) -> SmallCNN:
    """A network at the start of training; the global random generator is left as it is.

    Args:
        seed: of the initial weights.
        device: where to put it.
        num_classes: number of logits.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = SmallCNN(num_classes)
    return model.to(device, memory_format=torch.channels_last)


def in_float32() -> contextlib.AbstractContextManager:
    """Where convolutions on a GPU are not computed in TF32, which has 10 bits."""
    return torch.backends.cudnn.flags(
        enabled=True, deterministic=True, allow_tf32=False
    )


def target_layer(
    model: nn.Module, shape: tuple[int, ...], layer: str = ""
) -> nn.Module:
    """The layer that is explained.

    Args:
        model: any network for images.
        shape: C, H, W of the images.
        layer: its name, as in `model.get_submodule`. Without one, what the method
            `model.get_grad_cam_target_layer()` returns; without this method, the last
            layer whose output is larger than one pixel.

    Raises:
        ValueError: there is no layer of this name.
        TypeError: no layer is named, and there is none, or the network computes with
            tokens.
    """
    names = [name for name, _ in model.named_modules()]
    if layer and layer not in names:
        raise ValueError(
            f"layer is {layer!r}; allowed: {', '.join(filter(None, names))}."
        )
    if layer:
        return model.get_submodule(layer)
    for module in model.modules():  # the network itself, or in a wrapper
        if hasattr(module, "get_grad_cam_target_layer"):
            return module.get_grad_cam_target_layer()
    kind = type(model).__name__
    shapes = _output_shapes(model, shape)
    if any(len(size) == 3 and size[1] > 1 for size in shapes.values()):
        needed = "name a layer by layer=, and make its output a map by reshape="
        raise TypeError(f"{kind} computes with tokens; {needed}.")
    maps = [name for name, size in shapes.items() if len(size) == 4 and size[-1] > 1]
    if not maps:
        needed = "name one by layer=, or by a method get_grad_cam_target_layer()"
        raise TypeError(f"no layer of {kind} has a map; {needed}.")
    return model.get_submodule(maps[-1])


def _output_shapes(model: nn.Module, shape: tuple[int, ...]) -> dict[str, torch.Size]:
    """Name of each layer → shape of its output, in the order of computation."""
    outputs = []
    watched = copy.deepcopy(model).eval()
    for name, module in watched.named_modules():
        module.register_forward_hook(
            lambda _layer, _inputs, out, name=name: outputs.append((name, out))
        )
    with torch.no_grad():
        watched(torch.zeros(1, *shape, device=next(watched.parameters()).device))
    of_layers = outputs[:-1]  # the last is that of the whole network
    return {name: out.shape for name, out in of_layers if isinstance(out, Tensor)}
