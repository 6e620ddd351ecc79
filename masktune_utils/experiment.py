"""The models of an experiment, their maps and their results: loaded, or else made."""

import ast
import contextlib
import copy
import difflib
import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import (
    data,
    evaluation,
    masking,
    models,
    progress,
    results,
    saliency,
    selection,
    shortcuts,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.selection import HeldOut
from masktune_utils.settings import DEFAULTS, BaseSettings, Settings
from masktune_utils.shortcuts import BiasedSets

INJECTED = "# Parameters\n"  # the first line of the cell that papermill adds
UNFINISHED = ".unfinished"  # beside a checkpoint: the state of its training
HALVES = (0, 1)
ORIGINAL = "original"  # the images as they are
# At most this many images of each half are resampled.
SAMPLE = 1000
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
CANDIDATES = (  # shared, param of mean_std, dilation, rounds at most
    (False, 4.0, 3, 2),
    (False, 3.0, 4, 2),
    (False, 2.0, 2, 1),
    (True, 1.0, 1, 2),
    (True, 2.0, 2, 5),
)
COARSE_CANDIDATES = (  # of photographs, whose maps have few cells
    (False, 1.5, 0, 2),
    (False, 1.0, 0, 2),
    (False, 0.5, 0, 1),
)


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
    same: Trained | None = None,
) -> Trained:
    """The base model after fine-tuning on the masked images (in the paper, one epoch).

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        masked: the masked training set.
        retrain: fine-tune and save it again in any case.
        same: a model that was fine-tuned on the same masked images in the same way;
            it is saved, and nothing is trained.

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
        if same is None:
            model = copy.deepcopy(base.model)
            history = training.train(model, masked, **settings.finetuning)
            seconds = sum(epoch["seconds"] for epoch in history)
        else:
            model = same.model
            history = same.history
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
    what is hidden, and fine-tunes the base model anew. Once a round hides nothing more,
    the later ones repeat its model.

    Args:
        settings: the experiment.
        base: the ERM model; it is left as it is.
        train: the biased training set.
        retrain: fine-tune and save again in any case.
    """
    maps = training_saliency(settings, base, train)
    masked = None
    tuned = None
    same = None
    for rounds in range(1, settings.rounds + 1):
        this_round = settings.replace(rounds=rounds)
        if same is None:
            grown = masking.mask_dataset(
                train, maps, **settings.mask_rule, earlier=masked
            )
            if masked is not None and torch.equal(grown.own_masks, masked.own_masks):
                same = tuned
            masked = grown
        tuned = finetuned_model(this_round, base, masked, retrain, same)
        if settings.half is not None:
            _save_masks(this_round, tuned)
        yield tuned
        if rounds < settings.rounds and same is None:
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
        masks.append(masks_of_half(settings.of_half(half), train[index]))
    # from the order of the halves to that of the images
    order = torch.cat(parts).argsort().to(train.labels.device)
    own_masks = torch.cat(masks)[order]
    return MaskedDataset(train, own_masks, settings.fill, settings.seed)


def masks_of_half(settings: Settings, images: Split, base_sha256: str = "") -> Tensor:
    """The masks of one half, N×H×W; saved with the fine-tuned model of this half.

    Args:
        settings: of the half, see `Settings.of_half`.
        images: the half.
        base_sha256: of the base model of this half; by default that model is loaded.
    """
    if not base_sha256:
        base_sha256 = base_model(settings, images).sha256
    size = (len(images), *images.images.shape[-2:])
    with contextlib.suppress(Exception):  # not there, damaged: they are made again
        saved = store.read_tensors(_masks_path(settings))
        if saved["base_sha256"] == base_sha256:
            bits = np.unpackbits(saved["bits"].numpy(), count=math.prod(size))
            masks = torch.from_numpy(bits).bool().view(size)
            return masks.to(images.labels.device)
    base = base_model(settings, images)
    return _last_round(settings, base, images).masked.own_masks


def _masks_path(settings: Settings) -> Path:
    return settings.folder("checkpoints") / f"CNN_masks_{settings.configuration}.pth"


def _save_masks(settings: Settings, tuned: Trained) -> None:
    """Save hard masks, eight pixels in a byte; soft ones are made again."""
    masks = tuned.masked.own_masks
    if masks.dtype == torch.bool:
        bits = torch.from_numpy(np.packbits(masks.cpu().numpy()))
        content = {"bits": bits, "base_sha256": tuned.base_sha256}
        store.write_tensors(_masks_path(settings), content)


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


