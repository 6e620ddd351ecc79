"""The score: each clause of the rule by hand on toys, and the rule written anew."""

import math

import numpy as np
import pytest
import torch
import trials
from torch import nn

from masktune_utils.choice import ERM, NULL, Choice, HeldOut, score

LATER = "b"  # masks are called a, b, …
MEAN_MASK = torch.zeros(30, 30)
MEAN_MASK[:9, :9] = 1


def held_out(labels, predictions, explained, resampled=None) -> HeldOut:
    """What models predict.

    Args:
        labels: N.
        predictions: model → N; without `NULL` nothing is fine-tuned yet.
        explained: mask → N.
        resampled: mask → model → accuracy; by default ERM is wrong about half.
    """
    masks = [*explained]
    return HeldOut(
        labels=torch.as_tensor(labels),
        mistake_map=torch.zeros(13, 13),
        predictions={name: torch.as_tensor(predictions[name]) for name in predictions},
        explained={mask: torch.as_tensor(explained[mask]).float() for mask in masks},
        resampled=resampled or {mask: {ERM: 0.5} for mask in masks},
        mean_masks=dict.fromkeys(masks, MEAN_MASK),
    )


def toy(right, mistakes=40, **options) -> HeldOut:
    """A thousand images of two classes, in turns; ERM is wrong on the first ones.

    Args:
        right: model → how many of ERM's mistakes, and of the rest, it gets right.
        mistakes: their number; a mask explains all.
        **options: of `held_out`.
    """
    labels = np.arange(1000) % 2
    predictions = {}
    for model, (of_mistakes, of_rest) in ({ERM: (0, 1000 - mistakes)} | right).items():
        is_right = np.zeros(1000, dtype=bool)
        is_right[:of_mistakes] = True
        is_right[mistakes : mistakes + of_rest] = True
        predictions[model] = np.where(is_right, labels, 1 - labels)
    masks = [model for model in right if model != NULL] or ["a"]
    explained = dict.fromkeys(masks, np.arange(1000) < mistakes)
    return held_out(labels, predictions, explained, **options)


def test_each_kind_counts_by_the_share_of_it_that_the_mask_explains():
    """Of class 0, eight are taken for 1 and four for 2; the mask explains 2 and 4."""
    labels = [0] * 12 + [1] * 4
    predictions = {
        ERM: [1] * 8 + [2] * 4 + [1] * 4,
        NULL: [0] + [1] * 7 + [0] + [2] * 3 + [1] * 4,
        "a": [0] * 3 + [1] * 5 + [0] * 4 + [1, 1, 1, 0],
    }
    explained = [1] * 2 + [0] * 6 + [1] * 4 + [0] * 4
    row = score.scores(held_out(labels, predictions, {"a": explained})).loc["a"]
    gains = np.array([2 / 8, 3 / 4])  # of each kind
    weights = np.array([2 / 8, 4 / 4])
    expected = (weights * gains).sum() / weights.sum()
    assert row["score"] == pytest.approx(expected)
    assert row["gain"] == pytest.approx(expected - (1 / 4) / 2)  # of the rest
    assert row[["explains", "corrects", "nothing"]].tolist() == [6, 6, 2]


def test_a_mask_that_explains_nothing_has_no_score():
    predicted = toy({NULL: (0, 960), "a": (40, 960)})
    predicted.explained["a"] *= 0
    row = score.scores(predicted).loc["a"]
    assert row["score"] == 0
    assert np.isnan(row["error"])
    assert score.judge(predicted).chosen == ERM


@pytest.mark.parametrize(
    ("mistakes", "of_mask", "chosen"),
    [
        (140, (15, 860), "a"),
        (140, (13, 860), ERM),  # sure, but it gains 9 points
        (40, (20, 100), ERM),  # half of what it loses on the rest counts
    ],
)
def test_a_good_mask_gains_ten_points_less_half_of_what_the_rest_costs(
    mistakes, of_mask, chosen
):
    right = {NULL: (0, 1000 - mistakes), "a": of_mask}
    verdict = score.judge(toy(right, mistakes))
    assert verdict.chosen == chosen
    assert not verdict.is_final


