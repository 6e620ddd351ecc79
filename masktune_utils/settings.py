"""Every setting of an experiment: its type, range, default and documentation.

The classes add to each other: where to run and what the images depend on → what the
base model depends on → what fine-tuning depends on. Under `directory` (default: the
repository) lie

    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_base.pth
    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_finetuned_{configuration}.pth
    checkpoints/{experiment}/seed{seed}/CNN_saliency_{cam}.pth
    figures/…/*.png, results/…/*.json, runs/…/*.ipynb, in the same way

`experiment` is the data set and `configuration` is `{method}_{param}`, each with every
other setting that is not the default, so that models of different settings do not share
a file. (A different `test_folder` makes no other model; its results share one.)
"""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, Self, get_args

from matplotlib.colors import is_color_like
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

if TYPE_CHECKING:
    from masktune_utils.masking import Rule

REPOSITORY = Path(__file__).parents[1]
# Largest `param` of each method; the smallest is 0. Beyond these, nothing is hidden: no
# value of an 8×8 map exceeds 64 times the mean, and no one of 28×28 values is 28
# standard deviations above it.
PARAM_LIMITS = {"threshold": 1, "top_k": 1, "mean": 64, "mean_std": 28, "random": 0.5}
RUNTIME = (
    "directory",
    "device",
    "retrain",
    "public_weights",
)  # no result depends on them
IN_FILES = {"fold": "half"}  # a setting's name in files, where these are older
LONGEST = 165  # bytes of a name; that of a file is at most 200
RULE = ("method", "param", "upsample", "dilation", "shared", "fill", "rounds")
# Not listed in names: each has a place of its own in the path, except `test_folder`,
# which changes no model.
NOT_SPELLED_OUT = (
    *RUNTIME,
    "dataset",
    "train_folder",
    "test_folder",
    "seed",
    "method",
    "param",
)

Dataset = Literal["auto", "mnist", "mnist5k", "fashion_mnist", "kmnist", "folder"]
Labels = Literal["halves", "digits"]
Placement = Literal["random", "ordered"]
Shortcut = Literal[
    "square",
    "square_anywhere",
    "two_squares",
    "frame",
    "pixels",
    "digit_color",
    "background",
    "none",
]
Cam = Literal[
    "XGradCAM", "GradCAM", "GradCAMpp", "SmoothGradCAMpp", "LayerCAM", "FinerCAM"
]
Method = Literal["threshold", "top_k", "mean", "mean_std", "random"]
Upsample = Literal["bilinear", "nearest", "map"]
Fill = Literal["zero", "resample"]
Optimizer = Literal["sgd", "adam"]
Schedule = Literal["constant", "linear"]
# `birds/` and `birds` are the same.
Folder = Annotated[str, AfterValidator(lambda name: f"{Path(name)}" if name else "")]


class DataSettings(BaseModel):
    """Where to run (no result depends on it), and what the images depend on.

    Raises:
        ValueError: an unknown name or a bad value, in one line: the name, the value,
            what is allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        strict=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
    )

    directory: str = Field("", description="where files go; empty: the repository")
    device: str = Field("auto", description="auto, cpu, cuda or mps")
    retrain: bool = Field(
        False, description="train again even if a matching checkpoint is saved"
    )
    dataset: Dataset = Field(
        "auto", description="mnist, mnist5k, fashion_mnist, kmnist, folder or auto"
    )
    train_folder: Folder = Field(
        "", description="for dataset folder: one folder of images per class"
    )
    test_folder: Folder = Field(
        "", description="for dataset folder: the same, to test on"
    )
    seed: int = Field(0, description="of every random choice", ge=0, le=2**32 - 1)
    limit: int | None = Field(
        None,
        description="training images, drawn by the seed; None: all",
        ge=20,
        multiple_of=10,
    )
    image_size: int = Field(
        28, description="side of the images of a folder in pixels", ge=8, le=1024
    )
    labels: Labels = Field("halves", description="classes: 0-4 and 5-9, or digits")
    square_size: int = Field(6, description="side of the square in pixels", ge=1, le=28)
    square_color: str = Field(
        "blue", description="of the shortcut: name of a colour, or #rrggbb"
    )
    placement: Placement = Field(
        "random", description="of the square: random or ordered"
    )
    shortcut: Shortcut = Field(
        "square", description="in training: square, another of shortcuts.py, or none"
    )
    conflicting_share: float = Field(
        0.01, description="share of each class against the shortcut", ge=0, le=1
    )
    validation_share: float = Field(
        0.0, description="share of training images held out", ge=0, le=0.5
    )
    fold: int | None = Field(
        None, description="0 or 1: train on this fold, hold out the other", ge=0, le=1
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            raise ValueError(
                _describe_problem(problem, type(self).model_fields)
            ) from None

    @model_validator(mode="after")
    def _check_images(self) -> Self:
        if self.image_size != 28 and self.dataset != "folder":
            self._refuse("image_size", "28, except with dataset 'folder'")
        if not is_color_like(self.square_color):
            self._refuse("square_color", "name of a colour, or '#rrggbb'")
        for name in ("train_folder", "test_folder"):
            folder = getattr(self, name)
            is_needed = self.dataset == "folder"
            if is_needed != bool(folder) or not Path(folder).is_dir():
                allowed = "with dataset 'folder', a folder with one folder per class"
                self._refuse(name, f"{allowed}; else ''")
        return self

    def _refuse(self, name: str, allowed: str) -> NoReturn:
        raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}.")

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, validated like new ones."""
        return type(self)(**{**dict(self), **changes})


