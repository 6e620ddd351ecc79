"""The models of an experiment, their maps and their results: loaded, or else made."""

import ast
import contextlib
import copy
import difflib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from masktune_utils import (
    data,
    evaluation,
    masking,
    models,
    results,
    saliency,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import DEFAULTS, Settings
from masktune_utils.shortcuts import BiasedSets

INJECTED = "# Parameters\n"  # the first line of the cell that papermill adds
UNFINISHED = ".unfinished"  # beside a checkpoint: the state of its training


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
    """Make a notebook's parameters into settings.

    They are read from the cell of parameters as it was last run, and from the cell that
    papermill adds to it, so that later cells may use the same names. The first cell
    shows the parameters that its reader plays with; papermill can inject every other
    setting, too.

    Args:
        namespace: the notebook's `globals()`.
        other_names: parameters of this notebook that are no settings.
        **derived: settings that the notebook has computed.

    Raises:
        ValueError: see `Settings`; no cell of parameters; an unknown parameter; one
            that is no literal; or a directory that cannot be written to.
    """
    shown = None
    injected = {}
    is_literal = True
    for source in namespace["In"]:
        assigned = _literals(source)
        if source.startswith(INJECTED):
            is_literal = is_literal and bool(assigned)
            injected = assigned
        elif source.startswith("directory ="):  # as every cell of parameters does
            is_literal = bool(assigned)
            shown = assigned
            injected = {}
    if not any(namespace["In"]):  # nbval keeps no cells
        shown = {name: namespace[name] for name in DEFAULTS if name in namespace}
    if shown is None:
        allowed = "a cell whose first line is directory = …, as in the notebooks"
        raise ValueError(f"No cell of parameters was run; allowed: {allowed}.")
    if not is_literal:
        allowed = "literals, such as epochs = 10, one a line"
        raise ValueError(f"The cell of parameters is not read; allowed: {allowed}.")
    known = {*DEFAULTS, *other_names}
    for name in {**shown, **injected}:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            allowed = nearest[0] if nearest else ", ".join(DEFAULTS)
            raise ValueError(f"{name} is not a parameter; allowed: {allowed}.")
    values = {**shown, **injected, **derived}
    settings = Settings(**{name: values[name] for name in values if name in DEFAULTS})
    store.check_writable(settings.directory)
    settings = settings.replace(dataset=data.resolve_dataset(settings.dataset))
    models.check(settings.image_size, **settings.network)
    print(
        f"Images: {settings.dataset}. Device: {models.resolve_device(settings.device)}."
    )
    return settings


def _literals(source: str) -> dict[str, Any]:
    """Names and values of a cell that only assigns literals; else nothing."""
    try:
        nodes = ast.parse(source).body
        return {node.targets[0].id: ast.literal_eval(node.value) for node in nodes}
    except (AttributeError, SyntaxError, ValueError):
        return {}


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
    identity = {**settings.identity(base=True), **data.describe_files(settings)}
    device = train.labels.device
    seconds = None
    if retrain or not path.exists():
        num_classes = len(train.labels.unique())
        model = models.new_model(settings.seed, device, num_classes, **settings.network)
        history = _train_base(settings, identity, model, train, retrain)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, model, identity, history)
        path.with_suffix(UNFINISHED).unlink(missing_ok=True)
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


def _train_base(
    settings: Settings, identity: dict, model: nn.Module, train: Split, retrain: bool
) -> list[dict[str, float]]:
    """Train, or go on where a training with the same settings was interrupted."""
    path = settings.checkpoint_path("base").with_suffix(UNFINISHED)
    device = train.labels.device.type
    made_with = {**identity, "images": len(train), "device": device}
    state = None
    with contextlib.suppress(Exception):  # not there, damaged: it starts anew
        saved = store.read_tensors(path)
        if saved["made_with"] == made_with and not retrain:
            state = saved["state"]

    def keep_state(reached: dict[str, Any]) -> None:
        store.write_tensors(path, {"made_with": made_with, "state": reached})

    options = settings.training
    return training.train(model, train, state=state, keep_state=keep_state, **options)


