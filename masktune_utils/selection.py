"""Choosing among candidates by the mistakes that ERM makes on images it has not seen.

Two base models are trained, each on half of the training images, and tested on the
other half. Where a shortcut decides, nearly all of their mistakes are images that go
against it. So a candidate is judged by how many of these mistakes it gets right, and
how many of the other images, by models that have not seen them either.

Most mistakes can also be images that are hard to read, of which ERM is less sure, or
there can be too few. Then held-out images are resampled by the masks of each candidate.
Where ERM loses accuracy, and another model hardly any, ERM relies on what is hidden,
and the other model does without it. If nothing shows that, ERM is kept. Only training
images and their classes are used.

Mistakes on held-out images as groups: XRM (Pezeshki et al., 2024). Such groups to
choose by: uLA (Tsirigotis et al., 2023). To choose masks by them is ours.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from joblib import Parallel, delayed
from torch import Tensor, nn

from masktune_utils import (
    evaluation,
    experiment,
    models,
    progress,
    results,
    shortcuts,
    store,
)
from masktune_utils.data import Split
from masktune_utils.experiment import Trained
from masktune_utils.masking import MaskedDataset
from masktune_utils.settings import BaseSettings, Settings

# With fewer mistakes than this, resampled images are the judge.
FEW = 10
# At most this many images of each half are resampled: if mistakes are few; and if they
# are not, but no candidate gets most of them right.
SAMPLE = 500
LARGE_SAMPLE = 5000
# If ERM's median probability of its mistakes is above this, a shortcut is taken to
# cause them.
SURE = 0.95
# ERM relies on what is resampled if it makes at least this many times as many mistakes
# as on the original images. (That is impossible if it gets fewer than three quarters
# of these right.)
RELIED_ON = 4
# A model does without it if its accuracy is at most this far below ERM's on the
# original images.
NOT_NEEDED = 0.01
# If mistakes are few, ERM is kept if its shortfall is below this.
FAR_BEHIND = 0.25
# Resampled images count if the best model's worst class reaches this; else the masks
# hide too much.
STILL_VISIBLE = 0.9
# Fine-tuning on all images takes as many whole epochs as make this many steps, but no
# more than MOST_EPOCHS; on half of them as many epochs.
STEPS = 750
MOST_EPOCHS = 6
CANDIDATES = (  # shared, param of mean_std, dilation, rounds at most
    (False, 4.0, 3, 2),
    (False, 3.0, 4, 2),
    (False, 2.0, 2, 2),
    (False, 2.0, 4, 1),
    (True, 1.0, 1, 2),
    (True, 2.0, 2, 5),
)
COARSE_CANDIDATES = (  # of photographs, whose maps have few cells
    (False, 1.5, 0, 2),
    (False, 1.0, 0, 2),
    (False, 0.5, 0, 1),
)


@dataclass(frozen=True)
class HeldOut:
    """Predictions for every training image, by models that have not seen it.

    Attributes:
        labels: N.
        erm_predictions: N, the class that the base model of the other half predicts.
        erm_probabilities: N, its probability of this class.
        candidate_predictions: name → N, the class that the fine-tuned model of the
            other half predicts.
        hidden: name → mean share of the image that its own mask hides.
    """

    labels: Tensor
    erm_predictions: Tensor
    erm_probabilities: Tensor
    candidate_predictions: dict[str, Tensor]
    hidden: dict[str, float]

    @property
    def is_mistake(self) -> Tensor:
        """N, whether ERM's prediction is wrong."""
        return self.erm_predictions != self.labels


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
    """Judge candidates on held-out images, choose one or keep ERM, and save the choice.

    A choice that is saved for this base model and these candidates is returned.

    Args:
        candidates: of one base model, whose result is saved; with `cross_fit`.
        jobs: how many processes.
        retrain: train the models of both halves again.

    Returns:
        What `chosen.json` holds: `configuration`, the chosen one, or `base` if ERM is
        kept; `reason`, in a few sentences; `images` and `mistakes`, their numbers;
        `candidates`: for each what `judge` returns, and its `description` and `shared`;
        `base_sha256`.
    """
    path = candidates[0].folder("results") / "chosen.json"
    base_sha256 = results.read_result(path.with_stem("base"))["sha256"]
    names = [candidate.configuration for candidate in candidates]
    saved = None if retrain else results.current_choice(candidates[0])
    if saved and names == [*saved["candidates"]]:
        return saved
    held_out = predict_held_out(candidates, jobs, retrain)
    judged = judge(held_out)
    _describe(judged, candidates)
    images = len(held_out.labels)
    mistakes = int(held_out.is_mistake.sum())
    counted = (
        f"{mistakes} of {images:,} training images are predicted wrongly "
        "by ERM models that have not seen them"
    )
    if mistakes < FEW:
        counted += ", too few to judge by"
        chosen, reason = few_mistakes_test(candidates, judged, held_out)
    else:
        chosen, reason = by_mistakes(judged)
        if chosen == "base":
            chosen, second_reason = second_test(candidates, judged, held_out)
            reason = f"{reason} {second_reason}"
    choice = {
        "configuration": chosen,
        "reason": f"{counted}. {reason}",
        "images": images,
        "mistakes": mistakes,
        "candidates": judged,
        "base_sha256": base_sha256,
    }
    results.write_json(path, choice)
    return choice


