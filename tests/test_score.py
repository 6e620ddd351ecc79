"""The score: each clause of the rule by hand on toys, and the rule written anew."""

import math
from unittest.mock import Mock

import numpy as np
import pytest
import torch
import trials
from scipy.stats import norm

from masktune_utils.choice import ERM, NULL, HeldOut
from masktune_utils.choice.chosen import _with_verdict
from masktune_utils.choice.score import decide, scores, sure
from masktune_utils.masking import NOTHING

MEAN_MASK = torch.zeros(30, 30)
MEAN_MASK[:9, 21:] = 1


def toy(mistakes=40, nothing=None, classes=2, **masks):
    """A thousand images of some classes, in turns; ERM is wrong on the first ones.

    By networks of a short training.

    Args:
        mistakes: their number; each mask explains all.
        nothing: how many of ERM's mistakes, and of the rest, the model gets right with
            nothing masked; by default like ERM.
        classes: their number; what is wrong is taken for the next one.
        **masks: like `nothing`, of each mask.
    """
    labels = torch.arange(1000) % classes
    erm = (0, 1000 - mistakes)
    predictions = {}
    for model, counts in {ERM: erm, NULL: nothing or erm, **masks}.items():
        of_mistakes, of_rest = counts
        is_wrong = torch.ones(1000, dtype=torch.int64)
        is_wrong[:of_mistakes] = 0
        is_wrong[mistakes:][:of_rest] = 0
        predictions[model] = (labels + is_wrong) % classes
    is_mistake = torch.arange(1000) < mistakes
    return HeldOut(
        labels=labels,
        mistake_map=torch.zeros(13, 13),
        predictions=predictions,
        explained={name: is_mistake.float() for name in masks},
        mean_masks=dict.fromkeys([NULL, *masks], MEAN_MASK),
        share=0.1,
    )


def test_a_mask_that_explains_nothing_has_no_score():
    predicted = toy(a=(40, 960))
    predicted.explained["a"].zero_()
    row = scores(predicted).loc["a"]
    assert row["score"] == 0
    assert np.isnan(row["error"])
    assert decide(predicted).chosen == ERM


@pytest.mark.parametrize(
    ("of_mask", "chosen"),
    [
        ((15, 860), "a"),
        ((13, 860), ERM),  # sure, but it gains 9 points
        ((30, 774), "a"),
        ((30, 731), ERM),  # it loses 15 % of the rest
    ],
)
def test_a_good_mask_gains_ten_points_less_what_the_rest_costs(of_mask, chosen):
    verdict = decide(toy(140, a=of_mask))
    assert verdict.chosen == chosen
    assert not verdict.is_final


def test_a_good_mask_gains_more_than_its_error():
    """A sixth of five mistakes is within it, of forty it is not."""
    few = toy(mistakes=5, a=(1, 995))
    assert decide(few).chosen == ERM
    many = toy(mistakes=40, a=(7, 960))
    assert decide(many).chosen == "a"


@pytest.mark.parametrize(
    ("lost", "of_other", "decision"),
    [
        (90, 20, 'Chosen: "a"'),
        (91, 20, 'Chosen: "b"'),
        (91, 0, "ERM is kept: the best mask brings a class below chance."),
    ],
)
def test_no_class_is_below_chance_with_a_good_mask(lost, of_other, decision):
    """Among ten, whatever it gains in the others."""
    predicted = toy(classes=10, a=(40, 960), b=(of_other, 960))
    predicted.predictions["a"][-10 * lost :: 10] = 5
    assert decide(predicted).reason.startswith(decision)


def test_kinds_that_move_count_more_and_their_mistakes_the_same():
    """Of twenty mistakes of each class, sixteen and four move."""
    predicted = toy(a=(40, 960))
    explained = predicted.explained["a"]
    explained[32:40:2] = 0
    explained[9:40:2] = 0
    of_mask = predicted.predictions["a"]
    of_mask[:16:2] = 1  # twelve are corrected
    of_mask[1:40:2] = 0
    row = scores(predicted).loc["a"]
    assert row["score"] == pytest.approx(0.8 * 12 / 20)
    counts = "corrects 12, nothing masked 0; 20 move with what it hides.\n"
    shares = "Weighted by how far each kind moves: mask 48%, nothing masked 0%.\n"
    assert counts + shares in decide(predicted).reason
    explained[32:40:2] = 0.4  # two of five swaps
    assert scores(predicted).loc["a", "moves"] == 20


