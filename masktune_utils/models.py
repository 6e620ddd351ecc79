"""Networks, and the layer that is explained."""

import copy
import logging

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


def build(name: str, num_classes: int) -> nn.Module:
    """A network with random weights; one of torchvision normalises the images itself.

    Args:
        name: `small_cnn`, or a classification network of torchvision.
        num_classes: number of logits.

    Raises:
        ValueError: another name.
    """
    if name == "small_cnn":
        return SmallCNN(num_classes)
    from torchvision import models  # takes a second
    from torchvision.transforms.v2 import Normalize

    # These have several outputs, or no plain state dict.
    left_out = ("googlenet", "inception*", "mnasnet*")
    known = ["small_cnn", *models.list_models(module=models, exclude=left_out)]
    if name not in known:
        raise ValueError(f"model is {name!r}; allowed: {', '.join(known)}.")
    usual = models.get_model_weights(name).DEFAULT.transforms()
    network = models.get_model(name, num_classes=num_classes)
    return nn.Sequential(Normalize(usual.mean, usual.std), network)


def new_model(
    seed: int,
    device: str | torch.device = "cpu",
    num_classes: int = 2,
    name: str = "small_cnn",
) -> nn.Module:
    """A network at the start of training; the global random generator is left as it is.

    Args:
        seed: of the initial weights.
        device: where to put it.
        num_classes: number of logits.
        name: see `build`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(name, num_classes)
    return model.to(device, memory_format=torch.channels_last)


def target_layer(
    model: nn.Module, shape: tuple[int, ...], layer: str = ""
) -> nn.Module:
    """The layer that is explained.

    Args:
        model: any network for images.
        shape: C, H, W of the images.
        layer: its name, as in `model.get_submodule`. Without one, what the method
            `model.get_grad_cam_target_layer()` returns; without this method, the last
            layer whose output is larger than one pixel, as torchcam finds it.

    Raises:
        TypeError: no layer is named, and there is none, or the network computes with
            tokens.
    """
    if layer:
        return model.get_submodule(layer)
    if hasattr(model, "get_grad_cam_target_layer"):
        return model.get_grad_cam_target_layer()
    from torchcam.methods import XGradCAM  # heavy, and of no use to the command

    logging.getLogger("torchcam").setLevel(logging.ERROR)  # it warns of its choice
    kind = type(model).__name__
    try:
        with XGradCAM(model, input_shape=shape) as extractor:
            found = model.get_submodule(extractor.target_names[0])
    except ValueError:
        needed = "name one by layer=, or by a method get_grad_cam_target_layer()"
        raise TypeError(f"no layer of {kind} has a map; {needed}.") from None
    if _has_tokens(model, shape):
        needed = "name a layer by layer=, and make its output a map by reshape="
        raise TypeError(f"{kind} computes with tokens; {needed}.")
    return found


def _has_tokens(model: nn.Module, shape: tuple[int, ...]) -> bool:
    """Whether the output of a layer is N×tokens×channels, as in a transformer."""
    outputs = []
    watched = copy.deepcopy(model).eval()
    for module in watched.modules():
        module.register_forward_hook(lambda _layer, _inputs, out: outputs.append(out))
    with torch.no_grad():
        watched(torch.zeros(1, *shape, device=next(watched.parameters()).device))
    tensors = [output for output in outputs if isinstance(output, Tensor)]
    return any(output.ndim == 3 and output.shape[1] > 1 for output in tensors)