def _describe(judged: dict[str, dict], candidates: Sequence[Settings]) -> None:
    """Add each candidate's rule in words, and whether its mask is shared."""
    for candidate in candidates:
        rule = candidate.model_dump(include=results.DESCRIBED)
        judged[candidate.configuration]["description"] = results.describe(**rule)
        judged[candidate.configuration]["shared"] = candidate.shared


def chosen_settings(choice: dict, candidates: Sequence[Settings]) -> Settings | None:
    """The settings of what was chosen; None if ERM is kept.

    Args:
        choice: see `choose`.
        candidates: among which it was made.
    """
    if choice["configuration"] == "base":
        return None
    by_name = {candidate.configuration: candidate for candidate in candidates}
    return by_name[choice["configuration"]]


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
        retrain: see `experiment.masktune`.
    """
    settings = chosen_settings(choice, candidates)
    if settings is None:
        return base
    return experiment.masktune(settings, base, train, retrain)


def predict_held_out(
    candidates: Sequence[Settings], jobs: int, retrain: bool
) -> HeldOut:
    """Train the models of both halves, and let each predict the other half.

    Args:
        candidates: see `choose`.
        jobs: see `choose`.
        retrain: see `choose`.
    """
    first = candidates[0]
    parallel = Parallel(jobs, return_as="generator")
    halves = (0, 1)
    erm_tasks = (delayed(_predict_erm)(first.of_half(half), retrain) for half in halves)
    of_erm = list(parallel(erm_tasks))
    tasks = [
        delayed(_predict_chain)(chain, half, retrain)
        for chain in chains(candidates)
        for half in halves
    ]
    predictions = {candidate.configuration: [] for candidate in candidates}
    shares = {candidate.configuration: [] for candidate in candidates}
    bar = progress.bar(parallel(tasks), total=len(tasks), unit="chain", desc="judging")
    for of_chain in bar:
        for name, (classes, share) in of_chain.items():
            predictions[name].append(classes)
            shares[name].append(share)
    erm_probabilities = torch.cat([probabilities for _, probabilities in of_erm])
    highest = erm_probabilities.max(dim=1)
    return HeldOut(
        labels=torch.cat([labels for labels, _ in of_erm]),
        erm_predictions=highest.indices,
        erm_probabilities=highest.values,
        candidate_predictions={
            name: torch.cat(predictions[name]) for name in predictions
        },
        hidden={name: sum(shares[name]) / 2 for name in shares},
    )


def chains(candidates: Sequence[Settings]) -> list[list[Settings]]:
    """Candidates grouped so that only their rounds differ, in order of rounds."""
    of_first_round = {}
    for candidate in sorted(candidates, key=lambda settings: settings.rounds):
        of_first_round.setdefault(candidate.replace(rounds=1), []).append(candidate)
    return list(of_first_round.values())


def _predict_erm(settings: Settings, retrain: bool) -> tuple[Tensor, Tensor]:
    """Labels of the other half, N, and this half's probabilities for it, N×classes."""
    with progress.silence():
        sets = shortcuts.load(settings)
        base = experiment.base_model(settings, sets.train, retrain)
        experiment.training_saliency(settings, base, sets.train)  # once, for all chains
        logits = evaluation.predict(base.model, sets.validation)
    return sets.validation.labels.cpu(), logits.softmax(1)


def _predict_chain(
    chain: Sequence[Settings], half: int, retrain: bool
) -> dict[str, tuple[Tensor, float]]:
    """Of each candidate: predictions for the other half, and the share it hides."""
    of_half = [candidate.of_half(half) for candidate in chain]
    predicted = {}
    with progress.silence():
        sets = shortcuts.load(of_half[0])
        models_of_half = _rounds(of_half, sets.train, retrain)
        for candidate, tuned in zip(chain, models_of_half, strict=True):
            classes = evaluation.predict(tuned.model, sets.validation).argmax(1)
            share = tuned.masked.own_masks.float().mean().item()
            predicted[candidate.configuration] = (classes, share)
    return predicted


