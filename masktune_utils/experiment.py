"""The models of an experiment, their maps, choice and results: loaded, or else made."""

import copy
import re
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

import joblib
import numpy as np
import torch
from torch import Tensor, nn

from masktune_utils import (
    datasets,
    masking,
    models,
    results,
    saliency,
    store,
    training,
)
from masktune_utils.choice import Choice, HeldOut, score
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings

CHOSEN = "chosen"  # configuration of the model with the chosen mask
CHOICE = "CNN_choice.pth"  # the file of a choice, beside the checkpoints


class Trained(NamedTuple):
    """A saved model of an experiment, and what made it.

    Attributes:
        model: in evaluation mode.
        settings: what it depends on; of the base model, `BaseSettings`.
        configuration: `base`, `chosen`, or the name of the fine-tuned model.
        images: on which it was trained, or fine-tuned.
        history: see `training.train`.
        sha256: of the weights.
        base_sha256: of the weights of the base model.
        seconds: of training, if it was trained now; None if it was loaded.
    """

    model: nn.Module
    settings: BaseSettings
    configuration: str
    images: Split | MaskedDataset
    history: list[dict[str, float]]
    sha256: str
    base_sha256: str
    seconds: float | None


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
    device = store.resolve_device(settings.device)
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
    return load_or_train(settings.base, "base", train)


def _new_network(settings: BaseSettings, images: Split) -> nn.Module:
    """The network at the start of training on images."""
    num_classes = len(images.class_names)
    return models.new_model(settings.seed, images.labels.device, num_classes)