def candidates(settings: BaseSettings, count: int) -> list[Settings]:
    """The candidates for one base model: from few pixels, widely dilated, to many.

    Args:
        settings: of the base model.
        count: number of training images. If they are few, fine-tuning takes several
            epochs.
    """
    rules = COARSE_CANDIDATES if settings.dataset == "folder" else CANDIDATES
    batch_size = 16 if settings.dataset == "folder" else 32
    epochs = min(MOST_EPOCHS, math.ceil(STEPS * batch_size / count))
    of_base = {name: getattr(settings, name) for name in BaseSettings.model_fields}
    listed = []
    for shared, param, dilation, most_rounds in rules:
        for rounds in range(1, most_rounds + 1):
            candidate = Settings(
                **of_base,
                method="mean_std",
                param=param,
                dilation=dilation,
                shared=shared,
                fill="resample",
                rounds=rounds,
                cross_fit=True,
                finetune_lr=0.02,
                finetune_schedule="linear",
                finetune_batch_size=batch_size,
                finetune_epochs=epochs,
            )
            listed.append(candidate)
    return listed


def choose(
    candidates: Sequence[Settings], jobs: int = 1, retrain: bool = False
) -> dict[str, Any]:
    """Choose among candidates on held-out images, or keep ERM; and save the choice.

    A choice that is saved for this base model and these candidates is returned.

    Args:
        candidates: of one base model, whose result is saved; with `cross_fit`.
        jobs: how many processes.
        retrain: train the models of both halves again.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one, or `base` if ERM is
        kept; `reason`; `images` and `mistakes`, their numbers; `candidates`, each in
        words; `accuracy`, `distances` and `left`, see `selection.Verdict`;
        `base_sha256`.
    """
    path = candidates[0].folder("results") / "chosen.json"
    base_sha256 = results.read_result(path.with_stem("base"))["sha256"]
    names = [candidate.configuration for candidate in candidates]
    saved = None if retrain else results.current_choice(candidates[0])
    if saved and names == [*saved["candidates"]]:
        return saved
    held_out = predict_held_out(candidates, jobs, retrain)
    described = {}
    for candidate in candidates:
        rule = candidate.model_dump(include=results.DESCRIBED)
        described[candidate.configuration] = results.describe(**rule)
    verdict = selection.judge(held_out, described)
    choice = {
        "configuration": verdict.chosen,
        "reason": verdict.reason,
        "images": len(held_out.labels),
        "mistakes": int(held_out.is_mistake.sum()),
        "candidates": described,
        "accuracy": verdict.accuracy.to_dict("index"),
        "distances": verdict.distances.to_dict("index"),
        "left": verdict.left,
        "base_sha256": base_sha256,
    }
    results.write_json(path, choice)
    return choice


def chosen_settings(choice: dict, candidates: Sequence[Settings]) -> Settings | None:
    """The settings of what was chosen; None if ERM is kept.

    Args:
        choice: see `choose`.
        candidates: among which it was made.
    """
    by_name = {candidate.configuration: candidate for candidate in candidates}
    return by_name.get(choice["configuration"])


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