def _rounds(
    chain: Sequence[Settings], train: Split, retrain: bool = False
) -> Iterator[Trained]:
    """The models of a chain, each fine-tuned from the base model of its half."""
    base = experiment.base_model(chain[0], train)
    wanted = {candidate.rounds for candidate in chain}
    for tuned in experiment.masktune_rounds(chain[-1], base, train, retrain):
        if tuned.settings.rounds in wanted:
            yield tuned


def judge(held_out: HeldOut) -> dict[str, dict[str, Any]]:
    """How many of ERM's mistakes, and of the other images, each candidate gets right.

    Args:
        held_out: predictions.

    Returns:
        By candidate: `mistakes` and `rest`, each with `right` and `all`, numbers of
        images by class; `score`, the smaller of the two accuracies, in [0, 1];
        `interval`, the 95 % interval (Wilson) of the accuracy on mistakes; and
        `hidden`, see `HeldOut`.
    """
    from scipy.stats import binomtest  # takes a second

    wrong = held_out.is_mistake
    judged = {}
    for name, predictions in held_out.candidate_predictions.items():
        right = predictions == held_out.labels
        result = {}
        for cell, members in {"mistakes": wrong, "rest": ~wrong}.items():
            result[cell] = {"right": [], "all": []}
            for label in held_out.labels.unique():
                of_class = members & (held_out.labels == label)
                result[cell]["right"].append(int(right[of_class].sum()))
                result[cell]["all"].append(int(of_class.sum()))
        result["score"] = min(accuracy(result["mistakes"]), accuracy(result["rest"]))
        result["interval"] = [0.0, 1.0]
        if wrong.any():
            of_mistakes = binomtest(int(right[wrong].sum()), int(wrong.sum()))
            interval = of_mistakes.proportion_ci(method="wilson")
            result["interval"] = [float(interval.low), float(interval.high)]
        result["hidden"] = held_out.hidden[name]
        judged[name] = result
    return judged


def accuracy(cell: dict[str, list[int]]) -> float:
    """Accuracy in a cell, see `judge`, in [0, 1]; 1 in an empty one."""
    return sum(cell["right"]) / sum(cell["all"]) if sum(cell["all"]) else 1.0


def by_mistakes(judged: dict[str, dict]) -> tuple[str, str]:
    """Choose by ERM's mistakes.

    Candidates that get most of the mistakes right, beyond doubt (the interval lies
    above one half), and most of the rest, are admitted. Of those within one standard
    error of the best score (by the number of mistakes), the one that hides least is
    chosen.

    Args:
        judged: see `judge`.

    Returns:
        The chosen configuration, or `base` if there is none; and the reason.
    """
    admitted = {}
    for name, row in judged.items():
        if row["interval"][0] > 0.5 and accuracy(row["rest"]) > 0.5:
            admitted[name] = row
    best = max((admitted or judged).values(), key=lambda row: row["score"])
    if not admitted:
        none = "No candidate gets most of them, beyond doubt, and most of the others right."
        return "base", f"{none} {_in_words(best)}"
    count = sum(best["mistakes"]["all"])
    standard_error = math.sqrt(best["score"] * (1 - best["score"]) / count)
    lowest_score = best["score"] - standard_error
    near = [name for name, row in admitted.items() if row["score"] >= lowest_score]
    chosen = min(near, key=lambda name: judged[name]["hidden"])
    return chosen, _in_words(judged[chosen])


def _in_words(row: dict[str, Any]) -> str:
    """How many of ERM's mistakes, and of the other images, a candidate gets right."""
    right = sum(row["mistakes"]["right"])
    percent = 100 * accuracy(row["mistakes"])
    low, high = (round(100 * limit) for limit in row["interval"])
    of_mistakes = f"{right} of these are right ({percent:.0f} %"
    interval = f"95 % interval {low}–{high} %)"
    rest = f"{100 * accuracy(row['rest']):.1f} % of the others"
    return f"With {row['description']}, {of_mistakes}, {interval}, and {rest}."


