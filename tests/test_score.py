"""The score: each clause of the rule by hand on toys, and the rule written anew."""

import math

import numpy as np
import pytest
import replay
import torch
import trials
from torch import nn

from masktune_utils.choice import ERM, NULL, Choice, HeldOut
from masktune_utils.choice.score import default_epochs, judge, scores

MEAN_MASK = torch.zeros(30, 30)
MEAN_MASK[:9, :9] = 1


def toy(mistakes=40, nothing=None, **masks):
    """A thousand images of two classes, in turns; ERM is wrong on the first ones.

    Args:
        mistakes: their number; each mask explains all.
        nothing: how many of ERM's mistakes, and of the rest, the model gets right with
            nothing masked; by default like ERM.
        **masks: like `nothing`, of each mask; by default `a` is not tried yet.
    """
    labels = torch.arange(1000) % 2
    erm = (0, 1000 - mistakes)
    predictions = {}
    for model, counts in {ERM: erm, NULL: nothing or erm, **masks}.items():
        of_mistakes, of_rest = counts
        is_right = torch.zeros(1000, dtype=torch.bool)
        is_right[:of_mistakes] = True
        is_right[mistakes:][:of_rest] = True
        predictions[model] = torch.where(is_right, labels, 1 - labels)
    names = [*masks] or ["a"]
    is_mistake = torch.arange(1000) < mistakes
    return HeldOut(
        labels=labels,
        mistake_map=torch.zeros(13, 13),
        predictions=predictions,
        explained={name: is_mistake.float() for name in names},
        resampled={name: {ERM: 0.5} for name in names},
        mean_masks=dict.fromkeys(names, MEAN_MASK),
    )


def test_a_mask_that_explains_nothing_has_no_score():
    predicted = toy(a=(40, 960))
    predicted.explained["a"].zero_()
    row = scores(predicted).loc["a"]
    assert row["score"] == 0
    assert np.isnan(row["error"])
    assert judge(predicted).chosen == ERM


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
    verdict = judge(toy(mistakes, a=of_mask))
    assert verdict.chosen == chosen
    assert not verdict.is_final


def test_a_good_mask_gains_beyond_doubt():
    few = toy(mistakes=5, a=(1, 995))
    assert scores(few).loc["a", "gain"] == pytest.approx(1 / 6)
    assert judge(few).chosen == ERM
    assert judge(toy(a=(7, 960))).chosen == "a"


def test_the_first_mask_that_gains_forty_points_is_taken_and_no_other_tried():
    """It counts as explained what it explains by half."""
    predicted = toy(a=(17, 960), b=(40, 960))
    predicted.explained["a"][:4] = 0.4
    predicted.explained["a"][4:] *= 0.5
    clear = judge(predicted)
    assert clear.chosen == "a"
    assert clear.is_final
    assert clear.reason == (
        'Chosen: "a".\nOf 36 mistakes that it explains, the mask corrects 13, nothing '
        "masked 0."
    )


@pytest.mark.parametrize(("later", "chosen"), [(13, "a"), (14, "b")])
def test_a_later_mask_must_gain_half_a_standard_error_more(later, chosen):
    predicted = toy(a=(12, 960), b=(later, 960))
    assert judge(predicted).chosen == chosen


def test_erm_is_kept_if_no_mask_is_good_and_the_best_is_named():
    nothing = (18, 960)
    verdict = judge(toy(nothing=nothing, a=(17, 960), b=nothing))
    assert (verdict.chosen, verdict.best) == (ERM, "b")
    assert verdict.reason == (
        "ERM is kept: no mask clearly corrects what it explains. The best: "
        '"b".\nOf 40 mistakes that it explains, the mask corrects 18, nothing masked 18.'
    )


@pytest.mark.parametrize(
    ("explains", "accuracy", "is_hopeless"),
    [(4, 0.8, False), (3, 0.8, True), (4, 0.9, True)],
)
def test_before_fine_tuning_erm_is_kept_where_no_mask_can_help(
    explains, accuracy, is_hopeless
):
    predicted = toy()
    predicted.resampled["a"][ERM] = accuracy
    predicted.explained["a"][explains:] = 0
    predicted.explained["b"] = torch.zeros(1000)
    verdict = judge(predicted)
    assert verdict.chosen == ERM
    assert verdict.is_final == is_hopeless
    assert scores(predicted).empty


