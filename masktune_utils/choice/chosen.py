"""A choice: what is hidden and why. A person makes it by `hide`, held-out images by
`choose`; a file keeps it.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from masktune_utils import store, training
from masktune_utils.choice.exchange import name_ninth
from masktune_utils.choice.held_out import (
    ERM,
    NULL,
    Finetune,
    Fit,
    HeldOut,
    try_masks,
)
from masktune_utils.choice.score import Verdict, decide
from masktune_utils.data import Split, check_split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule

UNDERTRAINED = 5  # points that nothing masked gains on ERM
EARLY = 0.08  # share of a training whose networks are asked first
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
BATCH_SIZE = 32
LR = 0.02

_rule = partial(Rule, "mean_std", fill="resample")
# In the order in which they are tried.
CANDIDATES = (
    _rule(2, dilation=3, shared=True, exchange=True),
    _rule(1, dilation=4, shared=True, exchange=True),
    _rule(2, dilation=4, shared=True),
    _rule(1, dilation=1, shared=True),
    _rule(3, dilation=4),
    _rule(1, dilation=4, shared=True, exchange=True, rounds=2),
    _rule(1, dilation=4, shared=True, exchange=True, rounds=3),
)


@dataclass(frozen=True, eq=False)
class Choice:
    """What is hidden, and why.

    Attributes:
        masked: the images with the masks; nothing is hidden if ERM is kept.
        schedule: how networks are fine-tuned.
        reason: what was chosen and why, what is hidden, and what it costs.
        held_out: what the choice is based on; None if a person pointed at a place.
        verdict: see `score.decide`; None like `held_out`.
    """

    masked: MaskedDataset
    schedule: Finetune
    reason: str
    held_out: HeldOut | None = None
    verdict: Verdict | None = None

    @property
    def keeps_erm(self) -> bool:
        """Whether ERM is kept."""
        return self.masked.rule == NOTHING

    def take(self, name: str) -> "Choice":
        """The same with another mask, or `ERM`: you decide.

        Raises:
            ValueError: there is no such mask.
        """
        tried = self.held_out.tried if self.held_out else []
        names = [ERM, *tried]
        if name not in names:
            raise ValueError(f"name is {name!r}; allowed: {'; '.join(names)}.")
        if self.held_out is None:
            maps = torch.zeros(len(self.masked), 1, 1)
            masked = NOTHING.mask(self.masked.split, maps, seed=self.masked.seed)
            return Choice(masked, self.schedule, f'By hand: "{ERM}".')
        best = self.verdict.best if name == ERM else name
        verdict = Verdict(name, best, f'By hand: "{name}".')
        return _with_verdict(self.held_out, self.schedule, verdict)

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept.

        It is in evaluation mode.
        """
        tuned = copy.deepcopy(network)
        if not self.keeps_erm:
            tuned = self.schedule(tuned, self.masked)
        return tuned.eval()


def _with_verdict(held_out: HeldOut, schedule: Finetune, verdict: Verdict) -> Choice:
    """The choice that held-out images, or a person who saw them, have made."""
    is_erm = verdict.chosen == ERM
    masked = held_out.masked[NULL if is_erm else verdict.chosen]
    if not held_out.tried:
        return Choice(masked, schedule, verdict.reason, held_out, verdict)
    best = verdict.best
    mean_mask = held_out.mean_masks[best]
    covers = f'"{best}" covers {mean_mask.mean():.0%} of the image'
    if mean_mask.min() < mean_mask.max():
        covers += f", mainly the {name_ninth(mean_mask)}"
    erm, nothing, mask = [
        100 * held_out.is_right(model).double().mean() for model in (ERM, NULL, best)
    ]
    networks = "ERM"
    if held_out.share < 1:
        networks = f"ERM after {held_out.share:.0%} of its training"
    accuracy = (
        f"Accuracy on images not seen in training: {erm:.1f}% ({networks}), "
        f"{nothing:.1f}% (nothing masked), {mask:.1f}% (mask)."
    )
    lines = [verdict.reason, f"{covers}.", accuracy]
    if nothing - erm > UNDERTRAINED and held_out.share == 1:
        lines.append("ERM gains by more training alone: train it longer.")
    if is_erm:
        lines.append(f'To take this mask: choice.take("{best}").')
    else:
        lines.append(
            f'If your classes are about this part, keep ERM: choice.take("{ERM}").'
        )
    if not held_out.has_maps:
        lines.append("The network gives no maps: masks are by exchange alone.")
    return Choice(masked, schedule, "\n".join(lines), held_out, verdict)


