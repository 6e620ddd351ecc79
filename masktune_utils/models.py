"""The network of the paper's MNIST experiment."""

import torch
from torch import Tensor, nn


class SmallCNN(nn.Module):
    """Four 3×3 convolutions without padding and two linear layers, module for module as in the authors' code.

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
        self.linear = nn.Sequential(nn.Linear(512, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, num_classes))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, N×num_classes, of images N×3×28×28 in [0, 1]."""
        return self.linear(self.backbone(images))

    def get_grad_cam_target_layer(self) -> nn.Module:
        """The layer whose output is explained: the ReLU after the last convolution, N×32×8×8."""
        return self.backbone[-3]


def _conv(channels: int, out_channels: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(channels, out_channels, 3), nn.BatchNorm2d(out_channels), nn.ReLU()


def new_model(seed: int, device: str | torch.device = "cpu", num_classes: int = 2) -> SmallCNN:
    """A SmallCNN whose initial weights depend on the seed alone, on any device; the global generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = SmallCNN(num_classes)
    return model.to(device, memory_format=torch.channels_last)
