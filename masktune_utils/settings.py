"""Every setting of an experiment: its type, range, default and documentation.

`BaseSettings` are where to run and what the base model and its images depend on;
`Settings` add what fine-tuning depends on. Under `directory` (default: the repository)
lie

    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_base.pth
    checkpoints/{experiment}/seed{seed}/CNN_checkpoint_finetuned_{configuration}.pth
    checkpoints/{experiment}/seed{seed}/CNN_saliency.pth
    checkpoints/{experiment}/seed{seed}/CNN_choice.pth
    figures/…/*.png, results/…/*.json, runs/…/*.ipynb, in the same way

`experiment` is the data set and `configuration` is `{method}_{param}`, each with every
other setting that is not the default, so that models of different settings do not share
a file; the configuration of the model with the chosen mask is `chosen`. So that names
are not too long, numbers have four digits.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
)

from masktune_utils.masking import RULES, Rule
from masktune_utils.shortcuts import SHORTCUTS

_above = Path(__file__).parents[1]
# A package that was installed without a repository leaves its files where it is used.
REPOSITORY = _above if (_above / "pyproject.toml").exists() else Path.cwd()
RUNTIME = {"directory", "device"}  # no result depends on them
# Not listed in names: each has a place of its own in the path.
IN_PATH = {*RUNTIME, "dataset", "seed", "method", "param"}
OF_RULE = Rule.__annotations__


Digits = AfterValidator(lambda number: float(f"{number:.4g}"))
Share = Annotated[float, Digits]
Rate = Annotated[float, Field(gt=0), Digits]
BatchSize = Annotated[int, Field(ge=2)]


class BaseSettings(BaseModel):
    """Where to run (no result depends on it), and what the base model (ERM) depends on.

    Text is converted, as from a command line.

    Raises:
        ValueError: an unknown name or a bad value, in one line: the name, the value,
            what is allowed.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    directory: str = ""
    """where files go; empty: the repository"""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto, cpu, cuda or mps"""
    dataset: Literal["auto", "mnist", "mnist5k", "fashion_mnist", "kmnist"] = "auto"
    """mnist, mnist5k, fashion_mnist, kmnist or auto"""
    seed: int = Field(0, ge=0, le=2**32 - 1)
    """of every random choice"""
    limit: int | None = Field(None, ge=20, multiple_of=10)
    """number of training images, drawn by the seed; None: all"""
    labels: Literal["halves", "digits"] = "halves"
    """classes: 0-4 and 5-9, or digits"""
    square_size: int = Field(6, ge=1, le=28)
    """side of the square in pixels"""
    square_color: str = Field("blue", pattern="^([A-Za-z]+|#[0-9A-Fa-f]{6})$")
    """of the shortcut: name of a colour, or #rrggbb"""
    placement: Literal["random", "ordered"] = "random"
    """of the square: random or ordered"""
    shortcut: Literal[*SHORTCUTS, "none"] = "square"
    """in training: square, another of shortcuts.py, or none"""
    conflicting_share: Share = Field(0.01, ge=0, le=1)
    """share of each class against the shortcut"""
    validation_share: Share = Field(0.0, ge=0, le=0.5)
    """share of training images held out"""
    epochs: PositiveInt = 50
    """of the base model"""
    batch_size: BatchSize = 128
    """images per step"""
    lr: Rate = 0.01
    """first learning rate of the base model"""
    lr_decay_epochs: PositiveInt = 25
    """epochs between two halvings of lr"""

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problem = error.errors()[0]
            message = f"{problem['loc'][0]} = {problem['input']!r}: {problem['msg']}"
            if problem["type"] == "extra_forbidden":
                message += f"; known: {', '.join(type(self).model_fields)}"
            raise ValueError(message) from None

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, validated like new ones."""
        return type(self)(**{**dict(self), **changes})

    @property
    def experiment(self) -> str:
        """Name of the base model: the data set and what is not the default."""
        return self.dataset + self._spelled_out(BaseSettings.model_fields)

    def _spelled_out(self, fields: dict) -> str:
        """Those of the fields that are not the default, as a part of a name."""
        unusual = self.model_dump(
            include=fields.keys() - IN_PATH, exclude_defaults=True
        )
        return "".join(f"_{field}={value}" for field, value in unusual.items())

    def folder(self, kind: str) -> Path:
        """Folder of this experiment in `checkpoints`, `figures`, `results`, `runs`.

        Raises:
            ValueError: the data set is `auto`, of which nobody knows later what it was.
        """
        if self.dataset == "auto":
            raise ValueError("dataset = 'auto': first use datasets.resolve_dataset")
        return root(self.directory) / kind / self.experiment / f"seed{self.seed}"

    @property
    def configuration(self) -> str:
        """Name of the model among those of an experiment."""
        return "base"

    def checkpoint_path(self, configuration: str) -> Path:
        """The checkpoint of a `configuration`, or of `base`."""
        prefix = "" if configuration == "base" else "finetuned_"
        name = f"CNN_checkpoint_{prefix}{configuration}.pth"
        return self.folder("checkpoints") / name

    @property
    def base(self) -> "BaseSettings":
        """Those that the base model depends on, and where to run."""
        return BaseSettings(**self.model_dump(include={*BaseSettings.model_fields}))

    @property
    def identity(self) -> dict:
        """What the model depends on, by name, as in files."""
        return self.model_dump(exclude=RUNTIME)

    @property
    def training(self) -> dict:
        """The arguments of `training.train` for the base model."""
        names = {"epochs", "batch_size", "lr", "lr_decay_epochs", "seed"}
        return self.model_dump(include=names)


class Settings(BaseSettings):
    """What a fine-tuned model depends on: every setting there is."""

    method: OF_RULE["method"] = Field("top_k", description=", ".join(RULES))
    param: Annotated[OF_RULE["param"], Digits] = Field(0.1, le=64)
    """of the method; top_k: larger hides more"""
    upsample: OF_RULE["upsample"] = "bilinear"
    """mask to the image: bilinear, nearest, or map (first)"""
    dilation: Annotated[OF_RULE["dilation"], Field(le=28)] = 0
    """how far the mask is dilated, in 28ths of the side"""
    shared: bool = False
    """one mask for all images, from the mean of their maps"""
    fill: OF_RULE["fill"] = "zero"
    """what hidden pixels become: zero, or resample (another image's)"""
    finetune_optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd or adam"""
    finetune_lr: Rate | None = None
    """None: lr after the base model's last epoch"""
    finetune_schedule: Literal["constant", "linear"] = "constant"
    """constant, or linear (to 0)"""
    finetune_batch_size: BatchSize | None = None
    """None: batch_size"""
    finetune_epochs: PositiveInt = 1
    """epochs of fine-tuning; the paper has 1"""

    @property
    def configuration(self) -> str:
        """Method, param, and what is not the default."""
        rule = f"{self.method}_{self.param}"
        return rule + self._spelled_out(Settings.__annotations__)

    @property
    def rule(self) -> Rule:
        """How masks are made, see `masking`."""
        return Rule(**self.model_dump(include={*OF_RULE}))

    @property
    def finetuning(self) -> dict:
        """The arguments of `training.train` for fine-tuning: `training`, changed.

        The rate is `finetune_lr`, or what the base model's schedule ended with.
        """
        decays = self.epochs // self.lr_decay_epochs
        return {
            **self.training,
            "epochs": self.finetune_epochs,
            "lr": self.finetune_lr or self.lr * 0.5**decays,
            "batch_size": self.finetune_batch_size or self.batch_size,
            "optimizer": self.finetune_optimizer,
            "schedule": self.finetune_schedule,
        }


DEFAULTS = dict(Settings())
GONE = {"rounds": 1}  # names in files that are settings no more, and what they meant


def root(directory: str) -> Path:
    """Where the files of an experiment go: its `directory`, or the repository."""
    return Path(directory or REPOSITORY).expanduser()