def test_a_good_mask_gains_beyond_doubt():
    few = toy({NULL: (0, 995), "a": (1, 995)}, mistakes=5)
    assert score.scores(few).loc["a", "gain"] == pytest.approx(1 / 6)
    assert score.judge(few).chosen == ERM
    assert score.judge(toy({NULL: (0, 960), "a": (7, 960)})).chosen == "a"


def test_the_first_mask_that_gains_forty_points_is_taken_and_no_other_tried():
    clear = score.judge(toy({NULL: (0, 960), "a": (17, 960), LATER: (40, 960)}))
    assert clear.chosen == "a"
    assert clear.is_final
    assert clear.reason == (
        'Chosen: "a": of 40 mistakes that it explains, the mask corrects 17, nothing '
        "masked 0."
    )


@pytest.mark.parametrize(("later", "chosen"), [(13, "a"), (14, LATER)])
def test_a_later_mask_must_gain_half_a_standard_error_more(later, chosen):
    predicted = toy({NULL: (0, 960), "a": (12, 960), LATER: (later, 960)})
    assert score.judge(predicted).chosen == chosen


def test_erm_is_kept_if_no_mask_is_good_and_the_best_is_named():
    verdict = score.judge(toy({NULL: (18, 960), "a": (17, 960), LATER: (18, 960)}))
    assert (verdict.chosen, verdict.best) == (ERM, LATER)
    assert verdict.reason == (
        "ERM is kept: no mask clearly corrects what it explains; the best, "
        f'"{LATER}": of 40 mistakes that it explains, the mask corrects 18, nothing '
        "masked 18."
    )


@pytest.mark.parametrize(
    ("explains", "accuracy", "is_hopeless"),
    [(4, 0.8, False), (3, 0.8, True), (4, 0.9, True)],
)
def test_before_fine_tuning_erm_is_kept_where_no_mask_can_help(
    explains, accuracy, is_hopeless
):
    predicted = toy({}, mistakes=40, resampled={"a": {ERM: accuracy}})
    predicted.explained["a"] = (torch.arange(1000) < explains).float()
    verdict = score.judge(predicted)
    assert (verdict.chosen, verdict.is_final) == (ERM, is_hopeless)


@pytest.mark.parametrize(("of_mask", "chosen"), [(0.71, "a"), (0.69, ERM)])
def test_without_mistakes_the_model_is_taken_that_is_best_where_masks_resample(
    of_mask, chosen
):
    right = {NULL: (0, 996), "a": (0, 996), LATER: (0, 996)}
    resampled = {
        "a": {ERM: 0.5, NULL: 0.4, "a": of_mask, LATER: 0.1},
        LATER: {ERM: 0.5, NULL: 0.8, "a": 0.7, LATER: 0.9},
    }
    verdict = score.judge(toy(right, mistakes=4, resampled=resampled))
    assert verdict.chosen == chosen
    assert verdict.is_final
    decision = "ERM is kept" if chosen == ERM else 'Chosen: "a"'
    assert verdict.reason.startswith(f"{decision}, by a prior: 4 held-out mistakes")
    known_so_far = toy(right, mistakes=4)
    assert not score.judge(known_so_far).is_final


def test_there_is_no_score_before_a_mask_is_tried():
    table = score.scores(toy({}))
    assert table.empty
    assert [*table.columns] == score.COLUMNS


def test_four_images_that_nobody_can_learn_decide_nothing():
    predicted = toy({NULL: (0, 960), "a": (30, 960)})
    predicted.labels[-4:] = 2  # of a class that no model predicts
    assert score.judge(predicted).chosen == "a"


# The rule, written a second time.


def reference(held_out: HeldOut, mask: str) -> tuple[float, float, float]:
    """Score, error and gain of a mask, kind by kind and class by class."""
    labels = held_out.labels.numpy()
    predicted = held_out.predictions[ERM].numpy()
    right = {model: held_out.is_right(model).numpy() for model in (ERM, NULL, mask)}
    shares = held_out.explained[mask].numpy()
    weights = np.zeros(len(labels))
    lost = []
    for label in np.unique(labels):
        is_rest = (labels == label) & right[ERM]
        if is_rest.any():
            lost.append(right[NULL][is_rest].mean() - right[mask][is_rest].mean())
        for other in set(predicted) - {label}:
            kind = (labels == label) & (predicted == other)
            if kind.any():
                weights[kind] = shares[kind].mean() / kind.sum()
    weights = weights / weights.sum()
    gains = right[mask].astype(float) - right[NULL]
    mean = weights @ gains
    count = 1 / (weights @ weights)
    variance = weights @ (gains - mean) ** 2
    error = math.sqrt((count * variance + 1) / (count + 1) / count)
    return mean, error, mean - max(0, np.mean(lost)) / 2