class BaseSettings(DataSettings):
    """What the base model (ERM) depends on."""

    model: str = Field(
        "small_cnn", description="small_cnn, or a classification network of torchvision"
    )
    weights: str = Field(
        "",
        description="empty: random; DEFAULT: of torchvision; or path of a state dict",
    )
    public_weights: bool = Field(
        False, description="the file of weights was trained on other images"
    )
    flip: bool = Field(
        False, description="mirror half of the training images, at random"
    )
    epochs: int = Field(50, description="of the base model", ge=1, le=10_000)
    batch_size: int = Field(128, description="images per step", ge=2, le=60_000)
    lr: float = Field(
        0.01, description="first learning rate of the base model", ge=1e-8, le=10
    )
    momentum: float = Field(0.9, description="of SGD", ge=0, le=1)
    weight_decay: float = Field(1e-4, description="L2 penalty", ge=0, le=1)
    lr_decay_epochs: int = Field(
        25, description="epochs between two decays of lr", ge=1, le=10_000
    )
    lr_decay_factor: float = Field(
        0.5, description="factor of each decay", ge=1e-8, le=1
    )

    @property
    def network(self) -> dict[str, str]:
        """The arguments of `models.new_model` that tell which network it is."""
        return {"name": self.model, "weights": self.weights}

    @property
    def training(self) -> dict[str, Any]:
        """The arguments of `training.train` for the base model."""
        return {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "lr": self.lr,
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "lr_decay_epochs": self.lr_decay_epochs,
            "lr_decay_factor": self.lr_decay_factor,
            "flip": self.flip,
            "seed": self.seed,
        }


