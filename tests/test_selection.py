"""Choosing among candidates by ERM's mistakes, without groups and test sets."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import TINY

from masktune_utils import (
    data,
    evaluation,
    experiment,
    masking,
    models,
    results,
    selection,
    shortcuts,
    store,
)
from masktune_utils.data import Split
from masktune_utils.selection import HeldOut
from masktune_utils.settings import Settings

SMALL = TINY | {"limit": 400, "epochs": 4}
RULES = [(False, 4.0, 3, 2), (True, 2.0, 1, 1)]
# Number of images → epochs of fine-tuning, of 32 images a step.
EPOCHS = {100: 6, 4000: 6, 12_000: 2, 24_000: 1, 60_000: 1}


@pytest.fixture
def small_rules(monkeypatch) -> None:
    """Three candidates, which are quick to train."""
    monkeypatch.setattr(selection, "CANDIDATES", RULES)
    monkeypatch.setattr(selection, "MOST_EPOCHS", 2)


@pytest.fixture
def first_is_taken(monkeypatch) -> None:
    """The first candidate passes, whatever another CPU makes of so few images."""

    def take_first(judged: dict) -> tuple[str, str]:
        return next(iter(judged)), "The first is taken."

    monkeypatch.setattr(selection, "by_mistakes", take_first)


with_small_rules = pytest.mark.usefixtures("small_rules")
where_a_mask_is_taken = pytest.mark.usefixtures("small_rules", "first_is_taken")


def with_base(directory: Path, **values) -> tuple[Settings, shortcuts.BiasedSets]:
    """Settings, whose base model and its result are saved, and images."""
    settings = Settings(**(SMALL | values), directory=str(directory))
    sets = shortcuts.load(settings)
    experiment.record(experiment.base_model(settings, sets.train), sets)
    return settings, sets


def names_of(candidates: list[Settings]) -> list[str]:
    return [candidate.configuration for candidate in candidates]


def test_the_candidates_are_resampled_by_masks_of_their_own_and_by_shared_ones():
    settings = Settings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    candidates = selection.candidates(settings, 4000)
    assert len(candidates) == sum(rounds for *_, rounds in selection.CANDIDATES)
    assert len({*names_of(candidates)}) == len(candidates)
    for candidate in candidates:
        assert candidate.identity(base=True) == settings.identity(base=True)
        assert candidate.cross_fit
        assert candidate.finetune_schedule == "linear"
        assert candidate.fill == "resample"
    assert {candidate.shared for candidate in candidates} == {False, True}


def test_few_images_are_seen_in_more_epochs():
    settings = Settings(dataset="mnist5k")
    epochs = {}
    for count in EPOCHS:
        candidates = selection.candidates(settings, count)
        epochs[count] = candidates[0].finetune_epochs
    assert epochs == EPOCHS


def held_out() -> HeldOut:
    """Twelve images of two classes; ERM is wrong on the first or last two of each.

    Candidate a is right on 3 of 4 mistakes and 6 of 8 others, b on 1 of 4 and 8 of 8.
    """
    a = torch.tensor([0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1])
    b = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0])
    return HeldOut(
        labels=torch.tensor([0] * 6 + [1] * 6),
        erm_predictions=torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0]),
        erm_probabilities=torch.ones(12),
        candidate_predictions={"a": a, "b": b},
        hidden={"a": 0.1, "b": 0.2},
    )


def wilson(share: float, count: int) -> list[float]:
    """The 95 % interval of Wilson, 1927."""
    z = 1.959963984540054
    scale = 1 + z * z / count
    middle = share + z * z / (2 * count)
    width = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count**2))
    return [(middle - width) / scale, (middle + width) / scale]


def test_a_candidate_is_judged_by_the_mistakes_of_erm_and_by_the_rest():
    judged = selection.judge(held_out())
    assert judged["a"]["mistakes"] == {"right": [1, 2], "all": [2, 2]}
    assert judged["a"]["rest"] == {"right": [3, 3], "all": [4, 4]}
    assert judged["b"]["mistakes"] == {"right": [0, 1], "all": [2, 2]}
    assert judged["b"]["rest"] == {"right": [4, 4], "all": [4, 4]}
    assert judged["a"]["score"] == 0.75
    assert judged["b"]["score"] == 0.25
    assert judged["a"]["hidden"] == 0.1
    assert judged["b"]["hidden"] == 0.2
    assert judged["a"]["interval"] == pytest.approx(wilson(0.75, 4))
    assert judged["b"]["interval"] == pytest.approx(wilson(0.25, 4))


def row(right: int, rest: int, hidden: float, mistakes: int = 40) -> dict:
    """A judged candidate, of some mistakes and of 1,000 other images."""
    labels = torch.zeros(mistakes + 1000, dtype=torch.long)
    erm = labels.clone()
    erm[:mistakes] = 1
    predictions = labels.clone()
    predictions[right:mistakes] = 1
    predictions[mistakes + rest :] = 1
    sure = torch.ones(len(labels))
    predicted = HeldOut(labels, erm, sure, {"a": predictions}, {"a": hidden})
    judged = selection.judge(predicted)["a"]
    return judged | {"description": f"rule {hidden}"}


def test_of_the_candidates_within_a_standard_error_the_one_that_hides_least_is_chosen():
    judged = {
        "best": row(38, 960, 0.3),  # 0.95; its standard error is 0.034
        "near": row(37, 970, 0.2),  # 0.925
        "far": row(36, 999, 0.1),  # 0.9
    }
    chosen, reason = selection.by_mistakes(judged)
    assert chosen == "near"
    numbers = (
        "37 of these are right (92 %, 95 % interval 80–97 %), and 97.0 % of the others."
    )
    assert reason == f"With rule 0.2, {numbers}"
    judged["near"] = row(40, 910, 0.2)  # the rest is what it gets wrong
    chosen, _ = selection.by_mistakes(judged)
    assert chosen == "best"


def test_erm_is_kept_unless_most_of_its_mistakes_are_right_beyond_doubt():
    judged = {"a": row(25, 999, 0.1), "b": row(20, 999, 0.2)}
    chosen, reason = selection.by_mistakes(judged)
    assert chosen == "base"
    doubt = (
        "No candidate gets most of them, beyond doubt, and most of the others right."
    )
    numbers = (
        "25 of these are right (62 %, 95 % interval 47–76 %), and 99.9 % of the others."
    )
    assert reason == f"{doubt} With rule 0.1, {numbers}"


@pytest.mark.parametrize(("right", "mistakes"), [(27, 40), (220, 400)])
def test_a_candidate_is_admitted_if_its_interval_lies_above_one_half(right, mistakes):
    judged = {"a": row(right, 999, 0.1, mistakes)}
    assert judged["a"]["interval"][0] > 0.5
    chosen, _ = selection.by_mistakes(judged)
    assert chosen == "a"


def test_what_is_not_admitted_is_not_chosen():
    """Not even where it is within a standard error of the best, and hides less."""
    judged = {"a": row(28, 999, 0.3), "b": row(26, 999, 0.1)}
    assert judged["b"]["interval"][0] < 0.5
    chosen, _ = selection.by_mistakes(judged)
    assert chosen == "a"


@pytest.mark.parametrize(("rest", "expected"), [(500, "base"), (501, "a")])
def test_a_candidate_is_admitted_if_most_of_the_rest_is_right(rest, expected):
    chosen, _ = selection.by_mistakes({"a": row(40, rest, 0.1)})
    assert chosen == expected


def test_where_none_is_admitted_the_best_is_reported():
    judged = {"a": row(25, 999, 0.2), "b": row(24, 999, 0.1)}
    _, reason = selection.by_mistakes(judged)
    assert "With rule 0.2, 25 of these are right" in reason


@with_small_rules
def test_candidates_that_differ_in_their_rounds_alone_form_a_chain():
    candidates = selection.candidates(Settings(**SMALL), 400)
    chains = selection.chains(candidates[::-1])
    rounds = [[candidate.rounds for candidate in chain] for chain in chains]
    assert sorted(rounds) == [[1], [1, 2]]


def predict_step_by_step(
    settings: Settings, candidates: list[Settings], train: Split
) -> HeldOut:
    """Held-out predictions of ERM and of each candidate, in the order of the images."""
    halves = data.stratified_halves(train.labels, settings.seed)
    erm = torch.zeros_like(train.labels)
    predicted = {name: erm.clone() for name in names_of(candidates)}
    hidden = dict.fromkeys(predicted, 0.0)
    for half, other in ((0, 1), (1, 0)):
        seen = train[halves[half]]
        unseen = train[halves[other]]
        for candidate in candidates:
            of_half = candidate.of_half(half)
            base = experiment.base_model(of_half, seen)
            tuned = experiment.masktune(of_half, base, seen)
            erm_logits = evaluation.predict(base.model, unseen)
            logits = evaluation.predict(tuned.model, unseen)
            erm[halves[other]] = erm_logits.argmax(1)
            predicted[candidate.configuration][halves[other]] = logits.argmax(1)
            share = tuned.masked.own_masks.float().mean().item()
            hidden[candidate.configuration] += share / 2
    return HeldOut(train.labels, erm, torch.ones(len(erm)), predicted, hidden)


def assert_probabilities_are_of_the_other_half(
    held_out: HeldOut, settings: Settings, train: Split
) -> None:
    halves = data.stratified_halves(train.labels, settings.seed)
    expected = []
    for half, other in ((0, 1), (1, 0)):
        base = experiment.base_model(settings.replace(half=half), train[halves[half]])
        logits = evaluation.predict(base.model, train[halves[other]])
        expected.append(logits.softmax(1).amax(1))
    torch.testing.assert_close(held_out.erm_probabilities, torch.cat(expected))


@with_small_rules
def test_the_choice_equals_one_made_step_by_step(tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.1)
    candidates = selection.candidates(settings, len(sets.train))
    choice = selection.choose(candidates)
    expected_held_out = predict_step_by_step(settings, candidates, sets.train)
    held_out = selection.predict_held_out(candidates, jobs=1, retrain=False)
    assert_probabilities_are_of_the_other_half(held_out, settings, sets.train)
    for name, expected in selection.judge(expected_held_out).items():
        assert choice["candidates"][name].items() >= expected.items()
    assert choice["mistakes"] == expected_held_out.is_mistake.sum() >= selection.FEW
    assert choice["images"] == 400
    chosen, reason = selection.by_mistakes(choice["candidates"])
    assert reason in choice["reason"]
    if chosen != "base":  # else resampled images decide, see below
        assert choice["configuration"] == chosen
    path = settings.folder("results") / "chosen.json"
    assert json.loads(path.read_text()) == choice


@where_a_mask_is_taken
def test_the_chosen_model_is_the_fine_tuning_that_the_choice_names(tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.1)
    candidates = selection.candidates(settings, len(sets.train))
    choice = selection.choose(candidates)
    base = experiment.base_model(settings, sets.train)
    model = selection.chosen_model(choice, candidates, base, sets.train)
    assert model.configuration == choice["configuration"]
    assert model.settings == selection.chosen_settings(choice, candidates)
    kept = choice | {"configuration": "base"}
    assert selection.chosen_model(kept, candidates, base, sets.train) is base
    assert selection.chosen_settings(kept, candidates) is None


def disguised(sets: shortcuts.BiasedSets) -> shortcuts.BiasedSets:
    """The training images and classes as they are, and everything else changed."""
    changed = {}
    for name in ("train", "validation"):
        split = getattr(sets, name)
        shortcut = torch.rand(len(split), 28, 28) < 0.5
        groups = torch.randint(10, (len(split),))
        changed[name] = dataclasses.replace(split, shortcut=shortcut, digits=groups)
    pixels = torch.randint(256, (50, 3, 28, 28), dtype=torch.uint8)
    noise = Split(pixels, torch.arange(50) % 2)
    return sets._replace(**changed, raw=noise, biased=noise)


@with_small_rules
@pytest.mark.parametrize("conflicting_share", [0.01, 0.1])  # few mistakes, and more
def test_neither_test_images_nor_groups_nor_the_shortcut_are_known_to_the_choice(
    conflicting_share, tmp_path, monkeypatch
):
    values = {"conflicting_share": conflicting_share}
    load = shortcuts.load
    settings, sets = with_base(tmp_path / "as they are", **values)
    candidates = selection.candidates(settings, len(sets.train))
    expected = selection.choose(candidates)
    assert (expected["mistakes"] < selection.FEW) == (conflicting_share == 0.01)
    of_images = (selection.SAMPLE, evaluation.accuracy)
    expected_accuracies = selection.resampled_accuracies(candidates, *of_images)
    settings, _ = with_base(tmp_path / "disguised", **values)
    monkeypatch.setattr(shortcuts, "load", lambda settings: disguised(load(settings)))
    candidates = selection.candidates(settings, len(sets.train))
    assert selection.choose(candidates) == expected
    accuracies = selection.resampled_accuracies(candidates, *of_images)
    assert accuracies == expected_accuracies


@with_small_rules
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_without_a_shortcut_erm_is_kept(tmp_path):
    settings, sets = with_base(tmp_path, shortcut="none", limit=1000)
    choice = selection.choose(selection.candidates(settings, len(sets.train)))
    assert choice["configuration"] == "base"
    assert choice["mistakes"] >= selection.FEW
    assert "ERM is not sure of its mistakes" in choice["reason"]
    table = results.collect(str(tmp_path))
    assert table["chosen"].tolist() == [True]


@with_small_rules
def test_without_mistakes_resampled_images_are_the_judge(tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.0, limit=1000)
    candidates = selection.candidates(settings, len(sets.train))
    choice = selection.choose(candidates)
    assert choice["mistakes"] < selection.FEW
    held_out = selection.predict_held_out(candidates, jobs=1, retrain=False)
    judged = choice["candidates"]
    chosen, reason = selection.few_mistakes_test(candidates, judged, held_out)
    assert choice["configuration"] == chosen  # which depends on the CPU and its threads
    assert choice["reason"].endswith(f", too few to judge by. {reason}")


def resampled(
    candidate: Settings, half: int, train: Split, count: int
) -> masking.MaskedDataset:
    """Some images of a half, resampled by the masks of a candidate."""
    settings = candidate.of_half(half)
    tuned = experiment.masktune(settings, experiment.base_model(settings, train), train)
    generator = torch.Generator().manual_seed(candidate.seed)
    sample = torch.randperm(len(train), generator=generator)[:count]
    masks = tuned.masked.own_masks[sample]
    return masking.MaskedDataset(train[sample], masks, "resample", candidate.seed)


def networks_of(candidates: list[Settings], half: int) -> dict[str, torch.nn.Module]:
    """The saved networks of a half, ERM's among them."""
    of_half = candidates[0].of_half(half)
    paths = {"base": of_half.checkpoint_path("base")}
    for candidate in candidates:
        of_half = candidate.of_half(half)
        path = of_half.checkpoint_path(of_half.configuration)
        paths[candidate.configuration] = path
    return {name: store.load_checkpoint(path).model for name, path in paths.items()}