def load_or_train(
    settings: BaseSettings,
    configuration: str,
    images: Split | MaskedDataset,
    base: Trained | None = None,
    **made_with: str,
) -> Trained:
    """The saved model, which is trained first if need be.

    Args:
        settings: see `Trained`, as for `configuration`.
        configuration: its name.
        images: on which it is trained.
        base: the model that is fine-tuned, which is left as it is; None: a new network
            is trained.
        **made_with: what it depends on besides these.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings
            or from another base model.
    """
    if base is None:
        network = _new_network(settings, images)
    else:
        network = copy.deepcopy(base.model)
        made_with["base_sha256"] = base.sha256
    seconds = None

    def make() -> dict:
        nonlocal seconds
        started = time.perf_counter()
        history = training.train(network, images, **settings.training)
        seconds = time.perf_counter() - started
        weights = {}
        for name, weight in network.state_dict().items():
            weights[name] = weight.cpu().contiguous()
        return {"state_dict": weights, "history": history}

    path = settings.checkpoint_path(configuration)
    made_with = {**settings.identity, **made_with}
    saved = store.kept(path, made_with, make)
    with store.reading(path):
        network.load_state_dict(saved["state_dict"])
    sha256 = store.sha256(network.state_dict())
    return Trained(
        model=network.eval(),
        settings=settings,
        configuration=configuration,
        images=images,
        history=saved["history"],
        sha256=sha256,
        base_sha256=made_with.get("base_sha256", sha256),
        seconds=seconds,
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
    with store.reading(path):
        weights = content.get("state_dict", content)
        network = models.new_model(0, num_classes=len(weights["linear.3.bias"]))
        network.load_state_dict(weights)
    return network.eval()


def masktune(settings: Settings, base: Trained, train: Split) -> Trained:
    """MaskTune: maps of the base model, masks, and fine-tuning on the masked images.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.

    Raises:
        CheckpointError: see `load_or_train`.
    """
    trained = []

    def finetune(_copy: nn.Module, masked: MaskedDataset) -> nn.Module:
        of_round = settings.replace(rounds=masked.rule.rounds)
        tuned = load_or_train(of_round, of_round.configuration, masked, base)
        trained.append(tuned)
        return tuned.model

    maps = training_saliency(settings, base, train)
    rounds = masking.masktune(
        base.model, train, settings.rule, finetune, maps, seed=settings.seed
    )
    *_, (_, masked) = rounds
    if trained[-1].settings != settings:  # the last rounds hid nothing more
        finetune(base.model, masked)
    return trained[-1]


def training_saliency(settings: Settings, base: Trained, train: Split) -> Tensor:
    """Saliency maps of the training set, N×h×w; computed once per base model.

    Args:
        settings: the experiment.
        base: the ERM model.
        train: the biased training set.

    Raises:
        CheckpointError: the saved ones are damaged, or of another base model.
    """

    def make() -> dict:
        maps = saliency.saliency_maps(base.model, train.images, train.labels)
        return {"maps": maps.cpu()}

    path = settings.folder("checkpoints") / "CNN_saliency.pth"
    saved = store.kept(path, {"base_sha256": base.sha256}, make)
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


def choice_settings(settings: BaseSettings, count: int) -> Settings:
    """The settings of a choice: how all candidates are fine-tuned.

    Args:
        settings: of the base model.
        count: number of training images. If they are few, fine-tuning takes several
            epochs.
    """
    return Settings(
        **dict(settings),
        finetune_lr=0.02,
        finetune_schedule="linear",
        finetune_batch_size=score.BATCH_SIZE,
        finetune_epochs=score.default_epochs(count),
    )


def choose(base: Trained, train: Split) -> Choice:
    """Choose a mask, or keep ERM, by `choice.choose`; on a CPU, in two processes.

    What the models of both folds predict is saved with the masks; the verdict is made
    anew from it.

    Args:
        base: the ERM model of all images.
        train: the training images.

    Raises:
        CheckpointError: what is saved is damaged, or was made with something else.
    """
    settings = choice_settings(base.settings, len(train))
    jobs = min(2, joblib.cpu_count()) if train.labels.is_cpu else 1

    def make() -> dict:
        threads = max(1, torch.get_num_threads() // jobs)
        with joblib.parallel_config("loky", inner_max_num_threads=threads):
            made = score.choose(
                train,
                partial(_fit, base.settings),
                jobs=jobs,
                seed=settings.seed,
            )
        masks = {}
        for name, masked in made.candidates.items():
            bits = np.packbits(masked.own_masks.cpu())
            masks[name] = (vars(masked.rule), zlib.compress(bits))
        return {"held_out": vars(made.held_out), "masks": masks}

    made_with = {
        "base_sha256": base.sha256,
        "candidates": "; ".join(map(str, score.CANDIDATES)),
        **settings.training,
    }
    path = settings.folder("checkpoints") / CHOICE
    saved = store.kept(path, made_with, make)
    pixels = train.images[:, 0]
    candidates = {}
    with store.reading(path):
        held_out = HeldOut(**saved["held_out"])
        for name, (fields, packed) in saved["masks"].items():
            packed_bits = np.frombuffer(zlib.decompress(packed), np.uint8)
            bits = np.unpackbits(packed_bits, count=pixels.numel())
            own_masks = pixels.new_tensor(bits, dtype=torch.bool).view(pixels.shape)
            rule = Rule(**fields)
            candidates[name] = MaskedDataset(
                train, own_masks, rule.fill, settings.seed, rule=rule
            )
    schedule = partial(score.fine_tune, epochs=settings.finetune_epochs)
    return Choice(held_out, candidates, schedule, score.judge(held_out))


def _fit(settings: BaseSettings, fold: Split) -> nn.Module:
    """The base model of a fold."""
    network = _new_network(settings, fold)
    training.train(network, fold, **settings.training)
    return network


def chosen_model(choice: Choice, base: Trained, train: Split) -> Trained:
    """The model with the chosen mask; or the base model itself, if ERM is kept.

    Args:
        choice: see `choose`.
        base: the ERM model.
        train: the biased training set.

    Raises:
        CheckpointError: see `load_or_train`; or another mask had been chosen.
    """
    if choice.is_kept:
        return base._replace(configuration=CHOSEN)
    masked = choice.masked
    rule = asdict(masked.rule)
    del rule["exchange"]  # which is no setting
    settings = choice_settings(base.settings, len(train)).replace(**rule)
    return load_or_train(
        settings,
        CHOSEN,
        masked,
        base,
        rule=f"{masked.rule}",
        masks_sha256=store.sha256({"masks": masked.own_masks}),
    )