class Settings(BaseSettings):
    """What a fine-tuned model depends on: every setting there is."""

    cam: Cam = Field("XGradCAM", description=f"one of {', '.join(get_args(Cam))}")
    method: Method = Field(
        "top_k",
        description="threshold, top_k, mean, mean_std (paper) or random (control)",
    )
    param: float = Field(
        0.1, description="of the method; top_k, random: larger hides more", ge=0
    )
    upsample: Upsample = Field(
        "bilinear", description="mask to the image: bilinear, nearest, or map (first)"
    )
    dilation: int = Field(
        0, description="how far the mask is dilated, in 28ths of the side", ge=0, le=27
    )
    shared: bool = Field(
        False, description="one mask for all images, from the mean of their maps"
    )
    fill: Fill = Field(
        "zero",
        description="what hidden pixels become: zero, or resample (another image's)",
    )
    rounds: int = Field(
        1, description="of masking; each adds to what is hidden", ge=1, le=100
    )
    cross_fit: bool = Field(
        False,
        description="masks by two base models, each trained on half of the images",
    )
    finetune_optimizer: Optimizer = Field("sgd", description="sgd or adam")
    finetune_lr: float | None = Field(
        None, description="None: lr after the base model's last epoch", ge=1e-8, le=10
    )
    finetune_schedule: Schedule = Field(
        "constant", description="constant, or linear (to 0)"
    )
    finetune_batch_size: int | None = Field(
        None, description="None: batch_size", ge=2, le=60_000
    )
    finetune_epochs: int = Field(
        1, description="epochs of fine-tuning; the paper has 1", ge=1, le=10_000
    )

    @model_validator(mode="after")
    def _check_masks(self) -> Self:
        if self.method == "random" and self.shared:
            self._refuse("shared", "False with method 'random', which uses no maps")
        if self.method == "random" and self.rounds > 1:
            self._refuse("rounds", "1 with method 'random', which uses no maps")
        if self.cross_fit and self.fold is not None:
            self._refuse("cross_fit", "False with fold, which has no folds of its own")
        if self.param > PARAM_LIMITS[self.method]:
            limit = PARAM_LIMITS[self.method]
            self._refuse("param", f"0 to {limit} for method {self.method!r}")
        return self

    @property
    def experiment(self) -> str:
        """Name of the base model: the data set and what is not the default."""
        name = self._images
        if len(Path(self.train_folder).parts) > 2:  # other folders may end alike
            name += f"-{hashlib.sha256(self.train_folder.encode()).hexdigest()[:8]}"
        return _shorten(name + self._spelled(BaseSettings.model_fields))

    @property
    def configuration(self) -> str:
        """Name of the fine-tuned model: method, param, and what is not the default."""
        unusual = self._spelled(Settings.__annotations__)
        return _shorten(f"{self.method}_{self.param}{unusual}")

    @property
    def title(self) -> str:
        """The base model in words, for figures."""
        words = [self._images]
        for name, value in self.changed().items():
            if name in BaseSettings.model_fields and name not in NOT_SPELLED_OUT:
                words.append(f"{name} {value}".replace("_", " "))
        return ", ".join(words)

    @property
    def _images(self) -> str:
        """The data set; of a folder, also the last two of its names."""
        names = [self.dataset, *Path(self.train_folder).parts[-2:]]
        return "-".join(names).replace(os.sep, "")

    def changed(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        return {name: value for name, value in self if value != DEFAULTS[name]}

    def _spelled(self, names: Iterable[str]) -> str:
        """What is not the default, as part of a file name."""
        changed = self.changed()
        text = ""
        for name in names:
            if name in changed and name not in NOT_SPELLED_OUT:
                text += f"_{IN_FILES.get(name, name)}={changed[name]}"
        return text.replace(os.sep, "-")

    def folder(self, kind: str) -> Path:
        """Folder of this experiment in `checkpoints`, `figures`, `results`, `runs`."""
        return root(self.directory) / kind / self.experiment / f"seed{self.seed}"

    def checkpoint_path(self, configuration: str) -> Path:
        """The checkpoint of a `configuration`, or of `base`."""
        prefix = "" if configuration == "base" else "finetuned_"
        return (
            self.folder("checkpoints") / f"CNN_checkpoint_{prefix}{configuration}.pth"
        )

    def identity(self, *, base: bool) -> dict[str, Any]:
        """What the base model, or the fine-tuned one, depends on, as in files."""
        kind = BaseSettings if base else Settings
        names = [name for name in kind.model_fields if name not in RUNTIME]
        return {IN_FILES.get(name, name): getattr(self, name) for name in names}

    def of_fold(self, fold: int) -> Self:
        """The same for one of the two folds whose masks `cross_fit` hands over."""
        return self.replace(fold=fold, cross_fit=False)

    @property
    def rule(self) -> "Rule":
        """How masks are made, see `masking`."""
        from masktune_utils.masking import Rule  # PyTorch takes seconds

        return Rule(**{name: getattr(self, name) for name in RULE})

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
            "description": f"fine-tuning, {self.method} {self.param}",
        }


DEFAULTS = {name: field.default for name, field in Settings.model_fields.items()}


def root(directory: str) -> Path:
    """Where the files of an experiment go: its `directory`, or the repository."""
    return Path(directory) if directory else REPOSITORY


def _shorten(name: str) -> str:
    """A name of at most `LONGEST` bytes; a longer one ends with its hash."""
    encoded = name.encode()
    if len(encoded) <= LONGEST:
        return name
    kept = encoded[: LONGEST - 9].decode(errors="ignore")
    return f"{kept}-{hashlib.sha256(encoded).hexdigest()[:8]}"


def _describe_problem(problem: dict[str, Any], known: Iterable[str]) -> str:
    """What pydantic found wrong, in one line: the name, the value and what is allowed.

    Args:
        problem: the first of `ValidationError.errors()`.
        known: names that are allowed.
    """
    if not problem["loc"]:  # settings that do not go together
        return problem["msg"].removeprefix("Value error, ")
    name = problem["loc"][0]
    if problem["type"] == "extra_forbidden":
        return f"{name} is not a setting; allowed: {', '.join(known)}."
    allowed = problem["msg"].removeprefix("Input should be ")
    return f"{name} is {problem['input']!r}; allowed: {allowed}."