@with_small_rules
def test_accuracies_on_resampled_images_are_those_of_a_computation_by_hand(tmp_path):
    settings, sets = with_base(tmp_path, seed=1)
    candidates = selection.candidates(settings, len(sets.train))[1:]
    selection.choose(candidates)
    names = names_of(candidates)
    mean = pd.DataFrame(0.0, index=["base", *names], columns=names)
    worst = mean.copy()
    halves = data.stratified_halves(sets.train.labels, settings.seed)
    for half, other in ((0, 1), (1, 0)):
        networks = networks_of(candidates, other)
        for candidate in candidates:
            mask = candidate.configuration
            images = resampled(candidate, half, sets.train[halves[half]], 100)
            for name, network in networks.items():
                logits = evaluation.predict(network, images)
                metrics = evaluation.metrics(logits, images.labels)
                mean.loc[name, mask] += metrics["accuracy"] / 2
                worst.loc[name, mask] += min(metrics["class_accuracy"]) / 2
    measures = {evaluation.accuracy: mean, evaluation.worst_class: worst}
    for measure, expected in measures.items():
        accuracies = selection.resampled_accuracies(candidates, 100, measure)
        pd.testing.assert_frame_equal(pd.DataFrame(accuracies), expected)


RESAMPLED = {  # by mask: the accuracy of each model
    "a": {"base": 0.1, "a": 0.89, "b": 0.2},
    "b": {"base": 0.4, "a": 0.6, "b": 0.9},
    "c": {"base": 0.95, "a": 0.7, "b": 0.93},
}