def few_mistakes_test(
    candidates: Sequence[Settings], judged: dict[str, dict], held_out: HeldOut
) -> tuple[str, str]:
    """Choose by resampled images where ERM has too few mistakes to judge by.

    ERM is kept if its largest shortfall is below `FAR_BEHIND`.

    Args:
        candidates: see `choose`; their models are saved.
        judged: see `judge`.
        held_out: predictions.

    Returns:
        See `by_mistakes`.
    """
    resampled = resampled_accuracies(candidates, SAMPLE, evaluation.worst_class)
    shortfalls = largest_shortfalls(resampled, STILL_VISIBLE)
    if not shortfalls:
        too_much = "The masks of all candidates hide too much to compare models"
        return "base", f"{too_much} on resampled images, so ERM is kept."
    if shortfalls["base"] < FAR_BEHIND:
        of_erm = f"{100 * shortfalls['base']:.1f} points"
        kept = f"ERM is at most {of_erm} behind the best model, and is kept."
        return "base", f"On images resampled by the masks of candidates, {kept}"
    images = min(2 * SAMPLE, len(held_out.labels))
    images_of_class = images // len(held_out.labels.unique())
    chosen, reason = by_shortfalls(judged, shortfalls, images_of_class)
    if chosen != "base":
        reason = f"{reason} That is in doubt."
    return chosen, reason


def second_test(
    candidates: Sequence[Settings], judged: dict[str, dict], held_out: HeldOut
) -> tuple[str, str]:
    """Choose where no candidate gets most of the mistakes right.

    If ERM is sure of them, probably a shortcut causes them that no candidate hides.
    Otherwise, they may be images that are hard to read, and resampled images decide:
    whether ERM relies on what can be hidden, and which model does without it.

    Args:
        candidates: see `choose`; their models are saved.
        judged: see `judge`.
        held_out: predictions.

    Returns:
        See `by_mistakes`.
    """
    probabilities = held_out.erm_probabilities[held_out.is_mistake]
    median_probability = probabilities.quantile(0.5).item()
    median = f"(median probability {100 * median_probability:.0f} %)"
    if median_probability > SURE:
        sure = f"ERM is sure of its mistakes {median}, as where a shortcut causes them"
        return "base", f"{sure} that no candidate hides, so ERM is kept."
    unsure = f"ERM is not sure of its mistakes {median}."
    erm_accuracy = 1 - held_out.is_mistake.double().mean().item()
    resampled = resampled_accuracies(candidates, LARGE_SAMPLE, evaluation.accuracy)
    shown_by = shows_reliance(resampled, erm_accuracy)
    if shown_by is None:
        none = (
            "No candidate shows, on resampled images, that ERM relies on what it hides"
        )
        return "base", f"{unsure} {none}, so ERM is kept."
    description = judged[shown_by]["description"]
    relies = _reliance_in_words(description, resampled, shown_by, erm_accuracy)
    shortfalls = largest_shortfalls(resampled, erm_accuracy - NOT_NEEDED)
    images = min(2 * LARGE_SAMPLE, len(held_out.labels))
    chosen, reason = by_shortfalls(judged, shortfalls, images)
    return chosen, f"{unsure} {relies} {reason}"


def resampled_accuracies(
    candidates: Sequence[Settings],
    size: int,
    accuracy_of: Callable[[Tensor, Tensor], float],
) -> dict[str, dict[str, float]]:
    """Accuracies of all models on images that the masks of each candidate resample.

    A model that relies on what a mask hides loses accuracy where that comes from
    another image. The images are held out: the masks are those of one half, the models
    those of the other.

    Args:
        candidates: see `choose`; their models are saved.
        size: how many images of each half, at most.
        accuracy_of: from logits and labels.

    Returns:
        By candidate, whose masks they are: by configuration, `base` among them, the
        accuracy, in [0, 1], the mean of both halves.
    """
    names = [candidate.configuration for candidate in candidates]
    accuracies = {mask: dict.fromkeys(["base", *names], 0.0) for mask in names}
    bar = progress.bar(total=2 * len(names), unit="mask", desc="resampling")
    with bar, progress.silence():
        for half, other in ((0, 1), (1, 0)):
            networks = _networks_of_half(candidates, other)
            for mask, masked in _resampled_samples(candidates, half, size):
                for name, network in networks.items():
                    logits = evaluation.predict(network, masked)
                    accuracies[mask][name] += accuracy_of(logits, masked.labels) / 2
                bar.update()
    return accuracies


def shows_reliance(
    resampled: dict[str, dict[str, float]], erm_accuracy: float
) -> str | None:
    """A candidate that does without what ERM relies on; None if there is none.

    Where images are resampled by the candidate's masks, ERM makes at least `RELIED_ON`
    times as many mistakes as on the original images, and the candidate is at most
    `NOT_NEEDED` below ERM's accuracy on these. Of several candidates, it is the one
    that is furthest above ERM.

    Args:
        resampled: see `resampled_accuracies`.
        erm_accuracy: of ERM on the original held-out images, in [0, 1].
    """
    gains = {}
    for name, accuracies in resampled.items():
        of_erm = accuracies["base"]
        of_candidate = accuracies[name]
        erm_relies_on_it = 1 - of_erm >= RELIED_ON * (1 - erm_accuracy)
        does_without_it = of_candidate >= erm_accuracy - NOT_NEEDED
        if erm_relies_on_it and does_without_it:
            gains[name] = of_candidate - of_erm
    return max(gains, key=gains.get, default=None)


