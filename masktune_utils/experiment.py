"""One experiment: its settings, where its artefacts live, and loading them or making them.

Under `directory` (default: the repository root) lie

    checkpoints/{dataset}/seed{seed}/CNN_checkpoint_base.pth
    checkpoints/{dataset}/seed{seed}/CNN_checkpoint_finetuned_{method}_{param}.pth
    checkpoints/{dataset}/seed{seed}/CNN_saliency_{cam}.pth
    figures/{dataset}/seed{seed}/*.png
    results/{dataset}/seed{seed}/*.json
    runs/{dataset}/seed{seed}/*.ipynb

and every other setting that is not the default is written into the name of the folder (where the base model depends on
it) or of the file (where only fine-tuning does), so that different settings never share a file.
"""

import ast
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO, get_type_hints

import torch
from torch import Tensor

from masktune_utils import data, masking, saliency, training
from masktune_utils.data import REPOSITORY
from masktune_utils.models import SmallCNN, new_model

RUNTIME = ("directory", "device", "retrain")  # where and how; they decide no result
MASK = ("method", "param", "upsample", "grow")
FINETUNE = (
    "cam",
    *MASK,
    "finetune_optimizer",
    "finetune_lr",
    "iterations",
    "accumulate",
)  # the base model ignores them
IN_PATH = ("dataset", "train_folder", "test_folder", "seed", "method", "param")  # always written into the path
CHOICES = {
    "dataset": data.DATASETS,
    "placement": data.PLACEMENTS,
    "cam": saliency.CAMS,
    "upsample": masking.UPSAMPLES,
    "finetune_optimizer": training.OPTIMIZERS,
}
RANGES = {"seed": (0, 2**32 - 1), **data.RANGES, **training.RANGES}
RANGES |= {"grow": (0, masking.MOST_GROWTH), "finetune_lr": training.RANGES["lr"], "iterations": (1, 100)}
PRESETS = {  # named settings
    "paper": {  # what the authors' code does
        "square_size": 4,
        "square_color": "red",
        "placement": "ordered",
        "method": "mean_std",
        "param": 2.0,
        "finetune_lr": 0.01,
    },
}


class CheckpointError(ValueError):
    """A file that is not a checkpoint of this project, is damaged, or was made with other settings."""


@dataclass(frozen=True)
class Settings:
    """Every setting of an experiment, checked when it is made.

    Raises:
        TypeError: for a value of the wrong type.
        ValueError: for a value that is not allowed; the message names the setting, the value and what is allowed.
    """

    directory: str = ""  # where artefacts go; "" is the repository root
    device: str = "auto"
    retrain: bool = False  # train again, and replace what is saved, even where a matching checkpoint exists
    dataset: str = "auto"
    train_folder: str = ""
    test_folder: str = ""
    seed: int = 0
    limit: int | None = None
    square_size: int = 6
    square_color: str = "blue"
    placement: str = "random"
    square_share_0: float = data.SQUARE_SHARES[0]
    square_share_1: float = data.SQUARE_SHARES[1]
    holdout: float = 0.0  # share of the training set kept for validation
    epochs: int = 50
    batch_size: int = 128
    lr: float = 0.01
    momentum: float = 0.9
    weight_decay: float = 1e-4
    lr_decay_epochs: int = 25
    lr_decay_factor: float = 0.5
    cam: str = "XGradCAM"
    method: str = "top_k"
    param: float = 0.1
    upsample: str = "bilinear"
    grow: int = 0
    finetune_optimizer: str = "sgd"
    finetune_lr: float | None = None  # None: the rate that the base model's training ended with
    iterations: int = 1  # of masking and fine-tuning, each from the model of the one before
    accumulate: bool = False  # keep hidden what the iterations before hid

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _typed(name, getattr(self, name), kind))
        for name, allowed in CHOICES.items():
            data.check_choice(name, getattr(self, name), allowed)
        for name, limits in RANGES.items():
            if (value := getattr(self, name)) is not None:
                data.check_range(name, value, *limits)
        data.check_limit(self.limit, self.dataset)
        data.check_folders(self.dataset, train_folder=self.train_folder, test_folder=self.test_folder)
        data.rgb(self.square_color)
        masking.check_method(self.method, self.param)
        training.resolve_device(self.device)

    def identity(self, *, base: bool) -> dict[str, Any]:
        """The settings that decide what a model becomes; of the base model, without those of fine-tuning."""
        left_out = RUNTIME + FINETUNE if base else RUNTIME
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in left_out}

    @property
    def data_name(self) -> str:
        """Name of the data set; of a folder the last two parts of its path."""
        return "-".join([self.dataset, *Path(self.train_folder).parts[-2:]]).replace(os.sep, "")

    @property
    def experiment(self) -> str:
        """Name of the base model's settings without the seed: the data set and whatever is not the default."""
        return f"{self.data_name}{self._unusual(tuple(self.identity(base=True)))}"

    @property
    def mask_rule(self) -> dict[str, Any]:
        """The settings that `masking.mask_dataset` asks for."""
        return {name: getattr(self, name) for name in (*MASK, "seed")}

    def _unusual(self, names: tuple[str, ...]) -> str:
        return "".join(
            f"_{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name in names and field.name not in IN_PATH and getattr(self, field.name) != field.default
        )

    def folder(self, kind: str) -> Path:
        """Folder of this experiment among the `checkpoints`, `figures`, `results` or `runs`."""
        name = f"seed{self.seed}{self.experiment.removeprefix(self.data_name)}"
        return REPOSITORY / self.directory / kind / self.data_name / name

    @property
    def configuration(self) -> str:
        """Name of the fine-tuned model: `{method}_{param}` and whatever is not the default."""
        return f"{self.method}_{self.param}{self._unusual(FINETUNE)}"

    def checkpoint_path(self, configuration: str) -> Path:
        """Where the model of a `configuration`, or `base`, lies."""
        name = configuration if configuration == "base" else f"finetuned_{configuration}"
        return self.folder("checkpoints") / f"CNN_checkpoint_{name}.pth"

    @property
    def saliency_path(self) -> Path:
        return self.folder("checkpoints") / f"CNN_saliency_{self.cam}.pth"


