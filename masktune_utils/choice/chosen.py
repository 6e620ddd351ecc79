"""A choice: what was chosen and why; `choose` makes one, a file keeps it."""

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from masktune_utils import store, training
from masktune_utils.choice.exchange import place
from masktune_utils.choice.held_out import (
    ERM,
    NULL,
    Finetune,
    Fit,
    HeldOut,
    try_masks,
)
from masktune_utils.choice.score import Verdict, judge
from masktune_utils.data import Split, check_split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule

UNDERTRAINED = 5  # points that nothing masked gains on ERM
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
BATCH_SIZE = 32
LR = 0.02

_rule = partial(Rule, "mean_std", fill="resample")
# In the order in which they are tried; later rounds come last.
CANDIDATES = (
    _rule(2, dilation=3, shared=True, exchange=True),
    _rule(1, dilation=4, shared=True, exchange=True, rounds=3),
    _rule(2, dilation=4, shared=True),
    _rule(1, dilation=1, shared=True),
    _rule(3, dilation=4, rounds=2),
)


@dataclass(frozen=True, eq=False)
class Choice:
    """What was chosen, and why.

    Attributes:
        held_out: what it is based on.
        schedule: how networks are fine-tuned.
        verdict: see `score.judge`.
    """

    held_out: HeldOut
    schedule: Finetune
    verdict: Verdict

    @property
    def keeps_erm(self) -> bool:
        """Whether ERM is kept."""
        return self.verdict.chosen == ERM

    @property
    def masked(self) -> MaskedDataset:
        """The images with the chosen masks; nothing is hidden if ERM is kept."""
        return self.held_out.masked[NULL if self.keeps_erm else self.verdict.chosen]

    @property
    def reason(self) -> str:
        """What was chosen and why, what is hidden, and what it costs."""
        best = self.verdict.best
        mean_mask = self.held_out.mean_masks[best]
        lines = [self.verdict.reason]
        covers = f'"{best}" covers {mean_mask.mean():.0%} of the image'
        if mean_mask.min() < mean_mask.max():
            covers += f", mainly the {place(mean_mask)}"
        lines.append(f"{covers}.")
        erm, nothing, mask = [
            100 * self.held_out.is_right(model).double().mean()
            for model in (ERM, NULL, best)
        ]
        lines.append(
            f"Accuracy on images not seen in training: {erm:.1f}% (ERM), "
            f"{nothing:.1f}% (nothing masked), {mask:.1f}% (mask)."
        )
        if nothing - erm > UNDERTRAINED:
            lines.append("ERM gains by more training alone: train it longer.")
        if self.keeps_erm:
            lines.append(f'To take this mask: choice.take("{best}").')
        else:
            lines.append(
                f'If your classes are about this part, keep ERM: choice.take("{ERM}").'
            )
        if not self.held_out.has_maps:
            lines.append("The network gives no maps: masks are by exchange alone.")
        return "\n".join(lines)

    def take(self, name: str) -> "Choice":
        """The same with another mask, or `ERM`: you decide.

        Raises:
            ValueError: there is no such mask.
        """
        names = [ERM, *self.held_out.tried]
        if name not in names:
            raise ValueError(f"name is {name!r}; allowed: {'; '.join(names)}.")
        reason = f'By hand: "{name}".'
        best = self.verdict.best if name == ERM else name
        return replace(self, verdict=Verdict(name, best, reason))

    def finetune(self, network: nn.Module) -> nn.Module:
        """A copy of a network, fine-tuned on the masked images unless ERM is kept.

        It is in evaluation mode.
        """
        tuned = copy.deepcopy(network)
        if not self.keeps_erm:
            tuned = self.schedule(tuned, self.masked)
        return tuned.eval()


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


