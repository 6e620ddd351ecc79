"""The models of an experiment, their maps, choice and results: loaded, or else made."""

import copy
import math
import re
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import joblib
import torch
from torch import Tensor, nn

from masktune_utils import datasets, models, results, saliency, store, training
from masktune_utils.choice import Choice, chosen, load_or_choose
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import DEFAULTS, GONE, BaseSettings, Settings

CHOICE_FILE = "CNN_choice.pth"  # beside the checkpoints
EARLY = 8000  # images that networks see in training before a choice looks first


class Trained(NamedTuple):
    """A saved model of an experiment, and what made it.

    Attributes:
        model: in evaluation mode.
        settings: what it depends on; of the base model, `BaseSettings`.
        images: on which it was trained, or fine-tuned.
        history: see `training.train`.
        sha256: of the weights.
        base_sha256: of the weights of the base model.
        seconds: of training, if it was trained now; None if it was loaded.
        configuration: its name among the models of the experiment.
    """

    model: nn.Module
    settings: BaseSettings
    images: Split | MaskedDataset
    history: list[dict[str, float]]
    sha256: str
    base_sha256: str
    seconds: float | None
    configuration: str


def from_notebook(namespace: dict, *other_names: str, **derived: object) -> Settings:
    """Make a notebook's parameters into settings: the names as they are when called.

    The first cell shows the parameters that its reader plays with; papermill can inject
    every other setting, too.

    Args:
        namespace: the notebook's `globals()`.
        *other_names: parameters of this notebook that are no settings.
        **derived: settings that the notebook has computed.

    Raises:
        ValueError: see `Settings`; or papermill injected an unknown parameter.
    """
    check_parameters(namespace, {*DEFAULTS, *other_names})
    values = {name: namespace[name] for name in DEFAULTS if name in namespace}
    settings = Settings(**{**values, **derived})
    settings = settings.replace(dataset=datasets.resolve_dataset(settings.dataset))
    device = models.resolve_device(settings.device)
    print(f"Images: {settings.dataset}. Device: {device}.")
    return settings


def check_parameters(namespace: dict, known: set[str]) -> None:
    """Refuse names in the cell that papermill adds which are no parameters.

    Args:
        namespace: the notebook's `globals()`.
        known: names of the parameters.

    Raises:
        ValueError: there is another name.
    """
    # The cell that papermill adds begins with this line.
    cells = [cell for cell in namespace["In"] if cell.startswith("# Parameters\n")]
    for name in re.findall(r"^(\w+) = ", "\n".join(cells), re.MULTILINE):
        if name not in known:
            raise ValueError(
                f"{name} is not a parameter; known: {', '.join(sorted(known))}"
            )


def base_model(settings: Settings, train: Split) -> Trained:
    """The ERM model.

    Args:
        settings: the experiment.
        train: the biased training set.

    Raises:
        CheckpointError: see `load_or_train`.
    """
    return load_or_train(settings.base, train)


def new_network(settings: BaseSettings, images: Split) -> nn.Module:
    """The network at the start of training on images."""
    num_classes = len(images.class_names)
    return models.new_model(settings.seed, images.labels.device, num_classes)


def load_or_train(
    settings: BaseSettings,
    images: Split | MaskedDataset,
    base: Trained | None = None,
    configuration: str | None = None,
    **made_with: str,
) -> Trained:
    """The saved model, which is trained first if need be.

    Args:
        settings: see `Trained`.
        images: on which it is trained.
        base: the model that is fine-tuned, which is left as it is; None: a new network
            is trained.
        configuration: its name; by default that of the settings.
        **made_with: what it depends on besides these.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings
            or from another base model.
    """
    if base is None:
        network = new_network(settings, images)
        options = settings.training
    else:
        network = copy.deepcopy(base.model)
        options = settings.finetuning
        made_with["base_sha256"] = base.sha256
    seconds = None

    def make() -> dict:
        nonlocal seconds
        started = time.perf_counter()
        history = training.train(network, images, **options)
        seconds = time.perf_counter() - started
        weights = {
            name: weight.cpu().contiguous()
            for name, weight in network.state_dict().items()
        }
        return {"state_dict": weights, "history": history}

    made_with = {**settings.identity, **made_with}
    configuration = configuration or settings.configuration
    path = settings.checkpoint_path(configuration)
    saved = store.load_or_make(path, made_with, make, **DEFAULTS, **GONE)
    with store.blame(path):
        network.load_state_dict(saved["state_dict"])
    sha256 = store.sha256(network.state_dict())
    return Trained(
        model=network.eval(),
        settings=settings,
        images=images,
        history=saved["history"],
        sha256=sha256,
        base_sha256=made_with.get("base_sha256", sha256),
        seconds=seconds,
        configuration=configuration,
    )


def with_weights(path: str | Path) -> nn.Module:
    """A SmallCNN with the weights of a file, in evaluation mode, on the CPU.

    Args:
        path: a checkpoint of this project, or a plain state dict, as the published
            ones are.

    Raises:
        CheckpointError: the file is damaged or foreign.
        FileNotFoundError: there is none.
    """
    path = Path(path).expanduser()
    content = store.read(path)
    with store.blame(path):
        weights = content.get("state_dict", content)
        network = models.new_model(0, num_classes=len(weights["linear.3.bias"]))
        network.load_state_dict(weights)
    return network.eval()