def _typed(name: str, value: object, kind: Any) -> Any:
    if isinstance(value, Real) and not isinstance(value, bool):  # NumPy's numbers too
        value = int(value) if isinstance(value, Integral) and not isinstance(0.0, kind) else float(value)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is {value!r}; allowed: {getattr(kind, '__name__', kind)}.")
    return value


def check_directory(directory: str) -> None:
    """Refuse a `directory` that nothing can be written to, before anything is computed.

    Raises:
        ValueError: names it and what is allowed.
    """
    path = REPOSITORY / directory
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        reason = "cannot be written to" if nearest.is_dir() else "is a file"
        raise ValueError(
            f"directory is {directory!r}; allowed: a folder to write to, or a new one ({nearest} {reason})."
        )


def from_notebook(namespace: dict[str, Any]) -> Settings:
    """Check a notebook's parameters and make them into settings, right after its cell of parameters.

    Papermill only warns of a parameter that the notebook does not have; here it is refused.

    Args:
        namespace: the notebook's `globals()`.

    Raises:
        TypeError: as `Settings`.
        ValueError: as `Settings`, and for an unknown parameter.
    """
    history = [source for source in namespace["In"] if source]
    injected = next((i for i, source in enumerate(history) if source.startswith("# Parameters\n")), None)
    if injected:
        known = _assigned(history[injected - 1])
        if unknown := [name for name in _assigned(history[injected]) if name not in known]:
            raise ValueError(f"unknown parameter {', '.join(unknown)}; this notebook has: {', '.join(known)}.")
    names = [field.name for field in dataclasses.fields(Settings)]
    settings = Settings(**{name: namespace[name] for name in names if name in namespace})
    check_directory(settings.directory)
    settings = dataclasses.replace(settings, dataset=data.resolve_dataset(settings.dataset))
    print(f"Digits: {settings.dataset}. Seed: {settings.seed}. Device: {training.resolve_device(settings.device)}.")
    return settings


def _assigned(source: str) -> list[str]:
    statements = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for node in statements for target in node.targets if isinstance(target, ast.Name)]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A binary file that takes the place of `path` when all is written, and leaves no trace otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(file.name, 0o644)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a small result; the file is there whole or not at all."""
    with atomic_write(path) as file:
        file.write(json.dumps(content, indent=1).encode() + b"\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """What `write_json` wrote, or None where there is no such file.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        content = json.loads(path.read_bytes()) if path.exists() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}). Delete it, and it is made again.") from error
    if not isinstance(content, dict | None):
        raise ValueError(f"{path} is damaged (no dict). Delete it, and it is made again.")  # noqa: TRY004 - of a file
    return content