@pytest.mark.parametrize(
    ("least", "expected"),
    [
        (0.89, {"base": 0.79, "a": 0.3, "b": 0.69}),
        (0.9, {"base": 0.5, "a": 0.3, "b": 0.02}),
        (0.95, {"base": 0.0, "a": 0.25, "b": 0.02}),
        (0.96, {}),
    ],
)
def test_a_shortfall_is_the_largest_on_images_that_a_model_can_read(least, expected):
    shortfalls = selection.largest_shortfalls(RESAMPLED, least)
    assert shortfalls == pytest.approx(expected)


@pytest.mark.parametrize(
    ("erm", "candidate", "expected"),
    [
        (0.88, 0.97, "a"),
        (0.9199, 0.9701, "a"),
        (0.88, 0.99, "a"),
        (0.9201, 0.9701, None),  # ERM does not rely on it
        (0.9199, 0.9699, None),  # it is needed
        (0.97, 0.99, None),
    ],
)
def test_erm_relies_on_what_a_candidate_does_without(erm, candidate, expected):
    resampled = {"a": {"base": erm, "a": candidate, "b": 0.99}}
    assert selection.shows_reliance(resampled, erm_accuracy=0.98) == expected


def test_of_masks_that_show_it_the_one_furthest_above_erm_is_named():
    resampled = {
        "a": {"base": 0.88, "a": 0.98},
        "b": {"base": 0.87, "b": 0.975},
        "c": {"base": 0.868, "c": 0.9705},
        "d": {"base": 0.5, "d": 0.969},  # it needs what it hides
    }
    assert selection.shows_reliance(resampled, erm_accuracy=0.98) == "b"


