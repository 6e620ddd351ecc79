"""One training loop, for ERM and for MaskTune's fine-tuning."""

import math
import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim
from torch.utils.data import Dataset
from tqdm.std import tqdm

from masktune_utils import progress


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16: recent GPUs, CPUs with AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    # Older PyTorch has no public name for it.
    return torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001


def train(
    model: nn.Module,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 0.01,
    lr_decay_epochs: int = 25,
    optimizer: str = "sgd",
    schedule: str = "constant",
    seed: int = 0,
) -> list[dict[str, float]]:
    """Train the model in place with cross-entropy.

    For the whole process, it asks cuDNN for deterministic convolutions.

    Args:
        model: is left in training mode, on its device.
        dataset: a `data.Split` or a `masking.MaskedDataset`, best on that device.
        epochs: passes over the images.
        batch_size: images per step. A last batch of one image is left out.
        lr: first learning rate.
        lr_decay_epochs: with schedule `constant`, epochs after which the rate is
            halved.
        optimizer: `sgd`, with a momentum of 0.9, or `adam`; both with a weight decay
            (L2 penalty) of 0.0001.
        schedule: of the learning rate. `constant`: it only decays every
            `lr_decay_epochs`. `linear`: it falls step by step, to 0 at the end of the
            last epoch.
        seed: of the order of the images, and of dropout.

    Returns:
        One dict per epoch: `epoch` (from 1), `loss` and `accuracy` (means over the
        training images in training mode), `lr` and `seconds`.

    Raises:
        ValueError: an unknown optimizer or schedule, or batches of one image.
    """
    if batch_size < 2:  # batch normalisation is undefined for a single image
        raise ValueError(f"batch_size is {batch_size}; allowed: 2 or more.")
    device = next(model.parameters()).device
    torch.backends.cudnn.deterministic = True
    weights = model.parameters()
    options = {"lr": lr, "weight_decay": 1e-4, "fused": True}
    if optimizer == "sgd":
        torch_optimizer = optim.SGD(weights, momentum=0.9, **options)
    elif optimizer == "adam":
        torch_optimizer = optim.Adam(weights, **options)
    else:
        raise ValueError(f"optimizer is {optimizer!r}; allowed: sgd or adam.")
    steps = math.ceil((len(dataset) - 1) / batch_size)  # without a last batch of one
    if schedule == "linear":
        scheduler = optim.lr_scheduler.LinearLR(torch_optimizer, 1, 0, epochs * steps)
    elif schedule == "constant":
        scheduler = optim.lr_scheduler.StepLR(
            torch_optimizer, lr_decay_epochs * steps, 0.5
        )
    else:
        raise ValueError(f"schedule is {schedule!r}; allowed: constant or linear.")
    generator = torch.Generator().manual_seed(seed)
    history = []
    total = epochs * len(dataset)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    bar = progress.bar(total=total, unit="image", unit_scale=True, mininterval=0.5)
    with forked, bar:
        torch.manual_seed(seed)  # of dropout
        for epoch in range(1, epochs + 1):
            bar.set_description(f"epoch {epoch}/{epochs}", refresh=False)
            row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
            started = time.perf_counter()
            order = torch.randperm(len(dataset), generator=generator)
            batches = order.to(dataset.labels.device).split(batch_size)
            of_epoch = dataset.in_epoch(epoch)
            means = _train_epoch(model, of_epoch, batches, scheduler, bar)
            row["loss"], row["accuracy"] = means.tolist()
            row["seconds"] = time.perf_counter() - started
            history.append(row)
    return history


def _train_epoch(
    model: nn.Module,
    dataset: Dataset,
    batches: tuple[Tensor, ...],
    scheduler: optim.lr_scheduler.LRScheduler,
    bar: tqdm,
) -> Tensor:
    """One pass; returns mean loss and accuracy, which stay on the device."""
    device = next(model.parameters()).device
    bfloat16 = has_bfloat16(device)
    sums = torch.zeros(2, device=device)
    seen = 0
    model.train()
    for index in batches:
        if len(index) == 1:  # the last one
            continue
        images, labels = dataset.batch(index, device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        scheduler.optimizer.zero_grad()
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        seen += len(index)
        correct = (logits.argmax(1) == labels).sum()
        sums += torch.stack([loss.detach() * len(index), correct])
        bar.update(len(index))
    return sums / seen
