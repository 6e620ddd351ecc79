"""The models of an experiment, their maps and their results: loaded, or else made."""

import contextlib
import copy
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

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
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings

INJECTED = "# Parameters\n"  # the first line of the cell that papermill adds


@dataclass(frozen=True)
class Trained:
    """A saved model of an experiment, and what made it.

    Attributes:
        model: in evaluation mode.
        settings: of the experiment.
        configuration: `base`, or the name of the fine-tuned model.
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
    for source in namespace["In"]:
        if source.startswith(INJECTED):
            for name in re.findall(r"^(\w+) = ", source, re.MULTILINE):
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
        CheckpointError: the saved one is damaged, foreign, or made with other settings.
    """
    labels = train.labels
    network = models.new_model(settings.seed, labels.device, len(labels.unique()))
    return _load_or_train(
        settings, "base", network, train, settings.training, "", retrain
    )


def finetuned_model(
    settings: Settings, network: nn.Module, masked: MaskedDataset, retrain: bool = False
) -> Trained:
    """A trained network after fine-tuning on masked images (in the paper, one epoch).

    Args:
        settings: the experiment.
        network: the ERM model; it is left as it is.
        masked: the masked training set.
        retrain: fine-tune and save it again in any case.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings
            or from another base model.
    """
    name = settings.configuration
    base_sha256 = store.weights_sha256(network.state_dict())
    return _load_or_train(
        settings, name, network, masked, settings.finetuning, base_sha256, retrain
    )


def _load_or_train(
    settings: Settings,
    configuration: str,
    start: nn.Module,
    images: Dataset,
    options: dict[str, Any],
    base_sha256: str,
    retrain: bool,
) -> Trained:
    """The saved model, which is trained first if need be.

    Args:
        settings: the experiment.
        configuration: see `Trained`.
        start: the network at the start of training; it is left as it is.
        images: on which it is trained.
        options: of `training.train`.
        base_sha256: of the base model from which it starts; empty if it is one.
        retrain: train it in any case.
    """
    path = settings.checkpoint_path(configuration)
    identity = settings.identity(base=not base_sha256)
    if base_sha256:
        identity["base_sha256"] = base_sha256
    seconds = None
    if retrain or not path.exists():
        network = copy.deepcopy(start)
        history = training.train(network, images, **options)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, network, identity, history)
    saved = store.load_checkpoint(path, identity, images.labels.device)
    return Trained(
        model=saved.model,
        settings=settings,
        configuration=configuration,
        images=images,
        history=saved.history,
        sha256=saved.sha256,
        base_sha256=base_sha256 or saved.sha256,
        seconds=seconds,
    )


@dataclass(frozen=True)
class Saved:
    """What `masking.masktune` and `selection.choose` take, with models that are saved.

    Attributes:
        settings: of the experiment; those of masks may differ from call to call.
        retrain: train and save again.
    """

    settings: Settings
    retrain: bool = False

    def fit(self, fold: Split) -> nn.Module:
        """The base model of a fold."""
        settings = self.settings.of_fold(fold.fold)
        return base_model(settings, fold, self.retrain).model

    def finetune(self, network: nn.Module, masked: MaskedDataset) -> nn.Module:
        """The fine-tuned model of a fold, or of all images."""
        settings = self.settings.replace(**vars(masked.rule))
        if masked.split.fold is not None:
            settings = settings.of_fold(masked.split.fold)
        return finetuned_model(settings, network, masked, self.retrain).model