def in_second_test(
    resampled: dict, monkeypatch, probability: float = 0.9, count: int = 2500
) -> tuple:
    """Its result for three candidates, of which a hides least, and c most."""
    asked = []
    names = ["a", "b", "c"]

    def accuracies(candidates, size, accuracy_of):
        asked.append((candidates, size, accuracy_of))
        return resampled

    monkeypatch.setattr(selection, "resampled_accuracies", accuracies)
    hidden = dict(zip(names, [0.1, 0.2, 0.3], strict=True))
    judged = {name: row(20, 990, hidden[name]) for name in names}
    labels = torch.arange(count) % 2
    erm_predictions = labels.clone()
    erm_predictions[: count // 50] = 2  # 98 % are right
    probabilities = torch.ones(count)
    probabilities[: count // 50] = probability
    held_out = HeldOut(labels, erm_predictions, probabilities, {}, hidden)
    chosen, reason = selection.second_test(names, judged, held_out)
    is_sure = probability > selection.SURE
    assert asked == ([] if is_sure else [(names, 5000, evaluation.accuracy)])
    return chosen, reason


UNSURE = "ERM is not sure of its mistakes (median probability 90 %)."


def test_of_all_candidates_the_one_that_falls_least_behind_is_chosen(monkeypatch):
    resampled = {
        "a": {"base": 0.8766, "a": 0.9777, "b": 0.98, "c": 0.9},
        "b": {"base": 0.75, "a": 0.8, "b": 0.975, "c": 0.98},
        "c": {"base": 0.96, "a": 0.96, "b": 0.1, "c": 0.96},  # they hide too much
    }
    chosen, reason = in_second_test(resampled, monkeypatch)
    assert chosen == "b"
    images = "Of held-out images that the masks of rule 0.2 resample"
    right = "ERM gets 75.0 % right, and the model fine-tuned with them 97.5 %"
    before = "of the original images, ERM gets 98.0 %"
    meaning = "ERM relies on what is hidden, and the other model does without it."
    where = "On images resampled by the masks of candidates"
    points = "rule 0.2 is at most 0.5 points behind the best model, and ERM 23.0."
    expected = f"{UNSURE} {images}, {right}; {before}. {meaning} {where}, {points}"
    assert reason == expected


def test_the_chosen_one_need_not_be_the_one_that_shows_what_erm_relies_on(monkeypatch):
    resampled = {
        "a": {"base": 0.8, "a": 0.98, "b": 0.975, "c": 0.9},
        "b": {"base": 0.9, "a": 0.9, "b": 0.9, "c": 0.9},  # they hide too much
        "c": {"base": 0.85, "a": 0.88, "b": 0.97, "c": 0.9},  # a relies on the rest
    }
    chosen, reason = in_second_test(resampled, monkeypatch)
    assert chosen == "b"
    assert "the masks of rule 0.1 resample" in reason
    assert "rule 0.2 is at most 0.5 points behind" in reason


def test_erm_is_kept_if_no_candidate_falls_less_behind_than_it(monkeypatch):
    resampled = {
        "a": {"base": 0.9, "a": 0.97, "b": 0.6, "c": 0.6},
        "b": {"base": 0.98, "a": 0.9, "b": 0.9, "c": 0.97},
    }
    chosen, reason = in_second_test(resampled, monkeypatch)
    assert chosen == "base"
    kept = "no candidate falls less behind the best model than ERM, which is kept."
    assert reason.endswith(kept)


def test_erm_is_kept_if_it_relies_on_nothing_that_can_be_hidden(monkeypatch):
    resampled = {"a": {"base": 0.97, "a": 0.99, "b": 0.99, "c": 0.99}}
    chosen, reason = in_second_test(resampled, monkeypatch)
    assert chosen == "base"
    none = "No candidate shows, on resampled images, that ERM relies on what it hides"
    assert reason == f"{UNSURE} {none}, so ERM is kept."


@pytest.mark.parametrize(
    ("count", "behind", "expected"),
    [(2500, 0.00039, "a"), (2500, 0.00041, "b"), (15_000, 0.00009, "a")],
)
def test_the_standard_error_is_that_of_all_images(count, behind, expected, monkeypatch):
    """It is 0.0004 of 2,500 images, and 0.0001 of 10,000, the most that judge."""
    resampled = {
        "a": {"base": 0.8, "a": 0.98 - behind, "b": 0.98, "c": 0.9},
        "b": {"base": 0.8, "a": 0.98, "b": 0.98, "c": 0.9},
        "c": {"base": 0.8, "a": 0.9, "b": 0.9, "c": 0.9},
    }
    chosen, _ = in_second_test(resampled, monkeypatch, count=count)
    assert chosen == expected


def test_the_median_of_an_even_number_of_mistakes_lies_in_the_middle():
    labels = torch.zeros(40, dtype=torch.long)
    probabilities = torch.tensor([0.94, 0.97]).repeat_interleave(20)
    held_out = HeldOut(labels, labels + 1, probabilities, {}, {})
    chosen, reason = selection.second_test([], {}, held_out)
    assert chosen == "base"
    assert "(median probability 96 %)" in reason  # 95.5


@pytest.mark.parametrize(("probability", "expected"), [(0.9499, "a"), (0.9501, "base")])
def test_erm_is_kept_if_it_is_sure_of_the_mistakes_that_no_candidate_corrects(
    probability, expected, monkeypatch
):
    resampled = {"a": {"base": 0.88, "a": 0.98, "b": 0.9, "c": 0.9}}
    chosen, reason = in_second_test(resampled, monkeypatch, probability)
    assert chosen == expected
    if chosen == "base":
        sure = "ERM is sure of its mistakes (median probability 95 %)"
        because = "as where a shortcut causes them that no candidate hides"
        assert reason == f"{sure}, {because}, so ERM is kept."


@with_small_rules
def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(
    tmp_path, monkeypatch
):
    settings, sets = with_base(tmp_path)
    candidates = selection.candidates(settings, len(sets.train))
    made = []
    predict = selection.predict_held_out

    def counted(candidates, jobs, retrain):
        made.append(names_of(candidates))
        return predict(candidates, jobs, retrain)

    monkeypatch.setattr(selection, "predict_held_out", counted)
    first = selection.choose(candidates)
    assert selection.choose(candidates) == first
    assert made == [names_of(candidates)]
    of_two = selection.choose(candidates[:2])
    assert [*of_two["candidates"]] == made[1] == names_of(candidates[:2])
    path = settings.folder("results") / "chosen.json"
    path.write_text(json.dumps(of_two | {"base_sha256": "of another base model"}))
    assert results.collect(str(tmp_path))["chosen"].isna().all()
    selection.choose(candidates[:2])
    assert len(made) == 3


CHOOSE = """
from masktune_utils import selection
from masktune_utils.settings import Settings
selection.CANDIDATES = {rules}
selection.MOST_EPOCHS = 2
settings = Settings(**{values})
selection.choose(selection.candidates(settings, 400))
"""


@with_small_rules
def test_a_choice_that_is_killed_goes_on(tmp_path):
    settings, sets = with_base(tmp_path / "undisturbed")
    expected = selection.choose(selection.candidates(settings, len(sets.train)))
    killed = tmp_path / "killed"
    settings, _ = with_base(killed)
    code = CHOOSE.format(rules=RULES, values=dict(settings))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not [*killed.glob("checkpoints/*half=0*/seed0/*finetuned*rounds=2*.pth")]:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (settings.folder("results") / "chosen.json").exists()
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*.pth")}
    choice = selection.choose(selection.candidates(settings, len(sets.train)))
    assert choice["candidates"].keys() == expected["candidates"].keys()
    for path, written in before.items():
        assert path.stat().st_mtime_ns == written
    assert len([*killed.rglob("*.pth")]) > len(before)


def test_a_candidate_in_words():
    described = results.describe("mean_std", 3.5, 3)
    assert described == "mean_std 3.5 dilated by 3"
    described = results.describe("mean_std", 4.0, 3, "resample", 2)
    assert described == "mean_std 4 dilated by 3, resampled, 2 rounds"
    described = results.describe("mean_std", 2.0, fill="resample", shared=True)
    assert described == "mean_std 2, shared, resampled"


def rules_of(candidates: list[Settings]) -> list[tuple]:
    return [
        (settings.shared, settings.param, settings.dilation, settings.rounds)
        for settings in candidates
    ]


def test_the_candidates_for_digits_are_those_of_the_published_choices():
    candidates = selection.candidates(Settings(dataset="mnist"), 60_000)
    assert rules_of(candidates) == [
        (False, 4.0, 3, 1),
        (False, 4.0, 3, 2),
        (False, 3.0, 4, 1),
        (False, 3.0, 4, 2),
        (False, 2.0, 2, 1),
        (False, 2.0, 2, 2),
        (False, 2.0, 4, 1),
        (True, 1.0, 1, 1),
        (True, 1.0, 1, 2),
        (True, 2.0, 2, 1),
        (True, 2.0, 2, 2),
        (True, 2.0, 2, 3),
        (True, 2.0, 2, 4),
        (True, 2.0, 2, 5),
    ]
    for settings in candidates:
        assert settings.method == "mean_std"
        assert settings.finetune_lr == 0.02
        assert settings.finetune_batch_size == 32


def test_the_candidates_for_photographs_are_coarser_and_see_fewer_at_a_time(tmp_path):
    folders = {"train_folder": str(tmp_path), "test_folder": str(tmp_path)}
    settings = Settings(dataset="folder", **folders)
    candidates = selection.candidates(settings, 3000)
    assert rules_of(candidates) == [
        (False, 1.5, 0, 1),
        (False, 1.5, 0, 2),
        (False, 1.0, 0, 1),
        (False, 1.0, 0, 2),
        (False, 0.5, 0, 1),
    ]
    for settings in candidates:
        assert settings.finetune_batch_size == 16
        assert settings.finetune_epochs == 4  # 750 steps of 16 images


def times_of(directory) -> dict:
    paths = directory.rglob("CNN_*.pth")
    return {path: path.stat().st_mtime_ns for path in paths}


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_one_candidate_is_enough_and_to_retrain_is_to_train_both_halves_again(
    tmp_path, monkeypatch
):
    settings, _ = with_base(tmp_path, limit=40, epochs=1)
    rule = {"method": "mean_std", "param": 2.0, "fill": "resample", "cross_fit": True}
    candidates = [settings.replace(**rule)]
    selection.choose(candidates)
    before = times_of(tmp_path)
    (name,) = names_of(candidates)
    accuracies = selection.resampled_accuracies(candidates, 20, evaluation.accuracy)
    assert accuracies[name].keys() == {"base", name}
    assert times_of(tmp_path) == before
    selection.choose(candidates, retrain=True)
    after = times_of(tmp_path)
    again = {path for path in before if before[path] != after[path]}
    expected = set()
    for half in (0, 1):
        of_half = candidates[0].of_half(half)
        for name in ("base", of_half.configuration):
            expected.add(of_half.checkpoint_path(name))
    assert again == expected


def test_where_erm_is_kept_the_chosen_model_is_the_base_model(settings, splits):
    kept = {"configuration": "base"}
    assert selection.chosen_settings(kept, [settings]) is None
    base = experiment.base_model(settings, splits.train)
    assert selection.chosen_model(kept, [settings], base, splits.train) is base


def test_the_chosen_model_is_loaded_unless_it_is_trained_again(settings, splits):
    base = experiment.base_model(settings, splits.train)
    arguments = ({"configuration": "top_k_0.1"}, [settings], base, splits.train)
    assert selection.chosen_model(*arguments).seconds > 0
    assert selection.chosen_model(*arguments).seconds is None
    assert selection.chosen_model(*arguments, retrain=True).seconds > 0


BY_MISTAKES = (
    ". With mean_std 2, resampled, 10 of these are right "
    "(100 %, 95 % interval 72–100 %), and 100.0 % of the others."
)
BY_RESAMPLED_IMAGES = (
    ", too few to judge by. On images resampled by the masks of candidates, "
    "mean_std 2, resampled is at most 0.0 points behind the best model, and ERM 40.0. "
    "That is in doubt."
)


@pytest.mark.parametrize(
    ("mistakes", "expected"), [(10, BY_MISTAKES), (9, BY_RESAMPLED_IMAGES)]
)
def test_ten_mistakes_are_enough_to_judge_by(mistakes, expected, settings, monkeypatch):
    rule = {"method": "mean_std", "param": 2.0, "fill": "resample", "cross_fit": True}
    candidate = settings.replace(**rule)
    (name,) = names_of([candidate])
    labels = torch.zeros(1000, dtype=torch.long)
    erm = labels.clone()
    erm[:mistakes] = 1
    asked = []

    def predict(candidates, jobs, retrain):
        asked.append((candidates, jobs, retrain))
        return HeldOut(labels, erm, torch.ones(1000), {name: labels}, {name: 0.1})

    monkeypatch.setattr(selection, "predict_held_out", predict)
    resampled = {name: {"base": 0.6, name: 1.0}}
    monkeypatch.setattr(selection, "resampled_accuracies", lambda *_: resampled)
    base = dict.fromkeys(results.RESULT_KEYS, "of the base model")
    results.write_json(settings.folder("results") / "base.json", base)
    choice = selection.choose([candidate], jobs=3, retrain=True)
    wrong = f"{mistakes} of 1,000 training images are predicted wrongly"
    assert (
        choice["reason"] == f"{wrong} by ERM models that have not seen them{expected}"
    )
    assert choice["candidates"][name]["description"] == "mean_std 2, resampled"
    assert choice["candidates"][name]["shared"] is False
    assert asked == [([candidate], 3, True)]


def test_where_mistakes_do_not_decide_resampled_images_do(settings, monkeypatch):
    rule = {"method": "mean_std", "param": 2.0, "fill": "resample", "cross_fit": True}
    candidate = settings.replace(**rule)
    (name,) = names_of([candidate])
    labels = torch.zeros(1000, dtype=torch.long)
    erm = labels.clone()
    erm[:40] = 1
    predictions = labels.clone()
    predictions[:30] = 1
    probabilities = torch.ones(1000)  # sure of what is right
    probabilities[:25] = 0.9  # the median of the mistakes
    held_out = HeldOut(labels, erm, probabilities, {name: predictions}, {name: 0.1})
    resampled = {name: {"base": 0.83, name: 0.955}}
    monkeypatch.setattr(selection, "predict_held_out", lambda *_: held_out)
    monkeypatch.setattr(selection, "resampled_accuracies", lambda *_: resampled)
    base = dict.fromkeys(results.RESULT_KEYS, "of the base model")
    results.write_json(settings.folder("results") / "base.json", base)
    choice = selection.choose([candidate])
    assert choice["configuration"] == name
    judged = choice["candidates"]
    _, first = selection.by_mistakes(judged)
    _, second = selection.second_test([candidate], judged, held_out)
    assert choice["reason"].endswith(f"{first} {second}")
    resampled[name][name] = 0.9
    choice = selection.choose([candidate], retrain=True)
    assert choice["configuration"] == "base"
    assert choice["reason"].endswith("so ERM is kept.")


def test_without_mistakes_nothing_is_known_of_the_accuracy_on_them():
    labels = torch.arange(10) % 2
    predictions = {"a": torch.zeros(10, dtype=torch.long)}
    sure = torch.ones(10)
    held_out = HeldOut(labels, labels, sure, predictions, {"a": 0.1})
    judged = selection.judge(held_out)["a"]
    assert judged["interval"] == [0, 1]
    assert judged["mistakes"] == {"right": [0, 0], "all": [0, 0]}
    assert selection.accuracy(judged["mistakes"]) == 1
    assert judged["score"] == 0.5


def test_a_candidate_that_gets_all_images_right_is_chosen():
    judged = {"a": row(30, 999, 0.1), "all": row(40, 1000, 0.2)}
    chosen, _ = selection.by_mistakes(judged)
    assert chosen == "all"


@pytest.mark.parametrize(
    ("shortfalls", "expected"),
    [
        ({"base": 0.4, "a": 0.05, "b": 0.055}, "b"),  # it hides less
        ({"base": 0.4, "a": 0.05, "b": 0.06}, "a"),  # the standard error is 0.0097
        ({"base": 0.4, "a": 0.0, "b": 0.0019}, "b"),  # the least one is 0.002
        ({"base": 0.4, "a": 0.0, "b": 0.0025}, "a"),
        ({"base": 0.257, "a": 0.255, "b": 0.257}, "a"),  # b is no better than ERM
        ({"base": 0.255, "a": 0.255, "b": 0.257}, "base"),
    ],
)
def test_of_models_that_fall_behind_the_least_the_one_that_hides_least_is_chosen(
    shortfalls, expected
):
    judged = {"a": row(0, 999, 0.3), "b": row(0, 999, 0.1)}
    chosen, _ = selection.by_shortfalls(judged, shortfalls, count=500)
    assert chosen == expected


def in_few_mistakes_test(resampled: dict, count: int, monkeypatch) -> tuple:
    """Its result for two candidates and held-out images; b hides less than a."""
    asked = []

    def accuracies(candidates, size, accuracy_of):
        asked.append((candidates, size, accuracy_of))
        return resampled

    monkeypatch.setattr(selection, "resampled_accuracies", accuracies)
    judged = {"a": row(0, 999, 0.2), "b": row(0, 999, 0.1)}
    labels = torch.arange(count) % 2
    held_out = HeldOut(labels, labels, torch.ones(count), {}, {})
    result = selection.few_mistakes_test(["a", "b"], judged, held_out)
    assert asked == [(["a", "b"], 500, evaluation.worst_class)]
    return result


IN_DOUBT = (
    "rule 0.2 is at most 5.0 points behind the best model, and ERM 25.1. "
    "That is in doubt."
)
NOT_FAR = "ERM is at most 24.9 points behind the best model, and is kept."
NONE_BETTER = "no candidate falls less behind the best model than ERM, which is kept."


@pytest.mark.parametrize(
    ("erm", "a", "expected"),
    [(0.699, 0.85, IN_DOUBT), (0.701, 0.85, NOT_FAR), (0.699, 0.6, NONE_BETTER)],
)
def test_without_mistakes_erm_is_kept_unless_it_falls_far_behind(
    erm, a, expected, monkeypatch
):
    resampled = {
        "a": {"base": erm, "a": 0.95, "b": 0.6},
        "b": {"base": 0.9, "a": a, "b": 0.9},
        "c": {"base": 0.0, "a": 0.1, "b": 0.89},  # these masks hide too much
    }
    chosen, reason = in_few_mistakes_test(resampled, 1000, monkeypatch)
    assert chosen == ("a" if expected == IN_DOUBT else "base")
    assert reason == f"On images resampled by the masks of candidates, {expected}"


@pytest.mark.parametrize(
    ("count", "behind", "expected"),
    [(500, 0.003, "b"), (1000, 0.003, "a"), (9000, 0.0015, "b")],
)
def test_without_mistakes_the_standard_error_is_that_of_a_class(
    count, behind, expected, monkeypatch
):
    """It is 0.004 of 250 images, and 0.002 of 500, the most that are looked at."""
    resampled = {
        "a": {"base": 0.5, "a": 1.0, "b": 1 - behind},
        "b": {"base": 0.5, "a": 1.0, "b": 1.0},
    }
    assert in_few_mistakes_test(resampled, count, monkeypatch)[0] == expected


def test_without_mistakes_erm_is_kept_where_all_masks_hide_too_much(monkeypatch):
    resampled = {"a": {"base": 0.1, "a": 0.899, "b": 0.1}}
    chosen, reason = in_few_mistakes_test(resampled, 1000, monkeypatch)
    assert chosen == "base"
    too_much = "The masks of all candidates hide too much to compare models"
    assert reason == f"{too_much} on resampled images, so ERM is kept."


def test_the_networks_that_judge_are_on_the_device_of_the_images(settings, monkeypatch):
    for name in ("base", settings.configuration):
        path = settings.of_half(1).checkpoint_path(name)
        store.save_checkpoint(path, models.new_model(0), {}, [])
    devices = {settings.device: torch.device("meta")}
    monkeypatch.setattr(models, "resolve_device", devices.get)
    networks = selection._networks_of_half([settings], 1)
    assert networks.keys() == {"base", settings.configuration}
    for network in networks.values():
        assert {weights.device.type for weights in network.parameters()} == {"meta"}
