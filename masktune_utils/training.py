"""One training loop, for ERM and for MaskTune's single epoch of fine-tuning."""

import time
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from masktune_utils import progress
from masktune_utils.data import check_choice, check_range

OPTIMIZERS = ("sgd", "adam")
RANGES = {
    "epochs": (1, 10_000),
    "batch_size": (2, 60_000),
    "lr": (1e-8, 10),
    "momentum": (0, 1),
    "weight_decay": (0, 1),
    "lr_decay_epochs": (1, 10_000),
    "lr_decay_factor": (1e-8, 1),
}


class Batches(Protocol):
    """What the loop trains on: a `data.Split` or a `masking.MaskedDataset`."""

    labels: Tensor

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]: ...


def resolve_device(device: str = "auto") -> torch.device:
    """The device to compute on: `auto` takes CUDA where there is one, then MPS, then the CPU.

    Raises:
        ValueError: for a name that PyTorch does not know or a device that this machine does not have.
    """
    if device == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"device is {device!r}; allowed: 'auto', 'cpu', or a 'cuda' or 'mps' device that is here ({reason})."
        ) from None
    return torch.device(device)


def describe_device(device: torch.device) -> str:
    """Name of the device for records: `cpu`, or the model of the accelerator."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: recent CUDA devices, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # no public name yet; AMX implies it


def train(
    model: nn.Module,
    dataset: Batches,
    *,
    epochs: int,
    optimizer: str = "sgd",
    lr: float = 0.01,
    momentum: float = 0.9,
    weight_decay: float = 1e-4,
    lr_decay_epochs: int = 25,
    lr_decay_factor: float = 0.5,
    batch_size: int = 128,
    seed: int = 0,
    description: str = "training",
) -> list[dict[str, float]]:
    """Train the model in place with cross-entropy.

    Args:
        model: is left in training mode, on its device.
        dataset: images and labels, on the model's device.
        epochs: passes over the dataset.
        optimizer: `sgd` (with momentum) or `adam`; both with the weight decay.
        lr: learning rate, multiplied by `lr_decay_factor` after every `lr_decay_epochs` epochs.
        momentum: of SGD.
        weight_decay: L2 penalty.
        lr_decay_epochs: epochs between two decays.
        lr_decay_factor: factor of each decay.
        batch_size: images a step.
        seed: decides the order of the images.
        description: name of the progress bar.

    Returns:
        A dict an epoch: `epoch` (from 1), `loss` and `accuracy` (means over the training images as they were met, in
        training mode), `lr` and `seconds`.

    Raises:
        TypeError: for something else than a number.
        ValueError: for an unknown optimizer, a number outside its range, too few images, or a label that the model has
            no logit for.
    """
    check_choice("optimizer", optimizer, OPTIMIZERS)
    numbers = (epochs, batch_size, lr, momentum, weight_decay, lr_decay_epochs, lr_decay_factor)
    for (name, limits), value in zip(RANGES.items(), numbers, strict=True):
        check_range(name, value, *limits)
    if len(dataset) < 2:
        raise ValueError(f"{len(dataset)} images to train on; allowed: 2 and more.")
    device = dataset.labels.device
    torch.backends.cudnn.deterministic = True
    step_rule = (
        optim.SGD(model.parameters(), lr, momentum, weight_decay=weight_decay, fused=True)
        if optimizer == "sgd"
        else optim.Adam(model.parameters(), lr, weight_decay=weight_decay, fused=True)
    )
    decay = optim.lr_scheduler.StepLR(step_rule, lr_decay_epochs, lr_decay_factor)
    generator = torch.Generator().manual_seed(seed)
    history, highest = [], int(dataset.labels.max())
    with progress.bar(
        total=epochs * len(dataset), desc=description, unit="image", unit_scale=True, mininterval=0.5
    ) as bar:
        for epoch in range(1, epochs + 1):
            order = torch.randperm(len(dataset), generator=generator).to(device)
            started, rate = time.perf_counter(), step_rule.param_groups[0]["lr"]
            batches = order.split(batch_size)
            loss, accuracy = _train_epoch(
                model, dataset, batches, step_rule, highest, bar, f"{epoch}/{epochs}"
            ).tolist()
            seconds = time.perf_counter() - started
            history.append({"epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": rate, "seconds": seconds})
            decay.step()
    return history


def _train_epoch(model, dataset, batches, step_rule, highest, bar, epoch) -> Tensor:
    """One pass; returns mean loss and accuracy. The sums stay on the device, and are read only when the bar is drawn."""
    device = dataset.labels.device
    sums, seen, bfloat16 = torch.zeros(2, device=device), 0, has_bfloat16(device)
    model.train()
    for index in batches:
        if len(index) == 1:  # batch normalisation is undefined for a single image
            continue
        images, labels = dataset.batch(index)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        if highest >= logits.shape[1]:
            raise ValueError(
                f"a label is {highest}; allowed: less than {logits.shape[1]}, the model's number of classes."
            )
        loss = F.cross_entropy(logits.float(), labels)
        step_rule.zero_grad()
        loss.backward()
        step_rule.step()
        seen += len(index)
        sums += torch.stack([loss.detach() * len(index), (logits.argmax(1) == labels).sum()])
        if bar.update(len(index)):
            mean_loss, accuracy = (sums / seen).tolist()
            rate = step_rule.param_groups[0]["lr"]
            bar.set_postfix_str(
                f"epoch {epoch}, loss {mean_loss:.4f}, accuracy {accuracy:.2%}, lr {rate:g}", refresh=False
            )
    return sums / seen
