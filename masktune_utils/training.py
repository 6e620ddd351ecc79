"""One training loop, for ERM and for MaskTune's single epoch of fine-tuning."""

import math
import time
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from masktune_utils import progress
from masktune_utils.settings import Settings


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware multiplies in bfloat16: recent CUDA devices, CPUs with AMX or AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # there is no public name


def train(
    model: nn.Module,
    dataset: Any,
    optimizer: str = "sgd",
    schedule: str = "constant",
    description: str = "ERM",
    **options: Any,
) -> list[dict[str, float]]:
    """Train the model in place with cross-entropy.

    Args:
        model: is left in training mode, on its device.
        dataset: a `data.Split` or a `masking.MaskedDataset`, on the model's device.
        optimizer: `sgd`, with momentum, or `adam`; both with weight decay.
        schedule: of the learning rate. `constant`: it only decays every `lr_decay_epochs`.
            `linear`: it falls step by step, to 0 at the end of the last epoch.
        description: name of the progress bar.
        **options: `epochs`, `batch_size`, `lr`, `momentum`, `weight_decay`, `lr_decay_epochs`,
            `lr_decay_factor`, `flip` and `seed` (of the order of the images), with the defaults of
            `BaseSettings`. A last batch of one image is left out.

    Returns:
        One dict per epoch: `epoch` (from 1), `loss` and `accuracy` (means over the training images
        in training mode), `lr` and `seconds`.

    Raises:
        ValueError: an unknown optimizer or schedule, or a bad option.
    """
    one = Settings(**options, finetune_optimizer=optimizer, finetune_schedule=schedule)
    device = dataset.labels.device
    torch.backends.cudnn.deterministic = True
    kind = {"sgd": partial(optim.SGD, momentum=one.momentum), "adam": optim.Adam}[optimizer]
    torch_optimizer = kind(model.parameters(), lr=one.lr, weight_decay=one.weight_decay, fused=True)
    steps = math.ceil((len(dataset) - 1) / one.batch_size)  # a last batch of one is left out
    if schedule == "linear":
        scheduler = optim.lr_scheduler.LinearLR(torch_optimizer, 1, 0, one.epochs * steps)
    else:
        interval = one.lr_decay_epochs * steps
        scheduler = optim.lr_scheduler.StepLR(torch_optimizer, interval, one.lr_decay_factor)
    generator = torch.Generator().manual_seed(one.seed)
    history, total = [], one.epochs * len(dataset)
    forked = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
    with forked, progress.bar(total=total, unit="image", unit_scale=True, mininterval=0.5) as bar:
        torch.manual_seed(one.seed)  # of dropout
        for epoch in range(1, one.epochs + 1):
            bar.set_description(f"{description}, epoch {epoch}/{one.epochs}", refresh=False)
            started, rate = time.perf_counter(), torch_optimizer.param_groups[0]["lr"]
            order = torch.randperm(len(dataset), generator=generator).to(device)
            # batch normalisation is undefined for a single image
            batches = [index for index in order.split(one.batch_size) if len(index) > 1]
            mirror = generator if one.flip else None
            images = dataset.in_epoch(epoch)
            loss, accuracy = _train_epoch(model, images, batches, scheduler, bar, mirror).tolist()
            row = {"epoch": epoch, "loss": loss, "accuracy": accuracy, "lr": rate}
            history.append(row | {"seconds": time.perf_counter() - started})
    return history


def _train_epoch(model, dataset, batches, scheduler, bar, mirror) -> Tensor:
    """One pass; returns mean loss and accuracy, which stay on the device until the bar is drawn."""
    device = dataset.labels.device
    sums, seen, bfloat16 = torch.zeros(2, device=device), 0, has_bfloat16(device)
    model.train()
    for index in batches:
        images, labels = dataset.batch(index)
        if mirror:
            half = torch.rand(len(index), 1, 1, 1, generator=mirror).to(device) < 0.5
            images = torch.where(half, images.flip(-1), images)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels)
        scheduler.optimizer.zero_grad()
        loss.backward()
        scheduler.optimizer.step()
        scheduler.step()
        seen += len(index)
        sums += torch.stack([loss.detach() * len(index), (logits.argmax(1) == labels).sum()])
        if bar.update(len(index)):
            mean_loss, accuracy = (sums / seen).tolist()
            bar.set_postfix_str(f"loss {mean_loss:.4f}, accuracy {accuracy:.2%}", refresh=False)
    return sums / seen
