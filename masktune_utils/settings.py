"""Every setting of an experiment: its type, range, default and one line of documentation, in one place.

The classes add to each other: where to run and what the images depend on → what the base model depends on → what
fine-tuning depends on. Under `directory` (default: the repository) lie

    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_base.pth
    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_finetuned_{configuration}.pth
    checkpoints/{experiment}/seed{seed}/CNN_saliency_{cam}.pth
    figures/…/*.png, results/…/*.json, runs/…/*.ipynb, in the same way

`experiment` is the data set and `configuration` is `{method}_{param}`, each with every other setting
that is not the default, so that different settings never share a file.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

from matplotlib.colors import is_color_like
from pydantic import ValidationInfo, field_validator

from masktune_utils.strict import field, strict

REPOSITORY = Path(__file__).parents[1]
PARAM_RANGES = {"threshold": 1, "top_k": 1, "mean": 64, "mean_std": 28, "random": 0.5}  # from 0
RUNTIME = ("directory", "device", "retrain")  # no result depends on them
IN_PATH = {"dataset", "train_folder", "test_folder", "seed", "method", "param"}  # always there

Dataset = Literal["auto", "mnist", "mnist5k", "fashion_mnist", "kmnist", "folder"]
KINDS = "square square_anywhere two_squares frame pixels digit_color background none"
Shortcut = Literal[*KINDS.split()]
Cam = Literal["XGradCAM", "GradCAM", "GradCAMpp", "SmoothGradCAMpp", "LayerCAM", "FinerCAM"]
Method = Literal["threshold", "top_k", "mean", "mean_std", "random"]
Upsample = Literal["bilinear", "nearest", "map"]
Fill = Literal["zero", "resample"]
Schedule = Literal["constant", "linear"]


@strict
class DataSettings:
    """Where to run (no result depends on it), and what the images depend on."""

    directory: str = field("", "where files go; empty: the repository")
    device: str = field("auto", "auto, cpu, cuda or mps")
    retrain: bool = field(False, "train again even if a matching checkpoint is saved")
    dataset: Dataset = field("auto", "mnist, mnist5k, fashion_mnist, kmnist, folder or auto")
    train_folder: str = field("", "for dataset folder: one folder of images per class")
    test_folder: str = field("", "for dataset folder: the same, to test on")
    seed: int = field(0, "of every random choice", ge=0, le=2**32 - 1)
    limit: int | None = field(None, "number of training images; None: all", ge=20, multiple_of=10)
    image_size: int = field(28, "side of the images of a folder in pixels", ge=8, le=1024)
    labels: Literal["halves", "digits"] = field("halves", "classes: 0-4 and 5-9, or digits")
    square_size: int = field(6, "side of the square in pixels", ge=1, le=28)
    square_color: str = field("blue", "of the shortcut: name of a colour, or #rrggbb")
    placement: Literal["random", "ordered"] = field("random", "of the square: random or ordered")
    shortcut: Shortcut = field("square", "in training: square, another of shortcuts.py, or none")
    conflicting_share: float = field(0.01, "share of each class against the shortcut", ge=0, le=1)
    validation_share: float = field(0.0, "share of training images held out", ge=0, le=0.5)
    half: int | None = field(None, "0 or 1: train on this half, hold out the other", ge=0, le=1)

    @field_validator("image_size")
    def _of_a_folder(cls, size: int, info: ValidationInfo) -> int:
        if size != 28 and info.data.get("dataset") != "folder":
            raise ValueError("28, except with dataset 'folder'")
        return size

    @field_validator("train_folder", "test_folder")
    def _has_images(cls, folder: str, info: ValidationInfo) -> str:
        needed = info.data.get("dataset") == "folder"
        if needed != bool(folder) or not (REPOSITORY / folder).is_dir():
            raise ValueError("with dataset 'folder', a folder with one folder per class; else ''")
        return folder

    @field_validator("square_color")
    def _known_color(cls, color: str) -> str:
        if not is_color_like(color):
            raise ValueError("name of a colour, such as 'blue', or '#rrggbb'")
        return color


@strict
class BaseSettings(DataSettings):
    """What the base model (ERM) depends on."""

    model: str = field("small_cnn", "small_cnn, or a classification network of torchvision")
    weights: str = field("", "empty: random; DEFAULT: of torchvision; or path of a state dict")
    flip: bool = field(False, "mirror half of the training images, at random")
    epochs: int = field(50, "of the base model", ge=1, le=10_000)
    batch_size: int = field(128, "images per step", ge=2, le=60_000)
    lr: float = field(0.01, "first learning rate of the base model", ge=1e-8, le=10)
    momentum: float = field(0.9, "of SGD", ge=0, le=1)
    weight_decay: float = field(1e-4, "L2 penalty", ge=0, le=1)
    lr_decay_epochs: int = field(25, "epochs between two decays of lr", ge=1, le=10_000)
    lr_decay_factor: float = field(0.5, "factor of each decay", ge=1e-8, le=1)

    @property
    def network(self) -> dict[str, str]:
        """The arguments of `models.new_model` that tell which network it is."""
        is_file = self.weights not in ("", "DEFAULT")
        weights = f"{REPOSITORY / self.weights}" if is_file else self.weights
        return {"name": self.model, "weights": weights}


@strict
class Settings(BaseSettings):
    """What a fine-tuned model depends on: every setting there is."""

    cam: Cam = field("XGradCAM", f"one of {', '.join(get_args(Cam))}")
    method: Method = field("top_k", "threshold, top_k, mean, mean_std (paper) or random (control)")
    param: float = field(0.1, "of the method; top_k, random: larger hides more", ge=0)
    upsample: Upsample = field("bilinear", "mask to the image: bilinear, nearest, or map (first)")
    dilation: int = field(0, "by which the mask is dilated, in 28ths of the side", ge=0, le=27)
    fill: Fill = field("zero", "what hidden pixels become: zero, or resample (another image's)")
    rounds: int = field(1, "of masking; each adds to what is hidden", ge=1, le=100)
    cross_fit: bool = field(False, "masks by two base models, each trained on half of the images")
    finetune_optimizer: Literal["sgd", "adam"] = field("sgd", "sgd or adam")
    finetune_lr: float | None = field(None, "None: last lr of the base model", ge=1e-8, le=10)
    finetune_schedule: Schedule = field("constant", "constant, or linear (to 0)")
    finetune_batch_size: int | None = field(None, "None: batch_size", ge=2, le=60_000)
    finetune_epochs: int = field(1, "epochs of fine-tuning; the paper has 1", ge=1, le=10_000)

    @field_validator("param")
    def _in_range(cls, param: float, info: ValidationInfo) -> float:
        method = info.data.get("method", "mean")
        if param > PARAM_RANGES[method]:
            raise ValueError(f"0 to {PARAM_RANGES[method]} for method {method!r}")
        return param

    def identity(self, *, base: bool) -> dict[str, Any]:
        """The settings that the base model, or else the fine-tuned model, depends on."""
        names = (BaseSettings if base else Settings).__pydantic_fields__.keys()
        return {name: getattr(self, name) for name in names if name not in RUNTIME}

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of `training.train` for the base model."""
        names = {"seed", *BaseSettings.__annotations__} - {"model", "weights"}
        return {name: getattr(self, name) for name in names}

    @property
    def finetuning(self) -> dict[str, Any]:
        """The arguments of `training.train` for fine-tuning.

        The rate is `finetune_lr`, or what the base model's schedule ended with.
        """
        decays = self.epochs // self.lr_decay_epochs
        last_lr = self.lr * self.lr_decay_factor**decays
        return {
            **self.training,
            "epochs": self.finetune_epochs,
            "lr": self.finetune_lr or last_lr,
            "batch_size": self.finetune_batch_size or self.batch_size,
            "optimizer": self.finetune_optimizer,
            "schedule": self.finetune_schedule,
            "description": self.configuration,
        }

    @property
    def mask_rule(self) -> dict[str, Any]:
        """The arguments of `masking.mask_dataset`."""
        names = ("method", "param", "upsample", "dilation", "fill", "seed")
        return {name: getattr(self, name) for name in names}

    def _unusual(self, names: Iterable[str]) -> str:
        found = {name: getattr(self, name) for name in names if name not in IN_PATH}
        changed = [f"_{name}={found[name]}" for name in found if found[name] != DEFAULTS[name]]
        return "".join(changed).replace(os.sep, "-")

    @property
    def experiment(self) -> str:
        """Name of the base model without its seed: the data set and what is not the default."""
        folder = "".join(f"-{part}" for part in Path(self.train_folder).parts[-2:])
        return self.dataset + folder.replace(os.sep, "") + self._unusual(self.identity(base=True))

    @property
    def configuration(self) -> str:
        """Name of the fine-tuned model: `{method}_{param}` and what is not the default."""
        return f"{self.method}_{self.param}{self._unusual(Settings.__annotations__)}"

    def folder(self, kind: str) -> Path:
        """Folder of this experiment under `checkpoints`, `figures`, `results` or `runs`."""
        return REPOSITORY / self.directory / kind / self.experiment / f"seed{self.seed}"

    def checkpoint_path(self, configuration: str) -> Path:
        """The checkpoint of a `configuration`, or of `base`."""
        name = configuration if configuration == "base" else f"finetuned_{configuration}"
        return self.folder("checkpoints") / f"CNN_checkpoint_{name}.pth"


DEFAULTS = dataclasses.asdict(Settings())