def choose(
    train: Split,
    fit: Fit,
    finetune: Finetune | None = None,
    candidates: Sequence[Rule] = CANDIDATES,
    seed: int = 0,
    early: Fit | None = None,
) -> Choice:
    """Choose a mask for training images on held-out ones, or keep ERM.

    It calls `fit` twice, with half of the images each. Then it fine-tunes both networks
    with nothing masked and with mask after mask, until one is clear. For a process for
    each half, call it in `joblib.parallel_config("loky", n_jobs=2)`.

    A shortcut is learned first, and conflicting images last. So a network that is
    trained for a short time gives it away in more mistakes, at less cost. With `early`,
    such networks are tried first; only if they choose no mask, those of `fit` decide.

    Args:
        train: the training images; only these and their classes are used.
        fit: training images → a new network trained on them. It is called once for each
            fold, and must not start from a network that has seen these images. The
            default `finetune` trains weights that require gradients, of a network that
            returns a tensor in training mode, too.
        finetune: (a copy of a network, masked images) → the network, fine-tuned; by
            default our `fine_tune`.
        candidates: how masks are made; each round of a rule is tried.
        seed: of every random choice.
        early: like `fit`, with a small part of its training: a tenth, say, but long
            enough for most images to be predicted correctly.

    Raises:
        NoMapsError: the network gives no maps, and no candidate is by exchange.
        TypeError: `train` is no `Split`; `fit` or `finetune` returns no network, or
            one whose output (in evaluation mode) is no tensor; or the weights that
            `fit` returns are not float32.
        ValueError: there is one class, a class with one image, or no candidate that
            hides anything; or `fit` or `finetune` returns networks that share weights,
            or one that does not predict a finite number for each class.
    """
    check_split(train)
    candidates = [rule for rule in candidates if rule != NOTHING]
    if not candidates:
        raise ValueError("there are 0 candidates that hide; allowed: 1 or more.")
    _, counts = train.labels.unique(return_counts=True)
    if len(counts) < 2 or counts.min() < 2:
        raise ValueError(
            f"the classes of train have {counts.tolist()} images; allowed: 2 classes "
            "or more, of 2 images or more each."
        )
    schedule = finetune or partial(fine_tune, epochs=default_epochs(len(train)))
    for fit_half in (early, fit) if early else (fit,):
        stages = try_masks(train, fit_half, schedule, candidates, int(seed))
        for held_out in stages:
            verdict = judge(held_out)
            if verdict.is_final:
                break
        choice = Choice(held_out, schedule, verdict)
        if not choice.keeps_erm:
            break
    return choice


def load_or_choose(
    path: Path,
    train: Split,
    fit: Fit,
    finetune: Finetune | None = None,
    candidates: Sequence[Rule] = CANDIDATES,
    seed: int = 0,
    early: Fit | None = None,
    **made_with: Any,
) -> Choice:
    """A choice that is kept in a file, which runs no code; it is made if there is none.

    Masks and predictions are in the file; the verdict is made anew from them.

    Args:
        path: the file.
        train: see `choose`, as for the others.
        fit: it cannot be compared with that of the file: name in `made_with` what it
            depends on.
        finetune: as `fit`.
        candidates: how masks are made.
        seed: of every random choice.
        early: as `fit`.
        **made_with: values that JSON has, by name.

    Raises:
        CheckpointError: the file is damaged or foreign, or was made with other images,
            candidates, seed or values.
        TypeError: one of `made_with` is no such value; see also `choose`.
    """
    check_split(train)
    tensors = {"images": train.images, "labels": train.labels}
    made_with = {
        **made_with,
        "candidates": repr(tuple(candidates)),
        "seed": int(seed),
        "train_sha256": store.sha256(tensors),
    }

    def make() -> dict:
        choice = choose(train, fit, finetune, candidates, seed=seed, early=early)
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
                train, own_masks, rule.fill, int(seed), rule=rule
            )
    schedule = finetune or partial(fine_tune, epochs=default_epochs(len(train)))
    return Choice(held_out, schedule, judge(held_out))