def reference_choice(held_out: HeldOut) -> str:
    good = {}
    for mask in held_out.tried:
        if not held_out.explained[mask].any():
            continue
        mean, error, gain = reference(held_out, mask)
        if mean >= 1.64 * error and gain >= 0.1:
            good[mask] = (gain, gain - 0.5 * error)
    if not good:
        return ERM
    clear = [mask for mask, (gain, _) in good.items() if gain >= 0.4]
    _, least = max(good.values())
    near = [mask for mask, (gain, _) in good.items() if gain >= least]
    return [*clear, *near][0]


@pytest.mark.parametrize("name", trials.names()[::3])
def test_saved_predictions_are_judged_as_by_the_second_writing(name):
    predicted, _ = trials.read(name)
    if predicted.is_mistake.sum() < 5:
        return
    table = score.scores(predicted)[["score", "error", "gain"]]
    for mask in predicted.tried:
        if predicted.explained[mask].any():
            expected = reference(predicted, mask)
            np.testing.assert_allclose(table.loc[mask], expected, atol=1e-5)
    assert score.judge(predicted).chosen == reference_choice(predicted)


def choice_of(predicted: HeldOut) -> Choice:
    images = {NULL: None} | dict.fromkeys(predicted.explained)
    return Choice(predicted, images, None, score.judge(predicted))


def test_the_reason_tells_what_is_hidden_and_what_it_costs():
    choice = choice_of(toy({NULL: (0, 960), "a": (30, 950)}))
    assert choice.reason.splitlines()[1:] == [
        '"a" hides 9% of the image, mostly top left.',
        (
            "Accuracy on images not seen in training: 96.0% (ERM), 96.0% (nothing "
            "masked), 98.0% (mask)."
        ),
        'If your classes are about this part, keep ERM: choice.take("ERM").',
    ]
    kept = choice_of(toy({NULL: (16, 960), "a": (16, 960), LATER: (0, 1)}))
    assert kept.reason.splitlines()[-1] == 'To take this mask: choice.take("a").'
    untrained = choice_of(toy({NULL: (100, 850), "a": (140, 850)}, mistakes=150))
    assert "train it longer" in untrained.reason
    choice.held_out.has_maps = False
    assert choice.reason.endswith("masks are by exchange alone.")


def test_a_choice_can_be_changed_by_hand():
    choice = choice_of(toy({NULL: (0, 960), "a": (30, 960), LATER: (40, 960)}))
    assert choice.take(LATER).verdict.chosen == LATER
    assert f'"{LATER}" hides 9%' in choice.take(LATER).reason
    kept = choice.take(ERM)
    assert kept.is_kept
    assert kept.reason.startswith('By hand: "ERM". Chosen: "a"')
    with pytest.raises(ValueError, match="name is 'c'; allowed: ERM; a; b"):
        choice.take("c")


def test_the_chosen_images_are_fine_tuned_on_by_a_copy():
    def schedule(network: nn.Module, masked: str) -> nn.Module:
        network.masked = masked
        return network

    predicted = toy({NULL: (0, 960), "a": (30, 960)})
    images = {NULL: "as they are", "a": "of a"}
    choice = Choice(predicted, images, schedule, score.judge(predicted))
    network = nn.Linear(1, 1)
    assert choice.finetune(network).masked == choice.masked == "of a"
    kept = choice.take(ERM)
    assert kept.masked == "as they are"
    for unchanged in (network, kept.finetune(network)):
        assert not hasattr(unchanged, "masked")


@pytest.mark.parametrize(("count", "epochs"), [(60_000, 1), (10_000, 3), (1000, 6)])
def test_a_small_set_is_fine_tuned_for_more_epochs(count, epochs):
    assert score.default_epochs(count) == epochs
