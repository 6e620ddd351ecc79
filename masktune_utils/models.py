"""Devices; networks, and the layer that is explained."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

FEWEST_CELLS = 6  # of a map's shorter side: coarser ones miss what is small


class NoMapsError(TypeError):
    """A network without maps, as one that computes with tokens."""


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on; `auto` takes CUDA if there is one, then MPS, then CPU.

    Raises:
        ValueError: this machine has no such device.
    """
    cpu = torch.device("cpu")
    best = torch.accelerator.current_accelerator(check_available=True) or cpu
    devices = {"auto": best, "cpu": cpu, best.type: best}
    if device not in devices:
        raise ValueError(f"device = {device!r}; here there are {', '.join(devices)}")
    return devices[device]


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
        torch.default_generator.manual_seed(int(seed))
        model = SmallCNN(num_classes)
    return model.to(device, memory_format=torch.channels_last)


def from_onnx(
    path: str | Path, size: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[Tensor], Tensor]:
    """A classifier of any framework, by onnxruntime. No code of the file is run.

    Args:
        path: an ONNX file with one input, B×3×`size`×`size`, for any number B of
            images; its first output is B×classes.
        size: pixels.
        mean: of each channel, subtracted from the images, which are in [0, 1].
        std: of each channel, by which they are divided after that.

    Raises:
        ImportError: onnxruntime is not installed.
        ValueError: the file is not there, is no ONNX file, or refuses such images.
    """
    try:
        import onnxruntime
    except ImportError as error:
        words = "a classifier needs onnxruntime: pip install onnxruntime"
        raise ImportError(words) from error
    path = Path(path).expanduser()
    means, deviations = torch.tensor([[*mean], [*std]])[..., None, None]

    def classify(images: Tensor) -> Tensor:
        normalized = (images.cpu() - means) / deviations
        outputs = session.run(None, {name: normalized.float().numpy()})
        return torch.from_numpy(outputs[0])

    try:
        session = onnxruntime.InferenceSession(path)
        name = session.get_inputs()[0].name
        for count in (1, 2):
            outputs = classify(torch.zeros(count, 3, size, size))
            if outputs.ndim != 2 or len(outputs) != count:
                raise ValueError(f"{count} images give {tuple(outputs.shape)}")
    except Exception as error:
        raise ValueError(
            f"{path} does not classify images of 3×{size}×{size} ({error}); allowed: an "
            f"ONNX file with one input, ['batch', 3, {size}, {size}], where the batch "
            "is dynamic; or another size."
        ) from error
    return classify


@contextlib.contextmanager
def in_float32() -> Iterator[None]:
    """Where convolutions on a GPU are not computed in TF32, which has 10 bits.

    For the whole process, they are deterministic from then on.
    """
    cudnn = torch.backends.cudnn
    cudnn.deterministic = True
    precision = cudnn.conv.fp32_precision
    cudnn.conv.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.conv.fp32_precision = precision


def target_layer(
    model: nn.Module, shape: tuple[int, ...], layer: str = ""
) -> nn.Module:
    """The layer that is explained.

    Args:
        model: any network for images, in evaluation mode.
        shape: C, H, W of the images.
        layer: its name, as in `model.get_submodule`. Without one, what the method
            `get_grad_cam_target_layer()` of its class returns (not one of the instance:
            a copy is explained); without this method, the last layer whose map has
            `FEWEST_CELLS` or more on its shorter side; if there is none, the last of
            those with the finest map.

    Raises:
        AttributeError: there is no layer of this name.
        NoMapsError: no layer is named, and there is none, or the network computes with
            tokens.
    """
    if layer:
        return model.get_submodule(layer)
    for module in model.modules():  # the network itself, or in a wrapper
        if hasattr(module, "get_grad_cam_target_layer"):
            return module.get_grad_cam_target_layer()
    cells = {}  # layer with a map → on its shorter side; in the order of computation
    tokens = []

    def note(module: nn.Module, _inputs: tuple, output: object) -> None:
        size = getattr(output, "shape", ())
        cells.pop(module, None)  # if it is used twice, the last use counts
        if is_map(size, shape) and not isinstance(module, nn.AdaptiveAvgPool2d):
            cells[module] = min(size[-2:])
        if len(size) == 3 and size[1] > 1:
            tokens.append(module)

    image = next(model.parameters()).new_zeros(1, *shape)
    with register_module_forward_hook(note), torch.no_grad():
        model(image)
    if tokens or not cells:
        raise NoMapsError(
            f"{type(model).__name__} computes with tokens, or no layer of it has a map "
            "N×C×h×w; name one by layer=, or by a method get_grad_cam_target_layer()."
        )
    enough = min(FEWEST_CELLS, max(cells.values()))
    return [module for module, count in cells.items() if count >= enough][-1]


def is_map(features: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether features are N×C×h×w with about the proportions of an image.

    Args:
        features: their shape.
        shape: of the image; it ends with H, W.
    """
    if len(features) != 4:
        return False
    height, width = features[-2:]
    ratio = height * shape[-1] / (width * shape[-2])
    return max(height, width) > 1 and 0.5 <= ratio <= 2