def masktune(settings: Settings, base: Trained) -> Trained:
    """MaskTune: the base model, fine-tuned on masked images.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.

    Raises:
        CheckpointError: see `load_or_train`.
    """
    maps = training_saliency(base)
    masked = settings.rule.mask(base.images, maps, seed=settings.seed)
    return load_or_train(settings, masked, base)


def training_saliency(base: Trained) -> Tensor:
    """Saliency maps of the training set, N×h×w; computed once per base model.

    Args:
        base: the ERM model.

    Raises:
        CheckpointError: the saved ones are damaged, or of another base model.
    """
    train = base.images

    def make() -> dict:
        maps = saliency.saliency_maps(base.model, train.images, train.labels)
        return {"maps": maps.cpu()}

    path = base.settings.folder("checkpoints") / "CNN_saliency.pth"
    saved = store.load_or_make(path, {"base_sha256": base.sha256}, make)
    return saved["maps"].to(train.labels.device)


def record(trained: Trained, sets: datasets.BiasedSets) -> dict:
    """Evaluate a model and save the result; or return what is saved of it.

    Args:
        trained: the base model or a fine-tuned one.
        sets: the images.

    Returns:
        A row of the table of results: `experiment`, `configuration` and `seed`, which
        tell it from all others; `rule`, in words; the settings; `sha256` of the weights
        and `base_sha256` of the base model's; `seconds`, `threads`, `device`, `torch`
        of the training that made them (if the model was loaded and no result of it is
        saved, `seconds` is None, and the others are those of this process); see
        `results.evaluate`; for a fine-tuned model
        `hidden_{shortcut,shortcut_whole,rest,digit}`, see `results.hidden_shares`.
    """
    settings = trained.settings
    path = settings.folder("results") / f"{trained.configuration}.json"
    if path.exists():
        saved = results.read(path)
        if saved["sha256"] == trained.sha256:
            return saved
    device = sets.train.labels.device
    device_name = device.type
    if device.type == "cuda":
        device_name = torch.cuda.get_device_name(device)
    row = {
        "experiment": settings.experiment,
        "configuration": trained.configuration,
        "rule": "ERM",
        **settings.identity,
        "seconds": trained.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": device_name,
        "sha256": trained.sha256,
        "base_sha256": trained.base_sha256,
        **results.evaluate(trained.model, sets),
    }
    if trained.sha256 != trained.base_sha256:
        row["rule"] = f"{trained.images.rule}"
        for name, share in results.hidden_shares(trained.images).items():
            row[f"hidden_{name}"] = share
    results.write_json(path, row)
    return row


def chosen_settings(settings: BaseSettings, count: int) -> Settings:
    """The settings of a model with a chosen mask: `choice.fine_tune`, as settings.

    Args:
        settings: of the base model.
        count: number of training images. If they are few, fine-tuning takes several
            epochs.
    """
    return Settings(
        **dict(settings),
        finetune_lr=chosen.LR,
        finetune_schedule="linear",
        finetune_batch_size=chosen.BATCH_SIZE,
        finetune_epochs=chosen.default_epochs(count),
    )


def choose_mask(base: Trained) -> Choice:
    """Choose a mask, or keep ERM, by `choice.choose`; on a CPU, in two processes.

    Args:
        base: the ERM model of all images.

    Raises:
        CheckpointError: what is saved is damaged, or was made with something else.
    """
    train = base.images
    settings = base.settings
    early_epochs = math.ceil(2 * EARLY / len(train))
    jobs = min(2, joblib.cpu_count()) if train.labels.is_cpu else 1
    threads = max(1, torch.get_num_threads() // jobs)
    with joblib.parallel_config("loky", n_jobs=jobs, inner_max_num_threads=threads):
        return load_or_choose(
            settings.folder("checkpoints") / CHOICE_FILE,
            train,
            partial(fit_half, settings),
            {"base_sha256": base.sha256},
            seed=settings.seed,
            early=early_epochs / settings.epochs
            if early_epochs < settings.epochs
            else 0,
        )


def fit_half(settings: BaseSettings, half: Split, share: float) -> nn.Module:
    """The base model of a half of the images, for a share of the epochs."""
    network = new_network(settings, half)
    epochs = round(share * settings.epochs)
    training.train(network, half, **{**settings.training, "epochs": epochs})
    return network


def chosen_model(choice: Choice, base: Trained) -> Trained:
    """The model with the chosen mask; or the base model itself, if ERM is kept.

    Args:
        choice: see `choose_mask`.
        base: the ERM model.

    Raises:
        CheckpointError: see `load_or_train`; or another mask had been chosen.
    """
    if choice.keeps_erm:
        return base._replace(configuration="chosen")
    masked = choice.masked
    rule = asdict(masked.rule)
    for name in ("rounds", "exchange"):  # which are no settings
        del rule[name]
    settings = chosen_settings(base.settings, len(masked)).replace(**rule)
    return load_or_train(
        settings,
        masked,
        base,
        configuration="chosen",
        rule=f"{masked.rule}",
        masks_sha256=store.sha256({"masks": masked.own_masks}),
    )
