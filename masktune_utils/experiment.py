"""The models of an experiment, their maps and their results: loaded, or else made."""

import ast
import contextlib
import copy
import difflib
import functools
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas as pd
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
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import DEFAULTS, RULE, BaseSettings, Settings

INJECTED = "# Parameters\n"  # the first line of the cell that papermill adds


@dataclass(frozen=True)
class Trained:
    """A saved model of an experiment, and what made it.

    Attributes:
        model: in evaluation mode.
        settings: of the experiment.
        configuration: `base`, or the name of the fine-tuned model.
        history: see `training.train`, without the seconds.
        sha256: of the weights.
        base_sha256: of the weights of the base model.
        seconds: of training, if it was trained now; None if it was loaded.
        masked: the masked images on which it was fine-tuned; None for a base model.
    """

    model: nn.Module
    settings: Settings
    configuration: str
    history: list[dict[str, float]]
    sha256: str
    base_sha256: str
    seconds: float | None
    masked: MaskedDataset | None = None


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
    for source in namespace["In"]:
        if source.startswith(INJECTED):
            _check_injected(source, {*DEFAULTS, *other_names})
    values = {name: namespace[name] for name in DEFAULTS if name in namespace}
    settings = Settings(**{**values, **derived})
    store.check_writable(settings.directory)
    settings = settings.replace(dataset=datasets.resolve_dataset(settings.dataset))
    map_size(settings.image_size, **settings.network)
    device = store.resolve_device(settings.device)
    print(f"Images: {settings.dataset}. Device: {device}.")
    return settings


def _check_injected(source: str, known: set[str]) -> None:
    """Refuse names that are no parameters, in the cell that papermill adds."""
    for statement in ast.parse(source).body:
        name = statement.targets[0].id
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            allowed = ", ".join(nearest or sorted(known))
            raise ValueError(f"{name} is not a parameter; allowed: {allowed}.")


@functools.cache
def map_size(image_size: int, name: str, weights: str) -> int:
    """Cells on a side of the maps of a network; refuses one that does not fit.

    `DEFAULT` is not downloaded here: a finished model does not need it.

    Raises:
        ValueError: the network does not exist, or does not fit its images or weights.
    """
    if (image_size, name, weights) == (28, "small_cnn", ""):
        return 8
    if weights == "DEFAULT" and name == "small_cnn":
        allowed = "with small_cnn: empty, or the path of a state dict"
        raise ValueError(f"weights are 'DEFAULT'; allowed {allowed}.")
    network = models.new_model(0, name=name)
    if weights not in ("", "DEFAULT"):
        store.load_weights(network, name, weights)
    image = torch.zeros(1, 3, image_size, image_size)
    try:
        with warnings.catch_warnings(action="ignore"):  # the map of black is zero
            return saliency.saliency_maps(network, image, torch.tensor([0])).shape[1]
    except (AssertionError, RuntimeError, TypeError) as error:
        allowed = "28 with small_cnn; with another network, a size that it takes"
        reason = f"{error}".splitlines()[0]
        raise ValueError(
            f"image_size is {image_size}; allowed: {allowed} ({reason})."
        ) from error


def new_network(
    settings: Settings, num_classes: int, device: torch.device
) -> nn.Module:
    """The network of an experiment at the start of training.

    Raises:
        ValueError: see `store.load_weights`.
    """
    network = models.new_model(settings.seed, device, num_classes, settings.model)
    if settings.weights:
        store.load_weights(network, settings.model, settings.weights)
    return network