def differences(recorded: dict[str, Any], settings: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings whose recorded value is not the one asked for: name → both. One younger than the record had its default."""
    recorded = {field.name: field.default for field in dataclasses.fields(Settings)} | recorded
    return {name: (recorded.get(name), value) for name, value in settings.items() if recorded.get(name) != value}


def weights_sha256(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over the names, types, shapes and bytes of all tensors."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_checkpoint(path: Path, model: SmallCNN, settings: dict[str, Any], history: list[dict[str, float]]) -> None:
    """Save a model with its settings, its history and the SHA-256 of its weights.

    The file depends on nothing else, and not on the time it took: the same run on the same machine writes the same bytes.

    Args:
        path: the file; it is replaced when all is written.
        model: the model.
        settings: what made it, as plain values.
        history: what `training.train` returned.
    """
    state_dict = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    history = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in history]
    content = {"state_dict": state_dict, "settings": settings, "history": history, "sha256": weights_sha256(state_dict)}
    _write(path, content)


def _write(path: Path, content: dict[str, Any]) -> None:
    """Save by torch.save; by way of memory, since it hides a full disk behind an error of its own."""
    torch.save(content, buffer := io.BytesIO())
    with atomic_write(path) as file:
        file.write(buffer.getvalue())


def _read(path: Path) -> dict[str, Any]:
    """The dict in a file of torch.save; no code in it is run."""
    file = io.BytesIO(path.read_bytes())
    try:
        if zipfile.is_zipfile(file) and (damaged := zipfile.ZipFile(file).testzip()):  # torch.load checks no CRC
            raise zipfile.BadZipFile(f"its part {damaged} has another CRC")
        file.seek(0)
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load has no error class of its own for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is damaged or not a checkpoint ({reason}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a checkpoint: it holds a {type(content).__name__}.")
    return content


def load_checkpoint(
    path: str | Path,
    settings: dict[str, Any] | None = None,
    device: str | torch.device = "cpu",
    dataset: str | None = None,
) -> tuple[SmallCNN, dict[str, Any]]:
    """Load a model, and refuse it if anything is wrong; no code in the file is run.

    Args:
        path: a file of `save_checkpoint`, or, if `settings` is None, a plain state dict of a SmallCNN.
        settings: what the model must have been made with.
        device: where the model is to lie.
        dataset: the digits that it is to be used on; one that was made from others is refused.

    Returns:
        The model, in evaluation mode, and what else the file holds: `settings`, `history`, `sha256` (of a plain state
        dict the SHA-256 alone).

    Raises:
        CheckpointError: a damaged file, a foreign one, or one made with other settings or from other digits; the
            message names the file and what is wrong.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give the path of a checkpoint.")
    content = _read(path)
    if settings is None and content and all(isinstance(value, Tensor) for value in content.values()):
        content = {"state_dict": content, "sha256": weights_sha256(content)}
    elif missing := {"state_dict", "settings", "history", "sha256"} - set(content):
        raise CheckpointError(f"{path} is not a checkpoint of this project: it has no {', '.join(sorted(missing))}.")
    state_dict, recorded = content["state_dict"], content.get("settings", {})
    if not isinstance(state_dict, dict) or not all(isinstance(value, Tensor) for value in state_dict.values()):
        raise CheckpointError(f"{path} is not a checkpoint of this project: its state dict is no dict of tensors.")
    if not isinstance(recorded, dict):
        raise CheckpointError(f"{path} is not a checkpoint of this project: its settings are no dict.")
    if weights_sha256(content["state_dict"]) != content["sha256"]:
        raise CheckpointError(f"{path} is damaged: its weights do not have the SHA-256 that it records. Delete it.")
    if unknown := recorded.keys() - {field.name for field in dataclasses.fields(Settings)} - {"base_sha256"}:
        raise CheckpointError(
            f"{path} was written by a newer version: it has the setting {', '.join(sorted(unknown))}. Update this one."
        )
    made_from = recorded.get("dataset", dataset)
    if dataset is not None and made_from != dataset:
        raise CheckpointError(
            f"{path} was trained on {made_from!r}, whose images may be among the test images of {dataset!r}; use "
            f"dataset={made_from!r}."
        )
    for name, (made_with, asked) in differences(recorded, settings or {}).items():
        raise CheckpointError(
            f"{path} was made with {name} = {made_with!r}, not {asked!r}. Use retrain = True to replace it, "
            "or another directory."
        )
    model = SmallCNN(len(state_dict.get("linear.3.bias", ())) if made_from == "folder" else 2)
    try:
        model.load_state_dict(content.pop("state_dict"))
    except RuntimeError as error:
        raise CheckpointError(f"{path} does not fit SmallCNN: {error}") from error
    return model.to(device, memory_format=torch.channels_last).eval(), content


def load_data(settings: Settings) -> data.BiasedMNIST:
    """The sets of the experiment, on its device."""
    names = ("dataset", "train_folder", "test_folder", "seed", "limit")
    names += ("square_size", "square_color", "placement", "holdout")
    return data.load(
        **{name: getattr(settings, name) for name in names},
        square_shares=(settings.square_share_0, settings.square_share_1),
        device=training.resolve_device(settings.device),
    )


def base_model(settings: Settings, train: data.Split, retrain: bool = False) -> tuple[SmallCNN, list[dict[str, float]]]:
    """The ERM model: loaded where it is saved, trained and saved otherwise.

    Args:
        settings: the experiment.
        train: the biased training set.
        retrain: train and save it again in any case.

    Returns:
        The model, in evaluation mode, and its history, see `training.train`; without `seconds` where it was loaded.

    Raises:
        CheckpointError: what is saved is damaged, foreign, or made with other settings.
    """
    names = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "lr_decay_epochs", "lr_decay_factor", "seed")

    def make() -> tuple[SmallCNN, list[dict[str, float]]]:
        model = new_model(settings.seed, train.labels.device, num_classes=int(train.labels.max()) + 1)
        return model, training.train(
            model, train, description="ERM", **{name: getattr(settings, name) for name in names}
        )

    return _saved_or_made(settings.checkpoint_path("base"), settings.identity(base=True), train, retrain, make)