@pytest.mark.parametrize(
    ("of_mask", "others", "is_clear"),
    [(35, 0, True), (33, 0, False), (33, 3, False), (29, 4, True), (27, 4, False)],
)
def test_the_search_ends_at_four_fifths_of_what_is_left_or_later_at_three(
    of_mask, others, is_clear
):
    """Of thirty; the fifth mask is the first later one."""
    nothing = (10, 960)
    weak = {f"weak {number}": nothing for number in range(others)}
    verdict = decide(toy(nothing=nothing, **weak, a=(of_mask, 960)))
    assert verdict.chosen == "a"
    assert verdict.is_final == is_clear


@pytest.mark.parametrize(("of_rest", "chosen"), [(772, "a"), (770, ERM)])
def test_a_mask_that_costs_more_than_fifteen_points_is_shown_and_not_taken(
    of_rest, chosen
):
    verdict = decide(toy(40, a=(39, of_rest)))
    assert verdict.chosen == chosen
    assert verdict.best == "a"
    if chosen == ERM:
        words = "ERM is kept: the best mask would cost 15.1 points of accuracy"
        assert verdict.reason.startswith(words)


def test_of_whole_trainings_the_error_is_corrected_for_the_number_of_masks():
    predicted = toy(10, a=(3, 990), b=(0, 990), c=(0, 990))
    row = scores(predicted).loc["a"]
    assert 1.645 < row["score"] / row["error"] < 2.128
    assert sure(predicted) == pytest.approx(1.645, abs=0.001)
    assert decide(predicted).chosen == "a"
    predicted.share = 1.0
    assert sure(predicted) == pytest.approx(2.128, abs=0.001)  # 5 % / 3
    assert decide(predicted).chosen == ERM


def test_without_a_mask_erm_is_kept():
    choice = choice_of(toy())
    assert choice.keeps_erm
    assert choice.reason == "ERM is kept: no mask hides anything."


@pytest.mark.parametrize(("later", "chosen"), [(13, "a"), (14, "b")])
def test_a_later_mask_must_gain_half_a_standard_error_more(later, chosen):
    predicted = toy(a=(12, 960), b=(later, 960))
    assert decide(predicted).chosen == chosen


def test_erm_is_kept_if_no_mask_is_good_and_the_best_is_named():
    verdict = decide(toy(12, nothing=(1, 988), a=(2, 858), b=(3, 858)))
    assert (verdict.chosen, verdict.best) == (ERM, "b")
    assert verdict.reason == (
        'ERM is kept: no mask clearly corrects its mistakes.\nThe best: "b".\nOf 12 '
        "mistakes the mask corrects 3, nothing masked 1; 12 move with what it hides.\n"
        "Its score: 16.7 points (needed: 21.5, which is 1.64 standard errors).\n"
        "On other images it loses 13.2, which leaves a gain of 3.5 (needed: 10)."
    )


def test_if_all_images_are_mistakes_there_are_no_others_to_lose():
    assert decide(toy(1000, a=(500, 0))).chosen == "a"


@pytest.mark.parametrize(
    ("of_mask", "of_rest", "chosen", "decision"),
    [
        (0.71, 996, "a", 'Chosen: "a"'),
        (0.69, 996, ERM, "ERM is kept"),
        (0.71, 986, ERM, "ERM is kept"),
    ],
)
def test_without_mistakes_the_model_is_taken_that_is_best_where_masks_resample(
    of_mask, of_rest, chosen, decision
):
    """Less what it loses on the rest."""
    predicted = toy(mistakes=4, a=(0, of_rest), b=(0, 996))
    predicted.resampled = {
        "a": {ERM: 0.5, NULL: 0.4, "a": of_mask, "b": 0.1},
        "b": {ERM: 0.5, NULL: 0.8, "a": 0.7, "b": 0.9},
    }
    verdict = decide(predicted)
    assert verdict.chosen == chosen
    assert verdict.is_final
    assert verdict.reason.startswith(f"{decision}, by a prior: too few")


def test_the_prior_takes_the_first_good_mask_and_none_that_destroys_a_class():
    predicted = toy(4, classes=10, a=(0, 996), b=(0, 996))
    predicted.resampled = {"a": {ERM: 0.5, NULL: 0.5, "a": 0.8, "b": 0.9}}
    assert decide(predicted).chosen == "a"
    predicted.predictions["a"][-910::10] = 5
    assert decide(predicted).chosen == "b"


def test_four_images_that_nobody_can_learn_decide_nothing():
    predicted = toy(a=(30, 960))
    predicted.labels[-4:] = 2  # of a class that no model predicts
    assert decide(predicted).chosen == "a"


# The rule, written a second time.


COLUMNS = ["score", "error", "gain", "nothing", "destroys"]