def finetuned_model(
    settings: Settings,
    base: Trained,
    masked: MaskedDataset,
    retrain: bool = False,
) -> Trained:
    """The base model after fine-tuning on the masked images (in the paper, one epoch).

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        masked: the masked training set.
        retrain: fine-tune and save it again in any case.

    Raises:
        CheckpointError: the saved one is damaged, foreign, or made with other settings
            or from another base model.
    """
    name = settings.configuration
    path = settings.checkpoint_path(name)
    identity = {**settings.identity(base=False), "base_sha256": base.sha256}
    device = masked.labels.device
    seconds = None
    if retrain or not path.exists():
        model = copy.deepcopy(base.model)
        history = training.train(model, masked, **settings.finetuning)
        seconds = sum(epoch["seconds"] for epoch in history)
        store.save_checkpoint(path, model, identity, history)
    saved = store.load_checkpoint(path, identity, device)
    return Trained(
        model=saved.model,
        settings=settings,
        configuration=name,
        history=saved.history,
        sha256=saved.sha256,
        base_sha256=base.sha256,
        seconds=seconds,
        masked=masked,
    )


def masktune_rounds(
    settings: Settings, base: Trained, train: Split, retrain: bool = False
) -> Iterator[Trained]:
    """MaskTune with 1, 2, … `rounds` of masking, one model for each.

    Each round explains the model of the round before on the images that it was
    fine-tuned on (with `resample`, those of the first epoch), adds what it looks at to
    what is hidden, and fine-tunes the base model anew.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.
        retrain: fine-tune and save again in any case.
    """
    maps = training_saliency(settings, base, train)
    masked = None
    for rounds in range(1, settings.rounds + 1):
        masked = masking.mask_dataset(train, maps, **settings.mask_rule, earlier=masked)
        this_round = settings.replace(rounds=rounds)
        tuned = finetuned_model(this_round, base, masked, retrain)
        yield tuned
        if rounds < settings.rounds:
            # A map that is zero everywhere hides nothing more.
            with warnings.catch_warnings(action="ignore"):
                maps = saliency.saliency_maps(
                    tuned.model, masked.images, train.labels, settings.cam
                )


def masktune(
    settings: Settings, base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """MaskTune: maps of the base model, masks, and fine-tuning on the masked images.

    With `cross_fit`, the masks are those of two base models, each trained on half of
    the images, and each masking its own half; no map of the base model itself is
    needed.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.
        retrain: fine-tune and save it again in any case; with `cross_fit`, only the
            last model.

    Raises:
        CheckpointError: see `base_model` and `finetuned_model`.
    """
    if not settings.cross_fit:
        return _last_round(settings, base, train, retrain)
    masked = masked_by_halves(settings, train)
    return finetuned_model(settings, base, masked, retrain)


def _last_round(
    settings: Settings, base: Trained, train: Split, retrain: bool = False
) -> Trained:
    """The model of the last round; those of earlier rounds leave the memory."""
    for tuned in masktune_rounds(settings, base, train, retrain):
        last = tuned
    return last


def masked_by_halves(settings: Settings, train: Split) -> MaskedDataset:
    """All images, each half with the masks that the base model of this half made.

    Args:
        settings: the experiment.
        train: the biased training set.
    """
    parts = data.stratified_halves(train.labels, settings.seed)
    masks = []
    for half, index in enumerate(parts):
        of_half = settings.of_half(half)
        images = train[index]
        base = base_model(of_half, images)
        tuned = _last_round(of_half, base, images)
        masks.append(tuned.masked.own_masks)
    # from the order of the halves to that of the images
    order = torch.cat(parts).argsort().to(train.labels.device)
    own_masks = torch.cat(masks)[order]
    return MaskedDataset(train, own_masks, settings.fill, settings.seed)


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
        `hidden_{shortcut,shortcut_whole,rest,digit}`, see `masking.hidden_shares`. All
        of `evaluation.evaluate` is in `metrics`.
    """
    settings = trained.settings
    path = settings.folder("results") / f"{trained.configuration}.json"
    made = {
        "seconds": trained.seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "device": models.describe_device(sets.train.labels.device),
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
        for name, share in masking.hidden_shares(trained.masked).items():
            row[f"hidden_{name}"] = share
    return row