def masktune(
    settings: Settings, base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """MaskTune: maps of the base model, masks, and fine-tuning on the masked images.

    With `cross_fit`, the masks are those of a choice: of two base models, each trained
    on half of the images, and each masking its own half.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.
        retrain: fine-tune and save it again in any case.

    Raises:
        CheckpointError: see `finetuned_model`.
        ValueError: see `handed_over`.
    """
    if settings.cross_fit:
        masked = handed_over(settings, base, train)
    else:
        *_, (_, masked) = masking.masktune(
            base.model,
            train,
            settings.rule,
            Saved(settings, retrain).finetune,
            training_saliency(settings, base, train),
            partial(saliency.saliency_maps, cam=settings.cam),
            settings.seed,
        )
        is_trained = masked.rule == settings.rule  # else the rounds ended before
        retrain = retrain and not is_trained
    return finetuned_model(settings, base.model, masked, retrain)


def handed_over(settings: Settings, base: Trained, train: Split) -> MaskedDataset:
    """All images with the masks that `choose` has chosen and saved.

    Args:
        settings: the chosen ones.
        base: the ERM model of all images.
        train: the biased training set.

    Raises:
        ValueError: they are not there, damaged, or of another base model.
    """
    path = _masks_path(settings)
    try:
        content = np.load(path, allow_pickle=False)
        if content["base_sha256"] != base.sha256:
            raise ValueError("they are of another base model")
        own_masks = torch.from_numpy(content["masks"]).to(train.labels.device)
    except Exception as error:  # NumPy has no class of its own for a damaged file
        raise ValueError(
            f"{path} has no masks ({error}). Choose again: masktune choose --retrain "
            "True."
        ) from error
    return MaskedDataset(train, own_masks, settings.fill, settings.seed)


def _masks_path(settings: Settings) -> Path:
    return settings.folder("checkpoints") / f"CNN_masks_{settings.configuration}.npz"


def training_saliency(settings: Settings, base: Trained, train: Split) -> Tensor:
    """Saliency maps of the training set, N×h×w; computed once per base model.

    Args:
        settings: the experiment.
        base: the ERM model.
        train: the biased training set.
    """
    path = settings.folder("checkpoints") / f"CNN_saliency_{settings.cam}.pth"
    with contextlib.suppress(Exception):  # not there, damaged: it is made again
        saved = store.read_tensors(path)
        if saved["base_sha256"] == base.sha256 and len(saved["maps"]) == len(train):
            return saved["maps"].to(train.labels.device)
    maps = saliency.saliency_maps(base.model, train.images, train.labels, settings.cam)
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
        `biased`, `worst_group` and `{raw,biased}_class_{0,1,…}`, accuracies in [0, 1];
        `group {name}`, the same; for a fine-tuned model
        `hidden_{shortcut,shortcut_whole,rest,digit}`, see `hidden_shares`. All
        of `evaluation.evaluate` is in `metrics`.
    """
    settings = trained.settings
    path = settings.folder("results") / f"{trained.configuration}.json"
    if trained.seconds is None and path.exists():
        saved = results.read(path)
        if saved["sha256"] == trained.sha256:
            return saved
    is_base = trained.configuration == "base"
    device = sets.train.labels.device
    report = evaluation.evaluate(trained.model, sets)
    row = {
        "experiment": settings.experiment,
        "configuration": trained.configuration,
        "rule": "ERM" if is_base else f"{settings.rule}",
        **settings.identity(base=is_base),
        "seconds": trained.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name()
        if device.type == "cuda"
        else device.type,
        "sha256": trained.sha256,
        "base_sha256": trained.base_sha256,
        "worst_group": report["worst_group"],
        "metrics": report,
    }
    for test in sets.tests:
        row[test] = report[test]["accuracy"]
        for label, share in enumerate(report[test]["class_accuracy"]):
            row[f"{test}_class_{label}"] = share
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
    schedule = selection.default_schedule(count, is_coarse=False)
    of_base = {name: getattr(settings, name) for name in BaseSettings.model_fields}
    return Settings(
        **of_base,
        cross_fit=True,
        finetune_lr=0.02,
        finetune_schedule="linear",
        finetune_batch_size=schedule["batch_size"],
        finetune_epochs=schedule["epochs"],
    )


def choose(
    base: Trained, train: Split, jobs: int = 1, retrain: bool = False
) -> dict[str, Any]:
    """Choose a mask, or keep ERM, by `selection.choose`, with models that are saved.

    A choice that is saved for this base model and these candidates is returned.

    Args:
        base: the ERM model of all images.
        train: the training images.
        jobs: how many processes.
        retrain: train the models of both folds again.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one, or `base` if ERM is
        kept; `chosen`, the same in words; `rule`, what makes its masks; `reason`;
        `images`, how many; `mistake_numbers`, which are ERM's; `candidates`, in words;
        `accuracy`, `distances` and `left`, see `selection.Verdict`; `base_sha256`.
    """
    settings = choice_settings(base.settings, len(train))
    names = [f"{rule}" for rule in selection.CANDIDATES]
    saved_choice = None if retrain else results.current_choice(settings, base.sha256)
    if saved_choice and names == saved_choice["candidates"]:
        return saved_choice
    saved = Saved(settings, retrain)
    choice = selection.choose(
        train, saved.fit, saved.finetune, jobs=jobs, seed=settings.seed
    )
    rule = vars(choice.masked.rule)
    configuration = "base"
    if not choice.is_kept:
        chosen = settings.replace(**rule)
        configuration = chosen.configuration
        buffer = io.BytesIO()
        masks = choice.masks.cpu().numpy()
        np.savez_compressed(buffer, masks=masks, base_sha256=base.sha256)
        store.write_bytes(_masks_path(chosen), buffer.getvalue())
    verdict = choice.verdict
    content = {
        "configuration": configuration,
        "chosen": verdict.chosen,
        "rule": rule,
        "reason": verdict.reason,
        "images": len(train),
        "mistake_numbers": choice.is_mistake.nonzero()[:, 0].tolist(),
        "candidates": names,
        "accuracy": verdict.accuracy.to_dict("index"),
        "distances": verdict.distances.to_dict("index"),
        "left": verdict.left,
        "base_sha256": base.sha256,
    }
    results.write_json(settings.folder("results") / "chosen.json", content)
    return content


def chosen_model(
    choice: dict[str, Any], base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """The chosen model; or the base model itself, if ERM is kept.

    Args:
        choice: see `choose`.
        base: the ERM model.
        train: the biased training set.
        retrain: see `masktune`.
    """
    if choice["configuration"] == "base":
        return base
    settings = choice_settings(base.settings, len(train))
    chosen = settings.replace(**choice["rule"])
    return masktune(chosen, base, train, retrain)