def fine_tune(network: nn.Module, masked: MaskedDataset, epochs: int) -> nn.Module:
    """Our schedule: small batches, and a rate that falls from `LR` to 0."""
    training.train(
        network,
        masked,
        epochs=epochs,
        batch_size=BATCH_SIZE,
        lr=LR,
        schedule="linear",
        seed=masked.seed,
    )
    return network


def default_epochs(count: int) -> int:
    """Epochs of `fine_tune`, for a number of training images."""
    return min(MOST_EPOCHS, math.ceil(STEPS * BATCH_SIZE / count))


def default_schedule(train: Split) -> Finetune:
    """`fine_tune`, with as many epochs as the training images need."""
    return partial(fine_tune, epochs=default_epochs(len(train)))


def as_region(place: Tensor | Sequence[float], size: tuple[int, int]) -> Tensor:
    """A place in the image as a region, H×W, bool.

    Args:
        place: H×W, bool; or a rectangle: left, top, right, bottom, as shares of the
            image; a tensor, an array or a sequence.
        size: H, W.

    Raises:
        ValueError: it is no part of the image.
    """
    # In float32, 0.35 of ten pixels would be 3 pixels, not 4.
    given = torch.as_tensor(place, dtype=torch.float64, device="cpu")
    region = torch.zeros(size, dtype=torch.bool)
    if given.shape == size:
        region = given.bool()
    elif given.shape == (4,) and given.min() >= 0 and given.max() <= 1:
        left, top, right, bottom = given.tolist()
        height, width = size
        rows = slice(round(top * height), round(bottom * height))
        columns = slice(round(left * width), round(right * width))
        region[rows, columns] = True
    if not region.any():
        words = given.tolist() if given.ndim < 2 else tuple(given.shape)
        raise ValueError(
            f"the place is {words}; allowed: left, top, right, bottom, from 0 to 1, or "
            f"a tensor of {size[0]}×{size[1]}; with a pixel or more."
        )
    return region


def hide(
    train: Split,
    place: Tensor | Sequence[float],
    finetune: Finetune | None = None,
    seed: int = 0,
) -> Choice:
    """Hide a place in all images: a choice by hand. Ours.

    What is hidden is filled from another image, of any class.

    Args:
        train: the training images.
        place: see `as_region`.
        finetune: see `choose`.
        seed: of the other images.

    Raises:
        TypeError: `train` is no `Split`.
        ValueError: the place is no part of the image.
    """
    check_split(train)
    region = as_region(place, train.images.shape[-2:]).to(train.images.device)
    masks = region.expand(len(train), -1, -1)
    masked = MaskedDataset(train, masks, "resample", int(seed))
    share = region.float().mean()
    reason = f"By hand: the {name_ninth(region)} ({share:.0%} of the image) is hidden."
    return Choice(masked, finetune or default_schedule(train), reason)


