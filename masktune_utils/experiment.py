"""The models of an experiment, their maps and their results: loaded, or else made."""

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from masktune_utils import (
    datasets,
    evaluation,
    masking,
    models,
    results,
    saliency,
    selection,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.held_out import NULL, HeldOut
from masktune_utils.masking import NOTHING, MaskedDataset
from masktune_utils.selection import Choice
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings

CHOSEN = "chosen"  # configuration of the model with the chosen mask
CHOICE = "CNN_choice.npz"  # what is saved of a choice


@dataclass(frozen=True)
class Trained:
    """A saved model of an experiment, and what made it.

    Attributes:
        model: in evaluation mode.
        settings: of the experiment.
        configuration: `base`, `chosen`, or the name of the fine-tuned model.
        images: on which it was trained, or fine-tuned.
        history: see `training.train`, without the seconds.
        sha256: of the weights.
        base_sha256: of the weights of the base model.
        seconds: of training, if it was trained now; None if it was loaded.
    """

    model: nn.Module
    settings: Settings
    configuration: str
    images: Split | MaskedDataset
    history: list[dict[str, float]]
    sha256: str
    base_sha256: str
    seconds: float | None


def from_notebook(
    namespace: dict[str, Any], other_names: Sequence[str] = (), **derived: Any
) -> Settings:
    """Make a notebook's parameters into settings: the names as they are when called.

    The first cell shows the parameters that its reader plays with; papermill can inject
    every other setting, too.

    Args:
        namespace: the notebook's `globals()`.
        other_names: parameters of this notebook that are no settings.
        **derived: settings that the notebook has computed.

    Raises:
        ValueError: see `Settings`; papermill injected an unknown parameter; or the
            directory cannot be written to.
    """
    check_parameters(namespace, {*DEFAULTS, *other_names})
    values = {name: namespace[name] for name in DEFAULTS if name in namespace}
    settings = Settings(**{**values, **derived})
    store.check_writable(settings.directory)
    settings = settings.replace(dataset=datasets.resolve_dataset(settings.dataset))
    print(
        f"Images: {settings.dataset}. Device: {store.resolve_device(settings.device)}."
    )
    return settings


def check_parameters(namespace: dict[str, Any], known: set[str]) -> None:
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
            allowed = ", ".join(sorted(known))
            raise ValueError(f"{name} is not a parameter; allowed: {allowed}.")


def base_model(settings: Settings, train: Split, retrain: bool = False) -> Trained:
    """The ERM model.

    Args:
        settings: the experiment.
        train: the biased training set.
        retrain: train and save it again in any case.

    Raises:
        CheckpointError: see `load_or_train`.
    """
    network = _new_network(settings, train)
    return load_or_train(settings, "base", network, train, retrain)


def _new_network(settings: Settings, images: Split) -> nn.Module:
    """The network at the start of training on images."""
    labels = images.labels
    return models.new_model(settings.seed, labels.device, len(labels.unique()))


def load_or_train(
    settings: Settings,
    configuration: str,
    start: nn.Module,
    images: Split | MaskedDataset,
    retrain: bool = False,
) -> Trained:
    """The saved model, which is trained first if need be.

    Args:
        settings: the experiment.
        configuration: see `Trained`; any but `base` is fine-tuned.
        start: the network at the start of training; it is left as it is.
        images: on which it is trained.
        retrain: train and save it again in any case.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings
            or from another base model.
    """
    path = settings.checkpoint_path(configuration)
    is_base = configuration == "base"
    identity = settings.identity(base=is_base)
    if not is_base:
        identity["base_sha256"] = store.weights_sha256(start.state_dict())
    seconds = None
    if retrain or not path.exists():
        network = copy.deepcopy(start)
        options = settings.training if is_base else settings.finetuning
        history = training.train(network, images, **options)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, network, identity, history)
    saved = store.load_checkpoint(path, identity, images.labels.device)
    sha256 = store.weights_sha256(saved.model.state_dict())
    return Trained(
        model=saved.model,
        settings=settings,
        configuration=configuration,
        images=images,
        history=saved.history,
        sha256=sha256,
        base_sha256=identity.get("base_sha256", sha256),
        seconds=seconds,
    )