def predict_held_out(
    candidates: Sequence[Settings], jobs: int, retrain: bool
) -> HeldOut:
    """Train the models of both halves, and let each predict the other half.

    A candidate whose models are those of another one is left out.

    Args:
        candidates: see `choose`.
        jobs: see `choose`.
        retrain: see `choose`.
    """
    null = candidates[0].replace(
        method="threshold", param=1.0, dilation=0, shared=False, fill="zero", rounds=1
    )
    parallel = Parallel(jobs, return_as="generator")
    tasks = [delayed(_train_erm)(null.of_half(half), retrain) for half in HALVES]
    bases = progress.bar(parallel(tasks), total=len(tasks), desc="ERM of both halves")
    base_sha256 = list(bases)

    tasks = []
    for chain in [[null], *chains(candidates)]:
        for half in HALVES:
            tasks.append(delayed(_train_chain)(chain, half, retrain))
    outcomes = defaultdict(list)  # of both halves
    for of_chain in progress.bar(parallel(tasks), total=len(tasks), desc="fine-tuning"):
        for name, outcome in of_chain.items():
            outcomes[name].append(outcome)
    judged = {}
    hidden = {}
    seen = []
    for candidate in candidates:
        name = candidate.configuration
        weights, shares = zip(*outcomes[name], strict=True)
        if weights not in seen:
            seen.append(weights)
            judged[name] = candidate
            hidden[name] = sum(shares) / 2

    networks = {selection.ERM: null, selection.NULL: null, **judged}
    masks = list(judged.values())
    tasks = []
    for name, settings in networks.items():
        for half in HALVES:
            task = delayed(_predict_other_half)
            tasks.append(task(name, settings, half, masks, base_sha256[1 - half]))
    predicted = list(progress.bar(parallel(tasks), total=len(tasks), desc="predicting"))
    both_halves = zip(predicted[::2], predicted[1::2], strict=True)
    joined = {}  # network → images → logits and labels
    for name, (first, second) in zip(networks, both_halves, strict=True):
        joined[name] = {}
        for images, parts in first.items():
            pairs = zip(parts, second[images], strict=True)
            joined[name][images] = [torch.cat(pair) for pair in pairs]
    resampled = {}
    for mask in judged:
        row = {name: evaluation.worst_class(*joined[name][mask]) for name in networks}
        resampled[mask] = row
    logits, labels = joined[selection.ERM][ORIGINAL]
    _, resampled_labels = joined[selection.ERM][mask]
    return HeldOut(
        labels=labels,
        probabilities=logits.softmax(1),
        predictions={name: joined[name][ORIGINAL][0].argmax(1) for name in networks},
        resampled=pd.DataFrame(resampled).T,
        resampled_images=len(resampled_labels),
        hidden=hidden,
    )


def chains(candidates: Sequence[Settings]) -> list[list[Settings]]:
    """Candidates grouped so that only their rounds differ, in order of rounds."""
    of_first_round = {}
    for candidate in sorted(candidates, key=lambda settings: settings.rounds):
        of_first_round.setdefault(candidate.replace(rounds=1), []).append(candidate)
    return list(of_first_round.values())


def _train_erm(settings: Settings, retrain: bool) -> str:
    """The base model of a half, and its maps, once for all chains; its SHA-256."""
    with progress.silence():
        train = shortcuts.load(settings).train
        base = base_model(settings, train, retrain)
        training_saliency(settings, base, train)
    return base.sha256


def _train_chain(
    chain: Sequence[Settings], half: int, retrain: bool
) -> dict[str, tuple[str, float]]:
    """Train the candidates of a chain on a half.

    Returns:
        Of each, SHA-256 of its weights, and the mean share of the image that it hides.
    """
    names = {candidate.rounds: candidate.configuration for candidate in chain}
    settings = chain[-1].of_half(half)
    outcomes = {}
    with progress.silence():
        train = shortcuts.load(settings).train
        base = base_model(settings, train)
        for tuned in masktune_rounds(settings, base, train, retrain):
            if tuned.settings.rounds in names:
                share = tuned.masked.own_masks.float().mean().item()
                outcomes[names[tuned.settings.rounds]] = (tuned.sha256, share)
    return outcomes


def _predict_other_half(
    name: str,
    settings: Settings,
    half: int,
    masks: Sequence[Settings],
    base_sha256: str,
) -> dict[str, tuple[Tensor, Tensor]]:
    """Logits and labels of the half that a saved model has not seen.

    Args:
        name: `base`, or another name of a fine-tuned model.
        settings: of that model.
        half: on which it was trained.
        masks: candidates, whose masks for the other half resample its images.
        base_sha256: of the base model of the other half.

    Returns:
        Of the images as they are (`ORIGINAL`), and of at most `SAMPLE` as each
        candidate resamples them: N×classes, and N, on the CPU.
    """
    of_half = settings.of_half(half)
    configuration = "base" if name == selection.ERM else of_half.configuration
    path = of_half.checkpoint_path(configuration)
    with progress.silence():
        images = shortcuts.load(of_half).validation
        device = images.labels.device
        network = store.load_checkpoint(path, device=device).model
        labels = images.labels.cpu()
        predicted = {ORIGINAL: (evaluation.predict(network, images), labels)}
        generator = torch.Generator().manual_seed(settings.seed)
        sample = torch.randperm(len(images), generator=generator)[:SAMPLE]
        for candidate in masks:
            other = candidate.of_half(1 - half)
            own_masks = masks_of_half(other, images, base_sha256)[sample]
            masked = MaskedDataset(images[sample], own_masks, "resample", other.seed)
            logits = evaluation.predict(network, masked)
            predicted[candidate.configuration] = (logits, labels[sample])
    return predicted