def choose(
    train: Split,
    fit: Fit,
    finetune: Finetune | None = None,
    candidates: Sequence[Rule] = CANDIDATES,
    seed: int = 0,
    early: float = EARLY,
) -> Choice:
    """Choose a mask for training images on held-out ones, or keep ERM.

    It calls `fit` twice, with half of the images each. Then it fine-tunes both networks
    with nothing masked and with mask after mask, until one is clear. For a process for
    each half, call it in `joblib.parallel_config("loky", n_jobs=2)`.

    A shortcut is learned first, and conflicting images last. So a network that is
    trained for a short time gives it away in more mistakes, at less cost: such networks
    are tried first. Only if they choose no mask, those of whole trainings decide.

    Args:
        train: the training images; only these and their classes are used.
        fit: (training images, share) → a new network trained on them, for this share of
            your usual training. It is called once for each fold, and must not start
            from a network that has seen these images. The default `finetune` trains
            weights that require gradients, of a network that returns a tensor in
            training mode, too.
        finetune: (a copy of a network, masked images) → the network, fine-tuned; by
            default our `fine_tune`.
        candidates: how masks are made, in the order in which they are tried.
        seed: of every random choice.
        early: share of the training for the networks that are tried first; they should
            predict most images correctly. With 0, only whole trainings decide: so for
            pretrained networks, which may learn objects first.

    Raises:
        NoMapsError: the network gives no maps, and no candidate is by exchange.
        TypeError: `train` is no `Split`; `fit` or `finetune` returns no network, or
            one whose output (in evaluation mode) is no tensor; or the weights that
            `fit` returns are not float32.
        ValueError: there is one class, a class with one image, or no candidate that
            hides anything; `early` or `seed` is out of range; or `fit` or `finetune`
            returns networks that share weights, or one that does not predict a finite
            number for each class.
    """
    check_split(train)
    candidates = [rule for rule in candidates if rule != NOTHING]
    if not candidates:
        raise ValueError("there are 0 candidates that hide; allowed: 1 or more.")
    if not 0 <= early < 1 or seed < 0:
        raise ValueError(
            f"early is {early}, seed is {seed}; allowed: from 0 to below 1; 0 or more."
        )
    _, counts = train.labels.unique(return_counts=True)
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"the classes of train have {counts.tolist()} images; allowed: 2 classes "
            "or more, of 2 images or more each."
        )
    schedule = finetune or default_schedule(train)
    for share in (early, 1.0) if early else (1.0,):
        stages = try_masks(train, fit, schedule, candidates, int(seed), share)
        for held_out in stages:
            verdict = decide(held_out)
            if verdict.is_final:
                break
        if verdict.chosen != ERM:
            break
    return _with_verdict(held_out, schedule, verdict)


def load_or_choose(
    path: Path, train: Split, fit: Fit, made_with: dict[str, Any], **options: Any
) -> Choice:
    """A choice that is kept in a file, which runs no code; it is made if there is none.

    Masks and predictions are in the file; the verdict is made anew from them.

    Args:
        path: the file.
        train: see `choose`.
        fit: it cannot be compared with that of the file: name in `made_with` what it
            depends on.
        made_with: values that JSON has, by name.
        **options: see `choose`.

    Raises:
        CheckpointError: the file is damaged or foreign, or was made with other images,
            candidates, seed, early or values.
        TypeError: one of `made_with` is no such value; see also `choose`.
    """
    check_split(train)
    tensors = {"images": train.images, "labels": train.labels}
    seed = int(options.get("seed", 0))
    made_with = {
        **made_with,
        "candidates": repr(tuple(options.get("candidates", CANDIDATES))),
        "seed": seed,
        "early": options.get("early", EARLY),
        "train_sha256": store.sha256(tensors),
    }

    def make() -> dict:
        choice = choose(train, fit, **options)
        content = vars(choice.held_out)
        masks = []
        for masked in content.pop("masked").values():
            count = 1 if masked.rule.shared else len(train)
            own_masks = masked.own_masks[:count].cpu().clone()
            masks.append((asdict(masked.rule), own_masks))
        return {"held_out": content, "masks": masks}

    path = Path(path).expanduser()
    saved = store.load_or_make(path, made_with, make)
    with store.blame(path):
        held_out = HeldOut(**saved["held_out"])
        for fields, masks in saved["masks"]:
            rule = Rule(**fields)
            own_masks = masks.to(train.images.device).expand(len(train), -1, -1)
            held_out.masked[f"{rule}"] = MaskedDataset(
                train, own_masks, rule.fill, seed, rule=rule
            )
    schedule = options.get("finetune") or default_schedule(train)
    return _with_verdict(held_out, schedule, decide(held_out))