def masktune(
    settings: Settings, base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """MaskTune: maps of the base model, masks, and fine-tuning on the masked images.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.
        retrain: fine-tune and save it again in any case.

    Raises:
        CheckpointError: see `load_or_train`.
    """
    tuned = None

    def finetune(network: nn.Module, masked: MaskedDataset) -> nn.Module:
        nonlocal tuned
        of_round = settings.with_rule(masked.rule)
        name = of_round.configuration
        tuned = load_or_train(of_round, name, network, masked, retrain)
        return tuned.model

    maps = training_saliency(settings, base, train)
    *_, (_, masked) = masking.masktune(
        base.model, train, settings.rule, finetune, maps, seed=settings.seed
    )
    if masked.rule != settings.rule:  # the rounds ended before
        name = settings.configuration
        tuned = load_or_train(settings, name, base.model, masked, retrain)
    return tuned


def training_saliency(settings: Settings, base: Trained, train: Split) -> Tensor:
    """Saliency maps of the training set, N×h×w; computed once per base model.

    Args:
        settings: the experiment.
        base: the ERM model.
        train: the biased training set.
    """
    path = settings.folder("checkpoints") / "CNN_saliency.pth"
    with contextlib.suppress(Exception):  # not there, damaged: it is made again
        saved = store.read_tensors(path)
        if saved["base_sha256"] == base.sha256:
            return saved["maps"].to(train.labels.device)
    maps = saliency.saliency_maps(base.model, train.images, train.labels)
    store.write_tensors(path, {"maps": maps.cpu(), "base_sha256": base.sha256})
    return maps


def record(trained: Trained, sets: BiasedSets) -> dict[str, Any]:
    """Evaluate a model and save the result; or return what is saved of it.

    Args:
        trained: the base model or a fine-tuned one.
        sets: the images.

    Returns:
        A row of the table of results: `experiment`, `configuration` and `seed`, which
        tell it from all others; `rule`, in words; the settings; `sha256` of the weights
        and `base_sha256` of the base model's; `seconds`, `threads`, `device`, `torch`
        of the training that made them (if the model was loaded and no result of it is
        saved, `seconds` is None, and the others are those of this process); `raw`,
        `biased`, `worst_group` and `group {name}`, accuracies in [0, 1]; for a
        fine-tuned model `hidden_{shortcut,shortcut_whole,rest,digit}`, see
        `hidden_shares`. All of `evaluation.evaluate` is in `metrics`.
    """
    settings = trained.settings
    path = settings.folder("results") / f"{trained.configuration}.json"
    if trained.seconds is None and path.exists():
        saved = results.read(path)
        if saved["sha256"] == trained.sha256:
            return saved
    is_base = trained.sha256 == trained.base_sha256
    is_chosen = trained.configuration == CHOSEN
    rule = trained.images.rule if is_chosen and not is_base else settings.rule
    device = sets.train.labels.device
    report = evaluation.evaluate(trained.model, sets)
    row = {
        "experiment": settings.experiment,
        "configuration": trained.configuration,
        "rule": "ERM" if is_base else f"{rule}",
        **settings.identity(base=is_base),
        "seconds": trained.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else device.type,
        "sha256": trained.sha256,
        "base_sha256": trained.base_sha256,
        "worst_group": report["worst_group"],
        "metrics": report,
    }
    for test in sets.tests:
        row[test] = report[test]["accuracy"]
    for name, share in report["groups"].items():
        row[f"group {name}"] = share
    if not is_base:
        for name, share in evaluation.hidden_shares(trained.images).items():
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
        **settings.model_dump(include={*BaseSettings.model_fields}),
        finetune_lr=0.02,
        finetune_schedule="linear",
        finetune_batch_size=selection.BATCH_SIZE,
        finetune_epochs=selection.default_epochs(count),
    )