def base_model(settings: Settings, train: Split, retrain: bool = False) -> Trained:
    """The ERM model.

    Args:
        settings: the experiment.
        train: the biased training set.
        retrain: train and save it again in any case.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings.
    """
    path = settings.checkpoint_path("base")
    identity = {**settings.identity(base=True), **datasets.describe_files(settings)}
    device = train.labels.device
    seconds = None
    if retrain or not path.exists():
        model = new_network(settings, len(train.labels.unique()), device)
        history = training.train(model, train, **settings.training)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, model, identity, history)
    saved = store.load_checkpoint(path, identity, device)
    return Trained(
        model=saved.model,
        settings=settings,
        configuration="base",
        history=saved.history,
        sha256=saved.sha256,
        base_sha256=saved.sha256,
        seconds=seconds,
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
    path = settings.checkpoint_path(name)
    base_sha256 = store.weights_sha256(network.state_dict())
    identity = {**settings.identity(base=False), "base_sha256": base_sha256}
    seconds = None
    if retrain or not path.exists():
        tuned = copy.deepcopy(network)
        history = training.train(tuned, masked, **settings.finetuning)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, tuned, identity, history)
    saved = store.load_checkpoint(path, identity, masked.labels.device)
    return Trained(
        model=saved.model,
        settings=settings,
        configuration=name,
        history=saved.history,
        sha256=saved.sha256,
        base_sha256=base_sha256,
        seconds=seconds,
        masked=masked,
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

    @property
    def explain(self) -> Any:
        """Maps by the experiment's method."""
        return partial(saliency.saliency_maps, cam=self.settings.cam)


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
        saved = Saved(settings, retrain)
        rounds = masking.masktune(
            base.model,
            train,
            settings.rule,
            saved.finetune,
            training_saliency(settings, base, train),
            saved.explain,
            settings.seed,
        )
        *_, (_, masked) = rounds
        retrain = False  # it is trained by now, unless the rounds ended before
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
        own_masks = torch.from_numpy(content["masks"])
    except (OSError, ValueError, KeyError, EOFError, BadZipFile) as error:
        remedy = "Choose again: masktune choose --force."
        raise ValueError(f"{path} has no masks ({error}). {remedy}") from error
    own_masks = own_masks.to(train.labels.device)
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
        tell it from all others; the settings; `sha256` of the weights and `base_sha256`
        of the base model's; `seconds`, `threads`, `device`, `torch` of the training
        that made them (if the model was loaded and no result of it is saved, `seconds`
        is None, and the others are those of this process);
        `raw` and `biased`, or `test`; `worst_group` and
        `{raw,biased,test}_class_{0,1,…}`, accuracies in [0, 1];
        `group {name}`, the same; if images are held out, `validation_worst_class` and
        `validation_worst_group`; for a fine-tuned model
        `hidden_{shortcut,shortcut_whole,rest,digit}`, see `hidden_shares`. All
        of `evaluation.evaluate` is in `metrics`.
    """
    settings = trained.settings
    path = settings.folder("results") / f"{trained.configuration}.json"
    made = {
        "seconds": trained.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": store.describe_device(sets.train.labels.device),
    }
    if trained.seconds is None and path.exists():
        saved = results.read_result(path)
        if saved["sha256"] == trained.sha256:
            if settings.dataset != "folder":  # whose images may have changed
                return saved
            made = {name: saved.get(name) for name in made}
    row = {
        "experiment": settings.experiment,
        "configuration": trained.configuration,
        **settings.identity(base=trained.configuration == "base"),
        **made,
        "sha256": trained.sha256,
        "base_sha256": trained.base_sha256,
        **_measure(trained, sets),
    }
    results.write_json(path, row)
    return row


def _measure(trained: Trained, sets: BiasedSets) -> dict[str, Any]:
    """What `record` adds to the settings of a model: accuracies, what masks hide."""
    report = evaluation.evaluate(trained.model, sets)
    row = {"worst_group": report["worst_group"], "metrics": report}
    for test in sets.tests:
        row[test] = report[test]["accuracy"]
        for label, share in enumerate(report[test]["class_accuracy"]):
            row[f"{test}_class_{label}"] = share
    for name, share in report["groups"].items():
        row[f"group {name}"] = share
    if "validation" in report:
        row["validation_worst_class"] = report["validation"]["worst_class"]
        row["validation_worst_group"] = report["validation"]["worst_group"]
    if trained.masked is not None:
        for name, share in evaluation.hidden_shares(trained.masked).items():
            row[f"hidden_{name}"] = share
    return row


def candidates(settings: BaseSettings, count: int) -> list[Settings]:
    """The candidates for one base model: `selection.CANDIDATES` with their schedule.

    Args:
        settings: of the base model.
        count: number of training images. If they are few, fine-tuning takes several
            epochs.
    """
    is_coarse = map_size(settings.image_size, **settings.network) < selection.FINE_MAP
    rules = selection.COARSE_CANDIDATES if is_coarse else selection.CANDIDATES
    schedule = selection.default_schedule(count, is_coarse)
    of_base = {name: getattr(settings, name) for name in BaseSettings.model_fields}
    return [
        Settings(
            **of_base,
            **vars(rule),
            cross_fit=True,
            finetune_lr=0.02,
            finetune_schedule="linear",
            finetune_batch_size=schedule["batch_size"],
            finetune_epochs=schedule["epochs"],
        )
        for rule in rules
    ]


def check_unseen(settings: BaseSettings) -> None:
    """Refuse weights that may have seen the images on which a choice tests networks.

    Raises:
        ValueError: they are in a file, and `public_weights` is False.
    """
    if settings.weights not in ("", "DEFAULT") and not settings.public_weights:
        allowed = "with public_weights True, if they were trained on other images"
        raise ValueError(f"weights are {settings.weights!r}; allowed: {allowed}.")


def choose(
    candidates: Sequence[Settings],
    base: Trained,
    train: Split,
    jobs: int = 1,
    retrain: bool = False,
) -> dict[str, Any]:
    """Choose among candidates by `selection.choose`, with models that are saved.

    A choice that is saved for this base model and these candidates is returned.

    Args:
        candidates: with `cross_fit`; they differ in their masks alone. Each round is
            one.
        base: the ERM model of all images.
        train: the training images.
        jobs: how many processes.
        retrain: train the models of both folds again.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one, or `base` if ERM is
        kept; `chosen`, the same in words; `reason`; `images` and `mistakes`, how many;
        `mistake_numbers`, which; `candidates`, their names; `accuracy`, `distances` and
        `left`, see `selection.Verdict`; `base_sha256`.

    Raises:
        ValueError: candidates differ in more than their masks; or the base models of
            the folds would start from weights that may have seen all images.
    """
    first = candidates[0]
    for candidate in candidates:
        if candidate.replace(**vars(first.rule)) != first:
            allowed = f"only {', '.join(RULE)} may differ"
            raise ValueError(f"candidates have several schedules; allowed: {allowed}.")
    check_unseen(first)
    names = [candidate.configuration for candidate in candidates]
    saved_choice = None if retrain else results.current_choice(first, base.sha256)
    if saved_choice and names == saved_choice["candidates"]:
        return saved_choice
    saved = Saved(first, retrain)
    rules = [candidate.rule for candidate in candidates]
    choice = selection.choose(
        train, saved.fit, saved.finetune, rules, jobs, saved.explain, first.seed
    )
    configuration = "base"
    if not choice.is_kept:
        settings = first.replace(**vars(choice.masked.rule))
        configuration = settings.configuration
        buffer = io.BytesIO()
        masks = choice.masks.cpu().numpy()
        np.savez_compressed(buffer, masks=masks, base_sha256=base.sha256)
        store.write_bytes(_masks_path(settings), buffer.getvalue())
    verdict = choice.verdict
    content = {
        "configuration": configuration,
        "chosen": verdict.chosen,
        "reason": verdict.reason,
        "images": len(train),
        "mistakes": int(choice.is_mistake.sum()),
        "mistake_numbers": choice.is_mistake.nonzero()[:, 0].tolist(),
        "candidates": names,
        "accuracy": verdict.accuracy.to_dict("index"),
        "distances": verdict.distances.to_dict("index"),
        "left": verdict.left,
        "base_sha256": base.sha256,
    }
    results.write_json(first.folder("results") / "chosen.json", content)
    return content


def chosen_settings(choice: dict, candidates: Sequence[Settings]) -> Settings | None:
    """The settings of what was chosen; None if ERM is kept.

    Args:
        choice: see `choose`.
        candidates: among which it was made.
    """
    for candidate in candidates:
        for rounds in range(1, candidate.rounds + 1):
            settings = candidate.replace(rounds=rounds)
            if settings.configuration == choice["configuration"]:
                return settings
    return None


def chosen_model(
    choice: dict,
    candidates: Sequence[Settings],
    base: Trained,
    train: Split,
    retrain: bool = False,
) -> Trained:
    """The chosen model; or the base model itself, if ERM is kept.

    Args:
        choice: see `choose`.
        candidates: among which it was made.
        base: the ERM model.
        train: the biased training set.
        retrain: see `masktune`.
    """
    settings = chosen_settings(choice, candidates)
    if settings is None:
        return base
    return masktune(settings, base, train, retrain)


def export(settings: Settings) -> Path:
    """Write what was chosen for a base model, for other programs.

    Args:
        settings: of the base model, for which `choose` has chosen.

    Returns:
        A folder with `weights.pth`, a state dict with the network's own keys;
        `mistakes.csv`, the images that ERM gets wrong when they are held out (with the
        paths of photographs, if all of the folder are used); and, unless ERM is kept,
        `masks.npz`, N×H×W.

    Raises:
        ValueError: there is no such choice.
    """
    train = datasets.load(settings).train
    base = base_model(settings, train)
    choice = results.current_choice(settings, base.sha256)
    if choice is None:
        raise ValueError(f"no choice for {settings.title}; run masktune choose first.")
    folder = settings.folder("results") / "export"
    name = choice["configuration"]
    path = settings.checkpoint_path(name)
    network = store.load_checkpoint(path).model
    if settings.model != "small_cnn":
        network = network[1]  # the first module normalises the images
    store.write_tensors(folder / "weights.pth", network.state_dict())
    mistakes = pd.DataFrame({"image": choice["mistake_numbers"]})
    if settings.dataset == "folder":
        paths = datasets.paths(settings.train_folder)
        if len(paths) == len(train):  # else some are left out, and numbers differ
            mistakes["path"] = paths[mistakes["image"]]
    results.save_table(mistakes, folder / "mistakes.csv")
    if name != "base":
        masks = path.with_name(f"CNN_masks_{name}.npz")
        store.write_bytes(folder / "masks.npz", masks.read_bytes())
    return folder