def finetuned_model(
    settings: Settings, base: SmallCNN, masked: masking.MaskedDataset, retrain: bool = False
) -> tuple[SmallCNN, list[dict[str, float]]]:
    """The base model after ONE epoch on the masked images (MaskTune): loaded where it is saved, made otherwise.

    The learning rate is `finetune_lr`, or the one that the base model's schedule ended with. With several `iterations`,
    the images are masked again by what the fine-tuned model looks at, and it is trained for one more epoch.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        masked: the masked training set.
        retrain: fine-tune and save it again in any case.

    Returns:
        The model, in evaluation mode, and its history of one epoch an iteration.

    Raises:
        CheckpointError: what is saved is damaged, foreign, or made with other settings or from another base model.
    """
    names = ("batch_size", "momentum", "weight_decay", "seed")
    identity = settings.identity(base=False) | {"base_sha256": weights_sha256(base.state_dict())}
    rate = settings.finetune_lr or settings.lr * settings.lr_decay_factor ** (
        settings.epochs // settings.lr_decay_epochs
    )

    def make() -> tuple[SmallCNN, list[dict[str, float]]]:
        model = copy.deepcopy(base)
        fixed = {name: getattr(settings, name) for name in names}
        fixed |= {"optimizer": settings.finetune_optimizer, "lr": rate, "description": settings.configuration}
        history, images = training.train(model, masked, epochs=1, **fixed), masked
        for iteration in range(1, settings.iterations):
            split, earlier = masked.split, images if settings.accumulate else None
            maps = saliency.saliency_maps(model, split.images, split.labels, settings.cam)
            images = masking.mask_dataset(split, maps, **settings.mask_rule, earlier=earlier)
            history += [epoch | {"epoch": iteration + 1} for epoch in training.train(model, images, epochs=1, **fixed)]
        return model, history

    return _saved_or_made(settings.checkpoint_path(settings.configuration), identity, masked, retrain, make)


def _saved_or_made(
    path: Path, identity: dict[str, Any], dataset: training.Batches, retrain: bool, make: Callable
) -> tuple[SmallCNN, list[dict[str, float]]]:
    history = None
    if retrain or not path.exists():
        model, history = make()
        save_checkpoint(path, model, identity, history)
    model, checkpoint = load_checkpoint(path, identity, dataset.labels.device)
    return model, history or checkpoint["history"]


def training_saliency(settings: Settings, base: SmallCNN, train: data.Split) -> Tensor:
    """Saliency maps of the training set, N×8×8, computed once per base model and kept beside its checkpoint.

    Args:
        settings: the experiment.
        base: the ERM model.
        train: the biased training set.
    """
    made_from = {"base_sha256": weights_sha256(base.state_dict()), "cam": settings.cam}
    path = settings.saliency_path
    with contextlib.suppress(FileNotFoundError, CheckpointError):
        cached = _read(path)
        whole = isinstance(cached.get("maps"), Tensor) and cached.get("sha256") == weights_sha256(
            {"maps": cached["maps"]}
        )
        if whole and cached.get("made_from") == made_from:
            return cached["maps"].to(train.labels.device)
    maps = saliency.saliency_maps(base, train.images, train.labels, settings.cam)
    kept = maps.cpu()
    _write(path, {"maps": kept, "made_from": made_from, "sha256": weights_sha256({"maps": kept})})
    return maps