def choose(base: Trained, train: Split, jobs: int = 1, retrain: bool = False) -> Choice:
    """Choose a mask, or keep ERM, by `selection.choose`.

    What the models of both folds predict is saved with the masks; the verdict is made
    anew from it.

    Args:
        base: the ERM model of all images.
        train: the training images.
        jobs: how many processes.
        retrain: train the models of both folds again.

    Raises:
        CheckpointError: what is saved is damaged, or no choice.
    """
    saved = None if retrain else saved_choice(base, train)
    if saved is not None:
        return saved
    settings = choice_settings(base.settings, len(train))
    choice = selection.choose(
        train,
        partial(_fit, settings),
        candidates=selection.CANDIDATES,
        jobs=jobs,
        seed=settings.seed,
    )
    arrays = choice.held_out.to_arrays()
    for number, masked in enumerate(choice.candidates.values()):
        arrays[f"masks_{number}"] = np.packbits(masked.own_masks.cpu(), axis=-1)
    arrays["made_with"] = _made_with(settings, base)
    # The model of an earlier choice goes first.
    settings.checkpoint_path(CHOSEN).unlink(missing_ok=True)
    store.write_arrays(settings.folder("checkpoints") / CHOICE, arrays)
    return choice


def saved_choice(base: Trained, train: Split) -> Choice | None:
    """The choice that is saved; None if there is none for this base model.

    Nor is one that was made with other candidates or by another schedule returned.

    Args:
        base: the ERM model of all images.
        train: the training images.

    Raises:
        CheckpointError: it is damaged, or no choice.
    """
    settings = choice_settings(base.settings, len(train))
    path = settings.folder("checkpoints") / CHOICE
    if not path.exists():
        return None
    width = train.images.shape[-1]
    candidates = {}
    try:
        arrays = store.read_arrays(path)
        if arrays["made_with"] != _made_with(settings, base):
            return None
        held_out = HeldOut.from_arrays(arrays)
        rules = {}
        for candidate in (NOTHING, *selection.CANDIDATES):
            rules |= {f"{rule}": rule for rule in candidate.each_round}
        for number, name in enumerate((NULL, *held_out.hidden.index)):
            masks = np.unpackbits(arrays[f"masks_{number}"], axis=-1, count=width)
            own_masks = torch.from_numpy(masks).bool().to(train.labels.device)
            candidates[name] = MaskedDataset(
                train, own_masks, rules[name].fill, settings.seed, rule=rules[name]
            )
    except Exception as error:  # NumPy has no class of its own for a damaged file
        raise store.CheckpointError(
            f"{path} is damaged or foreign ({error}). Delete it."
        ) from error
    schedule = partial(selection.fine_tune, epochs=settings.finetune_epochs)
    return Choice(held_out, candidates, schedule, selection.judge(held_out))


def chosen_model(
    choice: Choice, base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """The model with the chosen mask; or the base model itself, if ERM is kept.

    Args:
        choice: see `choose`.
        base: the ERM model.
        train: the biased training set.
        retrain: fine-tune it again.

    Raises:
        CheckpointError: see `load_or_train`; or another mask had been chosen.
    """
    if choice.is_kept:
        return dataclasses.replace(base, configuration=CHOSEN)
    settings = choice_settings(base.settings, len(train))
    settings = settings.with_rule(choice.masked.rule)
    return load_or_train(settings, CHOSEN, base.model, choice.masked, retrain)


def _fit(settings: Settings, fold: Split) -> nn.Module:
    """The base model of a fold."""
    network = _new_network(settings, fold)
    training.train(network, fold, **settings.training)
    return network


def _made_with(settings: Settings, base: Trained) -> str:
    """What a choice depends on, as text."""
    parts = {
        "base_sha256": base.sha256,
        "candidates": [f"{rule}" for rule in selection.CANDIDATES],
        "schedule": settings.finetuning,
    }
    return json.dumps(parts)