def test_twenty_fifths_of_mistakes_are_four_wherever_they_are():
    predicted = toy(mistakes=300)
    explained = predicted.explained["a"].zero_()
    order = torch.randperm(300, generator=torch.Generator().manual_seed(2))
    explained[order[:20]] = 0.2  # in float32 their sum is less than 4
    assert not judge(predicted).is_final


@pytest.mark.parametrize(
    ("of_mask", "chosen", "decision"),
    [(0.71, "a", 'Chosen: "a"'), (0.69, ERM, "ERM is kept")],
)
def test_without_mistakes_the_model_is_taken_that_is_best_where_masks_resample(
    of_mask, chosen, decision
):
    predicted = toy(mistakes=4, a=(0, 996), b=(0, 996))
    verdict = judge(predicted)
    assert not verdict.is_final  # not all is known yet
    predicted.resampled = {
        "a": {ERM: 0.5, NULL: 0.4, "a": of_mask, "b": 0.1},
        "b": {ERM: 0.5, NULL: 0.8, "a": 0.7, "b": 0.9},
    }
    verdict = judge(predicted)
    assert verdict.chosen == chosen
    assert verdict.is_final
    assert verdict.reason.startswith(f"{decision}, by a prior: too few")


def test_four_images_that_nobody_can_learn_decide_nothing():
    predicted = toy(a=(30, 960))
    predicted.labels[-4:] = 2  # of a class that no model predicts
    assert judge(predicted).chosen == "a"


# The rule, written a second time.


def reference(held_out, mask):
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


def reference_choice(held_out):
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
    table = scores(predicted)[["score", "error", "gain"]]
    for mask in predicted.tried:
        if predicted.explained[mask].any():
            expected = reference(predicted, mask)
            np.testing.assert_allclose(table.loc[mask], expected, atol=1e-5)
    assert judge(predicted).chosen == reference_choice(predicted)


def test_the_registered_test_is_that_of_this_rule():
    assert replay.other_choices().empty


def choice_of(predicted):
    return Choice(predicted, {}, None, judge(predicted))


def test_the_reason_tells_what_is_hidden_and_what_it_costs():
    choice = choice_of(toy(a=(30, 950)))
    assert choice.reason.splitlines()[2:] == [
        '"a" hides 9% of the image, mostly top left.',
        (
            "Accuracy on images not seen in training: 96.0% (ERM), 96.0% (nothing "
            "masked), 98.0% (mask)."
        ),
        'If your classes are about this part, keep ERM: choice.take("ERM").',
    ]
    kept = choice_of(toy(a=(0, 960)))
    assert kept.reason.endswith('\nTo take this mask: choice.take("a").')
    untrained = choice_of(toy(mistakes=150, nothing=(100, 850), a=(140, 850)))
    assert "train it longer" in untrained.reason
    choice.held_out.mean_masks["a"] = torch.zeros(30, 30)
    assert '"a" hides 0% of the image.' in choice.reason
    choice.held_out.has_maps = False
    assert choice.reason.endswith("masks are by exchange alone.")


def test_a_choice_can_be_changed_by_hand():
    choice = choice_of(toy(a=(30, 960), b=(40, 960)))
    by_hand = choice.take("b")
    assert by_hand.verdict.chosen == "b"
    assert '"b" hides 9%' in by_hand.reason
    kept = choice.take(ERM)
    assert kept.is_kept
    assert kept.reason.startswith('By hand: "ERM".\n"a" hides 9%')
    with pytest.raises(ValueError, match="name is 'c'; allowed: ERM; a; b"):
        choice.take("c")


def test_the_chosen_images_are_fine_tuned_on_by_a_copy():
    def schedule(network, masked):
        network.masked = masked
        return network

    predicted = toy(a=(30, 960))
    images = {NULL: "as they are", "a": "of a"}
    choice = Choice(predicted, images, schedule, judge(predicted))
    network = nn.Linear(1, 1)
    tuned = choice.finetune(network)
    assert not tuned.training
    assert tuned.masked == choice.masked == "of a"
    assert not hasattr(network, "masked")
    kept = choice.take(ERM)
    assert kept.masked == "as they are"
    assert not hasattr(kept.finetune(network), "masked")


def test_a_small_set_is_fine_tuned_for_more_epochs():
    assert default_epochs(10_000) == 3
    assert default_epochs(1000) == 6