def reference(held_out, mask):
    """The columns of a mask, kind by kind and class by class."""
    labels = held_out.labels.numpy()
    predicted = held_out.predictions[ERM].numpy()
    erm, nothing, right = [
        held_out.is_right(model).numpy() for model in (ERM, NULL, mask)
    ]
    shares = held_out.explained[mask].numpy()
    gains = right.astype(float) - nothing
    weights = np.zeros(len(labels))
    changes = []
    destroys = False
    chance = 1 / len(np.unique(labels))
    for label in np.unique(labels):
        is_class = labels == label
        floor = min(chance, nothing[is_class].mean())
        destroys |= right[is_class].mean() < floor
        if (is_class & erm).any():
            changes.append(gains[is_class & erm].mean())
        for other in np.unique(predicted[is_class & ~erm]):
            kind = is_class & (predicted == other)
            weights[kind] = shares[kind].mean() / kind.sum()
    weights = weights / weights.sum()
    score = weights @ gains
    count = 1 / (weights @ weights)
    variance = weights @ (gains - score) ** 2
    error = math.sqrt((count * variance + 1) / (count + 1) / count)
    gain = score + min(0, np.mean(changes))
    return score, error, gain, weights @ nothing, destroys


@pytest.mark.parametrize("name", trials.names()[::3])
def test_saved_predictions_are_judged_as_by_the_second_writing(name):
    predicted, _ = trials.read(name)
    if predicted.is_mistake.sum() < 5 or not predicted.tried:
        return
    table = scores(predicted)
    good = {}
    clear = []
    count = len(predicted.tried)
    errors = 1.645 if predicted.share < 1 else norm.ppf(1 - 0.05 / count)
    is_right = predicted.is_right(NULL).double().mean()
    for mask in predicted.tried:
        if not predicted.explained[mask].any():
            continue
        expected = reference(predicted, mask)
        found = table.loc[mask, COLUMNS].astype(float)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        score, error, gain, nothing, destroys = expected
        price = is_right - predicted.is_right(mask).double().mean()
        is_harmless = price <= 0.15 and not destroys
        if score >= errors * error and gain >= 0.1 and is_harmless:
            good[mask] = (gain, gain - 0.5 * error)
            if gain >= (0.8 if count <= 4 else 0.6) * (1 - nothing):
                clear.append(mask)
    _, least = max(good.values(), default=(0, 0))
    near = [mask for mask, (gain, _) in good.items() if gain >= least]
    verdict = decide(predicted)
    assert verdict.chosen == [*near, ERM][0]
    assert verdict.is_final == bool(clear)


def choice_of(predicted):
    predicted.masked = {model: Mock(rule=model) for model in predicted.predictions}
    predicted.masked[NULL].rule = NOTHING
    return _with_verdict(predicted, None, decide(predicted))


def test_the_reason_tells_what_is_hidden_and_what_it_costs():
    choice = choice_of(toy(a=(30, 950)))
    assert choice.reason.splitlines()[4:] == [
        '"a" covers 9% of the image, mainly the top right.',
        (
            "Accuracy on images not seen in training: 96.0% (ERM after 10% of its "
            "training), 96.0% (nothing masked), 98.0% (mask)."
        ),
        'If your classes are about this part, keep ERM: choice.take("ERM").',
    ]
    kept = choice_of(toy(a=(0, 960)))
    assert kept.reason.endswith('\nTo take this mask: choice.take("a").')
    predicted = toy(mistakes=150, nothing=(51, 850), a=(140, 850))
    assert "train it longer" not in choice_of(predicted).reason  # a short training
    predicted.share = 1.0
    assert "train it longer" in choice_of(predicted).reason
    predicted.predictions[NULL] = toy(150, nothing=(49, 850)).predictions[NULL]
    assert "train it longer" not in choice_of(predicted).reason  # within five points
    predicted.mean_masks["a"] = torch.zeros(30, 30)
    predicted.has_maps = False
    reason = choice_of(predicted).reason
    assert '"a" covers 0% of the image.' in reason
    assert "96.0% (ERM)" not in reason
    assert reason.endswith("masks are by exchange alone.")


def test_a_choice_can_be_changed_by_hand():
    choice = choice_of(toy(a=(35, 960), b=(40, 960)))
    by_hand = choice.take("b")
    assert by_hand.verdict.chosen == "b"
    assert by_hand.masked == choice.held_out.masked["b"]
    assert '"b" covers 9%' in by_hand.reason
    kept = choice.take(ERM)
    assert kept.keeps_erm
    assert kept.reason.startswith('By hand: "ERM".\n"b" covers 9%')
    with pytest.raises(ValueError, match="name is 'c'; allowed: ERM; a; b"):
        choice.take("c")
