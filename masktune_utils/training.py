"""One training loop, for ERM and for MaskTune's fine-tuning."""

import math

import torch
import torch.nn.functional as F
from torch import nn, optim
from torch.utils.data import Dataset

from masktune_utils import progress


def has_bfloat16(device: torch.device) -> bool:
    """Whether the hardware has bfloat16: recent GPUs, CPUs with AVX-512 BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    # PyTorch 2.9 has no public name for it.
    return device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()  # noqa: SLF001


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
        batch_size: images per step, 2 or more. A last batch of one image is left out.
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
        training images in training mode), and `lr`.

    Raises:
        ValueError: fewer than two images; an unknown optimizer or schedule; the loss is
            not finite; with batch normalisation, batches of one image.
    """
    if len(dataset) < 2:
        raise ValueError(f"the number of images is {len(dataset)}; allowed: 2 or more.")
    device = next(model.parameters()).device
    torch.backends.cudnn.deterministic = True
    weights = model.parameters()
    if optimizer == "sgd":
        torch_optimizer = optim.SGD(
            weights, lr, momentum=0.9, weight_decay=1e-4, fused=True
        )
    elif optimizer == "adam":
        torch_optimizer = optim.Adam(weights, lr, weight_decay=1e-4, fused=True)
    else:
        raise ValueError(f"optimizer is {optimizer!r}; allowed: sgd or adam.")
    # Without a last batch of one, for which batch normalisation is undefined.
    steps = math.ceil((len(dataset) - 1) / batch_size)
    if schedule == "linear":
        scheduler = optim.lr_scheduler.LinearLR(torch_optimizer, 1, 0, epochs * steps)
    elif schedule == "constant":
        scheduler = optim.lr_scheduler.StepLR(
            torch_optimizer, lr_decay_epochs * steps, 0.5
        )
    else:
        raise ValueError(f"schedule is {schedule!r}; allowed: constant or linear.")
    generator = torch.Generator().manual_seed(int(seed))
    history = []
    bfloat16 = has_bfloat16(device)
    model.train()
    forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with forked, progress.bar(total=epochs * steps, desc="training") as bar:
        torch.manual_seed(seed)  # of dropout
        for epoch in range(1, epochs + 1):
            row = {"epoch": epoch, "lr": scheduler.get_last_lr()[0]}
            images_of_epoch = dataset.in_epoch(epoch)
            order = torch.randperm(len(dataset), generator=generator)
            order = order[: steps * batch_size].to(dataset.labels.device)
            sums = torch.zeros(2, device=device)
            for index in order.split(batch_size):
                images, labels = images_of_epoch.batch(index, device)
                with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
                    logits = model(images)
                loss = F.cross_entropy(logits.float(), labels)
                torch_optimizer.zero_grad()
                loss.backward()
                torch_optimizer.step()
                scheduler.step()
                correct = (logits.argmax(1) == labels).sum()
                sums += torch.stack([loss.detach() * len(index), correct])
                bar.update()
            row["loss"], row["accuracy"] = (sums / len(order)).tolist()
            if not math.isfinite(row["loss"]):
                raise ValueError(f"the loss is {row['loss']}; allowed: a smaller lr")
            history.append(row)
    return history