def _reliance_in_words(
    description: str,
    resampled: dict[str, dict[str, float]],
    name: str,
    erm_accuracy: float,
) -> str:
    """What ERM and a candidate get right of the images that its masks resample."""
    images = f"Of held-out images that the masks of {description} resample"
    erm = f"ERM gets {100 * resampled[name]['base']:.1f} % right"
    tuned = f"the model fine-tuned with them {100 * resampled[name][name]:.1f} %"
    before = f"of the original images, ERM gets {100 * erm_accuracy:.1f} %"
    meaning = "ERM relies on what is hidden, and the other model does without it."
    return f"{images}, {erm}, and {tuned}; {before}. {meaning}"


def largest_shortfalls(
    resampled: dict[str, dict[str, float]], least_accuracy: float
) -> dict[str, float]:
    """How far each model falls behind the best one, at most, over all sets of images.

    Args:
        resampled: see `resampled_accuracies`.
        least_accuracy: a set on which the best model is below it is left out: its
            masks hide too much.

    Returns:
        By configuration, `base` among them, in [0, 1]; nothing if no set is left.
    """
    shortfalls = {}
    for accuracies in resampled.values():
        best = max(accuracies.values())
        if best < least_accuracy:
            continue
        for name, of_model in accuracies.items():
            shortfalls[name] = max(shortfalls.get(name, 0.0), best - of_model)
    return shortfalls


def _networks_of_half(
    candidates: Sequence[Settings], half: int
) -> dict[str, nn.Module]:
    """The saved models of a half, by configuration; and its base model."""
    device = models.resolve_device(candidates[0].device)
    paths = {"base": candidates[0].of_half(half).checkpoint_path("base")}
    for candidate in candidates:
        settings = candidate.of_half(half)
        paths[candidate.configuration] = settings.checkpoint_path(
            settings.configuration
        )
    networks = {}
    for name, path in paths.items():
        networks[name] = store.load_checkpoint(path, device=device).model
    return networks


def _resampled_samples(
    candidates: Sequence[Settings], half: int, size: int
) -> Iterator[tuple[str, MaskedDataset]]:
    """Of each candidate: at most `size` images of a half, resampled by its masks."""
    train = shortcuts.load(candidates[0].of_half(half)).train
    generator = torch.Generator().manual_seed(candidates[0].seed)
    sample = torch.randperm(len(train), generator=generator)[:size]
    for chain in chains(candidates):
        settings_of_half = [candidate.of_half(half) for candidate in chain]
        models_of_half = _rounds(settings_of_half, train)
        for candidate, tuned in zip(chain, models_of_half, strict=True):
            masks = tuned.masked.own_masks[sample]
            masked = MaskedDataset(train[sample], masks, "resample", candidate.seed)
            yield candidate.configuration, masked


def by_shortfalls(
    judged: dict[str, dict], shortfalls: dict[str, float], count: int
) -> tuple[str, str]:
    """Choose by how far models fall behind at most.

    ERM is kept unless some candidate falls less behind. Of those that do, and are
    within one standard error of the smallest shortfall, the one that hides least is
    chosen.

    Args:
        judged: see `judge`.
        shortfalls: see `largest_shortfalls`.
        count: how many images an accuracy is of.

    Returns:
        See `by_mistakes`.
    """
    where = "On images resampled by the masks of candidates,"
    smallest = min(shortfalls[name] for name in judged)
    if shortfalls["base"] <= smallest:
        kept = "no candidate falls less behind the best model than ERM, which is kept."
        return "base", f"{where} {kept}"
    variance = max(smallest * (1 - smallest), 1 / count)
    standard_error = math.sqrt(variance / count)
    better = [name for name in judged if shortfalls[name] < shortfalls["base"]]
    near = [name for name in better if shortfalls[name] <= smallest + standard_error]
    chosen = min(near, key=lambda name: judged[name]["hidden"])
    description = judged[chosen]["description"]
    of_chosen = f"{100 * shortfalls[chosen]:.1f} points behind the best model"
    of_erm = f"{100 * shortfalls['base']:.1f}"
    return chosen, f"{where} {description} is at most {of_chosen}, and ERM {of_erm}."
