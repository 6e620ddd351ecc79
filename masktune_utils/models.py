"""Networks, their device, and the layer that is explained."""

import contextlib
import logging
import socket
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, nn

SILENCE = 15  # seconds without an answer, after which a download is given up


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
    """
    if name == "small_cnn":
        return SmallCNN(num_classes)
    from torchvision import models  # takes a second
    from torchvision.transforms.v2 import Normalize

    usual = models.get_model_weights(name).DEFAULT.transforms()
    network = models.get_model(name, num_classes=num_classes)
    return nn.Sequential(Normalize(usual.mean, usual.std), network)


def new_model(
    seed: int,
    device: str | torch.device = "cpu",
    num_classes: int = 2,
    name: str = "small_cnn",
    weights: str = "",
) -> nn.Module:
    """A network at the start of training; the global random generator is left as it is.

    Args:
        seed: of the initial weights.
        device: where to put it.
        num_classes: number of logits.
        name: see `build`.
        weights: empty: random. `DEFAULT`: those of torchvision. Or a file with a state
            dict. If they are for another number of classes, the last layer is random.

    Raises:
        ValueError: the weights cannot be downloaded or read, or are not of this
            network.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = build(name, num_classes)
        if weights:
            _load_weights(model, name, weights)
    return model.to(device, memory_format=torch.channels_last)


def _load_weights(model: nn.Module, name: str, weights: str) -> None:
    network = model if name == "small_cnn" else model[1]
    try:
        _fit(network, _read_weights(name, weights))
    except Exception as error:  # torch has no class of its own for a damaged file
        reason = f"no weights of {name} ({' '.join(f'{error}'.split())[:200]})"
        allowed = "DEFAULT, while online, or the path of a state dict"
        raise ValueError(
            f"weights are {weights}: {reason}; allowed: {allowed}."
        ) from error


def _read_weights(name: str, weights: str) -> dict[str, Tensor]:
    if weights != "DEFAULT":
        return torch.load(weights, map_location="cpu", weights_only=True)
    from torchvision import models

    with impatience():
        return models.get_model(name, weights="DEFAULT", progress=False).state_dict()


def _fit(network: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load weights; a last layer for another number of classes keeps its own."""
    fitted = dict(weights)
    random = network.state_dict()
    last_layer = [*random][-1].rpartition(".")[0]
    for key in random:
        if key.startswith(last_layer) and weights[key].shape != random[key].shape:
            fitted[key] = random[key]
    network.load_state_dict(fitted)


@cache
def check(image_size: int, name: str, weights: str) -> None:
    """Refuse a network that does not exist, or does not fit its images or weights.

    `DEFAULT` is not downloaded here: a finished model does not need it.

    Raises:
        ValueError: the message names what does not fit, and what is allowed.
    """
    if (image_size, name, weights) == (28, "small_cnn", ""):
        return
    from torchvision import models

    # These have several outputs, or no plain state dict.
    left_out = ("googlenet", "inception*", "mnasnet*")
    known = ["small_cnn", *models.list_models(module=models, exclude=left_out)]
    if name not in known:
        raise ValueError(f"model is {name!r}; allowed: {', '.join(known)}.")
    if weights == "DEFAULT" and name == "small_cnn":
        allowed = "with small_cnn: empty, or the path of a state dict"
        raise ValueError(f"weights are 'DEFAULT'; allowed {allowed}.")
    file = "" if weights == "DEFAULT" else weights
    model = new_model(0, name=name, weights=file).eval()
    shape = (3, image_size, image_size)
    try:
        model(torch.zeros(1, *shape))
        outputs = []
        layer = target_layer(model, shape)
        layer.register_forward_hook(lambda _layer, _inputs, out: outputs.append(out))
        model(torch.zeros(1, *shape))
        height, width = outputs[0].shape[-2:]
        if height != width:  # channels come last
            raise RuntimeError("at this size, no layer has a map")
    except (AssertionError, RuntimeError, TypeError) as error:
        allowed = "28 with small_cnn; with another network, a size that it takes"
        reason = f"{error}".splitlines()[0]
        raise ValueError(
            f"image_size is {image_size}; allowed: {allowed} ({reason})."
        ) from error


@contextlib.contextmanager
def impatience() -> Iterator[None]:
    """Give up on a download after `SILENCE` seconds without an answer."""
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SILENCE)
    try:
        yield
    finally:
        socket.setdefaulttimeout(patience)


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes CUDA if there is one, then MPS, then CPU.

    Raises:
        ValueError: PyTorch does not know the name, or this machine does not have the
            device.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(
            check_available=True
        ) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        allowed = (
            f"auto, cpu, or a device of this machine ({str(error).splitlines()[0]})"
        )
        raise ValueError(f"device is {device!r}; allowed: {allowed}.") from None
    return torch.device(device)


def describe_device(device: torch.device) -> str:
    """Name of the device for records: `cpu`, `mps`, or the model of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def target_layer(model: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """The layer that is explained: what `model.get_grad_cam_target_layer()` returns.

    Without this method, the last layer whose output is larger than one pixel, as
    torchcam finds it.

    Args:
        model: any network for images.
        shape: C, H, W of the images.

    Raises:
        TypeError: there is no such layer.
    """
    if hasattr(model, "get_grad_cam_target_layer"):
        return model.get_grad_cam_target_layer()
    from torchcam.methods import XGradCAM  # heavy, and of no use to the command

    logging.getLogger("torchcam").setLevel(logging.ERROR)  # it warns of its choice
    try:
        with XGradCAM(model, input_shape=shape) as extractor:
            return model.get_submodule(extractor.target_names[0])
    except ValueError:
        needed = (
            "a method get_grad_cam_target_layer(), which returns the module to explain"
        )
        message = f"no layer of {type(model).__name__} has a map; it needs {needed}."
        raise TypeError(message) from None
