"""The choice: each clause of the rule by hand on toys."""

from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pandas as pd
import pytest
import torch

from masktune_utils import models, selection, training
from masktune_utils.held_out import ERM, NULL, HeldOut
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.selection import Choice
from masktune_utils.store import weights_sha256


def held_out(
    labels: np.ndarray,
    predictions: dict[str, np.ndarray],
    resampled: dict[str, dict[str, float]] | None = None,
    explained: int = 0,
) -> HeldOut:
    """What models predict; the candidates are `a` and `b`, of which `a` hides less.

    Args:
        labels: N.
        predictions: model → N.
        resampled: masks → model → accuracy; by default, ERM is wrong about half.
        explained: how many of the first images are.
    """
    _, _, *candidates = predictions
    of_models = dict.fromkeys(predictions, 1.0) | {ERM: 0.5}
    everywhere = dict.fromkeys(candidates, of_models)
    is_explained = np.arange(len(labels)) < explained
    return HeldOut(
        labels=pd.Series(labels),
        predictions=pd.DataFrame(predictions),
        explained=pd.DataFrame(dict.fromkeys(candidates, is_explained)),
        resampled=pd.DataFrame(resampled or everywhere).T,
        smallest_class=25,
        hidden=pd.Series({"a": 0.1, "b": 0.2})[candidates],
        place=pd.Series({"a": "top left", "b": "bottom"})[candidates],
        mistake_map=np.zeros((13, 13)),
    )


def toy(right: dict[str, tuple[int, int]], mistakes: int = 40, **options) -> HeldOut:
    """A thousand images of two classes, in turns; ERM is wrong on the first ones.

    Args:
        right: model → how many of ERM's mistakes, and of the rest, it gets right.
        mistakes: their number.
        **options: of `held_out`.
    """
    labels = np.arange(1000) % 2
    predictions = {}
    for model, (of_mistakes, of_rest) in ({ERM: (0, 1000 - mistakes)} | right).items():
        is_right = np.zeros(1000, dtype=bool)
        is_right[:of_mistakes] = True
        is_right[mistakes : mistakes + of_rest] = True
        predictions[model] = np.where(is_right, labels, 1 - labels)
    return held_out(labels, predictions, **options)


def classes(digits: str) -> np.ndarray:
    return np.array([*map(int, digits)])


def of_kinds() -> HeldOut:
    """Twenty images of three classes.

    ERM takes eight of class 0 for class 1, two for class 2, and four of class 1 for
    class 0.
    """
    predictions = {
        ERM: classes("11111111220000001122"),
        NULL: classes("11111100000021111122"),  # wrong in 6 of the first 8
        "a": classes("00000000110011111120"),
    }
    resampled = {"a": {ERM: 0.5, NULL: 0.6, "a": 0.9}}
    return held_out(classes("00000000000011111122"), predictions, resampled)


def test_the_worst_class_of_resampled_images_and_the_rest_are_environments():
    accuracy, errors = selection.environments(of_kinds())
    assert accuracy.loc["a"].to_dict() == {ERM: 0.5, NULL: 0.6, "a": 0.9}
    # of 25 images
    assert errors.loc["a"].tolist() == pytest.approx([0.1, 0.24**0.5 / 5, 0.06])
    assert accuracy.loc["rest"].to_dict() == {ERM: 1, NULL: 1, "a": 5 / 6}
    # each of 6 images counts the same
    expected = [0, 0, (5 / 6 * 1 / 6 / 6) ** 0.5]
    assert errors.loc["rest"].tolist() == pytest.approx(expected)


def test_each_kind_of_mistake_counts_the_same_whatever_its_size():
    predicted = of_kinds()
    kinds = predicted.kinds
    assert kinds["images"].to_dict() == {(0, 1): 8, (0, 2): 2, (1, 0): 4}
    assert kinds[NULL].tolist() == [2 / 8, 2 / 2, 3 / 4]
    accuracy, errors = selection.environments(predicted)
    shares = {ERM: 0, NULL: (2 / 8 + 2 / 2 + 3 / 4) / 3, "a": 2 / 3}
    assert accuracy.loc["mistakes"].to_dict() == pytest.approx(shares)
    images = 9 / (1 / 8 + 1 / 2 + 1 / 4)  # by plain counting it were 14
    expected = [(share * (1 - share) / images) ** 0.5 for share in shares.values()]
    assert errors.loc["mistakes"].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("count", [0, 4, 5, 1000])
def test_a_few_mistakes_are_no_environment_nor_is_a_rest_without_images(count):
    accuracy, errors = selection.environments(
        toy({NULL: (0, 0), "a": (0, 0)}, mistakes=count)
    )
    expected = {0: ["rest"], 4: ["rest"], 5: ["rest", "mistakes"], 1000: ["mistakes"]}
    assert accuracy.index.tolist() == ["a", *expected[count]]
    assert errors.index.equals(accuracy.index)


def test_a_distance_counts_less_what_the_best_model_loses_and_not_twice_the_rest():
    environments = ["rest", "mistakes", "mask"]
    right = {"x": [0.9, 0.2, 0.5], "y": [0.7, 0.3, 0.95]}
    accuracy = pd.DataFrame(right, environments)
    # on masked images the best loses 3 points of 98
    behind = selection.distances(accuracy, ["x", "y"], 0.98)
    assert behind.loc["rest"].tolist() == pytest.approx([0, 0.2])
    assert behind.loc["mistakes"].tolist() == pytest.approx([0.1, 0])
    # "y" is 20 points behind on the rest: these do not count again
    assert behind.loc["mask"].tolist() == pytest.approx([0.45 - 0.09, -0.09 - 0.2])
    # "x" is ahead on the rest
    behind = selection.distances(accuracy, ["y"], 0.9)
    assert behind.loc["mask"].tolist() == pytest.approx([0.45, 0])
    without = accuracy.drop("rest")
    behind = selection.distances(without, ["x", "y"], 0.98)
    assert behind.loc["mask"].tolist() == pytest.approx([0.45 - 0.09, -0.09])


@pytest.mark.parametrize(
    ("of_hides", "error", "left"),
    [
        (0.81, 0.0, "hides"),
        (0.79, 0.0, "sees"),
        (0.75, 0.074, "sees"),
        (0.75, 0.076, "hides"),
    ],
)
def test_where_masks_contradict_each_other_mistakes_decide_first(of_hides, error, left):
    """Where one mask resamples, `hides` is 35 points behind, by the other `sees` 45.

    Ten points on the mistakes decide, if they are two standard errors of the best.
    """
    right = {"hides": [of_hides, 0.6, 0.95], "sees": [0.9, 0.95, 0.5]}
    accuracy = pd.DataFrame(right, ["mistakes", "mask", "other mask"])
    errors = pd.DataFrame({"hides": 0.5, "sees": error}, accuracy.index)
    assert selection.strike_out(accuracy, errors, 0.95) == [left]


def test_a_model_that_is_struck_out_no_longer_sets_the_bar():
    """`good` is 29 points behind `shortcut`, which is 80 behind it and goes first."""
    right = {"shortcut": [0.1, 0.99], "good": [0.9, 0.7], "poor": [0.75, 0.65]}
    accuracy = pd.DataFrame(right, ["rest", "mask"])
    assert selection.strike_out(accuracy, 0 * accuracy, 0.99) == ["good"]


@pytest.mark.parametrize(("poor", "left"), [(0.801, 2), (0.799, 1)])
def test_a_model_is_struck_out_where_it_is_ten_points_behind(poor, left):
    right = {"good": [0.9, 0.9], "poor": [poor, 0.9]}
    accuracy = pd.DataFrame(right, ["mistakes", "mask"])
    assert len(selection.strike_out(accuracy, 0 * accuracy, 0.9)) == left


@pytest.mark.parametrize(
    ("a", "error", "expected"),
    [(0.02, 0.03, "a"), (0.04, 0.03, "b"), (0.04, 0.05, "a")],
)
def test_within_one_standard_error_the_candidate_that_hides_least_is_proposed(
    a, error, expected
):
    """The larger error of two environments in which the best is furthest behind."""
    behind = pd.DataFrame({"a": [a, 0.0, 0.0], "b": [0.0, 0.0, -0.1]})
    errors = pd.DataFrame({"b": [0.001, error, 0.5]})
    hidden = pd.Series({"a": 0.1, "b": 0.2})
    assert selection.propose(behind, errors, hidden) == expected


@pytest.mark.parametrize(
    ("of_mistakes", "of_rest", "of_a", "chosen"),
    [
        (37, 960, 1.0, ERM),
        (35, 960, 1.0, "a"),
        (40, 888, 1.0, ERM),
        (40, 840, 1.0, "a"),
        (40, 960, 0.925, ERM),
        (40, 960, 0.875, "a"),
    ],
)
def test_erm_is_kept_unless_nothing_masked_is_ten_points_behind_anywhere(
    of_mistakes, of_rest, of_a, chosen
):
    right = {NULL: (of_mistakes, of_rest), "a": (40, 960)}
    resampled = {"a": {ERM: 0.5, NULL: of_a, "a": 1.0}}
    verdict = selection.judge(toy(right, resampled=resampled))
    assert verdict.chosen == chosen
    assert verdict.proposed == "a"
    assert (NULL in verdict.left) == (chosen == ERM)


@pytest.mark.parametrize(("erm", "kept"), [(0.85, False), (0.87, True)])
def test_erm_is_kept_if_it_hardly_relies_on_what_is_hidden(erm, kept):
    """Its worst class is right in 96% of the images as they are."""
    resampled = {"a": {ERM: erm, NULL: 0.85, "a": 0.95}}
    predicted = toy({NULL: (2, 960), "a": (36, 960)}, resampled=resampled)
    verdict = selection.judge(predicted)
    assert verdict.left == ["a"]
    assert verdict.proposed == "a"
    assert (verdict.chosen == ERM) == kept
    words = "ERM is kept: it hardly relies on what the best mask hides."
    lines = selection.reason(predicted, verdict).split("\n")
    assert (lines[0] == words) == kept
    assert ("So it hardly relies on this part." in lines) == kept


@pytest.mark.parametrize(
    ("null", "explained", "kept"), [(5, 6, True), (4, 6, False), (4, 4, False)]
)
def test_erm_is_kept_if_hardly_more_of_the_explained_mistakes_are_corrected(
    null, explained, kept
):
    """Of few explained mistakes nothing is concluded; the mask corrects them all."""
    right = {NULL: (null, 960), "a": (36, 960)}
    predicted = toy(right, explained=explained)
    verdict = selection.judge(predicted)
    assert verdict.proposed == "a"
    assert (verdict.chosen == ERM) == kept
    words = "ERM is kept: the best mask does not clearly correct more of the mistakes "
    words += "that it explains than nothing masked.\n"
    assert selection.reason(predicted, verdict).startswith(words) == kept


def test_erm_itself_does_not_set_the_bar():
    """It has not been fine-tuned."""
    resampled = {"a": {ERM: 1.0, NULL: 0.85, "a": 0.88}}
    verdict = selection.judge(toy({NULL: (2, 960), "a": (2, 960)}, resampled=resampled))
    assert verdict.left == [NULL, "a"]
    assert verdict.chosen == ERM


def test_what_is_lost_is_counted_from_the_worst_class_of_erm_on_images_as_they_are():
    """96 and 100% of the classes: the best model loses two points, which count six."""
    labels = np.arange(1000) % 2
    erm = labels.copy()
    erm[:40:2] = 1
    resampled = {"a": {ERM: 0.9, NULL: 0.75, "a": 0.94}}
    predicted = held_out(labels, {ERM: erm, NULL: labels, "a": labels}, resampled)
    behind = selection.judge(predicted).distances
    assert behind.loc["a", NULL] == pytest.approx(0.19 - 3 * 0.02)


def test_a_candidate_that_hides_nothing_is_not_proposed():
    predicted = toy({NULL: (2, 960), "a": (36, 960), "b": (36, 960)})
    hidden = pd.Series({"a": 0.0, "b": 0.2})
    assert selection.judge(replace(predicted, hidden=hidden)).proposed == "b"


def test_where_erm_is_kept_the_candidate_is_named_that_nothing_masked_is_behind():
    """Though it is struck out for what it costs on the rest."""
    right = {NULL: (36, 960), "a": (35, 960), "b": (38, 800)}
    predicted = toy(right)
    verdict = selection.judge(predicted)
    assert verdict.left == [NULL, "a"]
    assert (verdict.chosen, verdict.proposed) == (ERM, "b")
    assert 'The mask "b" hides' in selection.reason(predicted, verdict)


@pytest.mark.parametrize(("of_rest", "kept"), [(889, False), (891, True)])
def test_erm_is_kept_if_it_is_undertrained(of_rest, kept):
    """Nothing masked gains 60 of 1,000 images, and loses 11 or 9 of the others."""
    predicted = toy({NULL: (60, of_rest), "a": (95, 890)}, mistakes=100)
    verdict = selection.judge(predicted)
    assert verdict.left == ["a"]
    assert verdict.proposed == "a"
    assert (verdict.chosen == ERM) == kept
    words = "ERM is kept, since it is undertrained: fine-tuning with nothing masked "
    words += "gains 5 points. Train it longer, and choose again.\n"
    assert selection.reason(predicted, verdict).startswith(words) == kept


def said(*arguments, **options) -> str:
    """The reason for what is judged of a toy."""
    predicted = toy(*arguments, **options)
    return selection.reason(predicted, selection.judge(predicted))


def test_the_reason_to_take_a_mask_tells_of_reliance_repair_and_cost():
    resampled = {"a": {ERM: 0.5, NULL: 0.6, "a": 0.9}}
    right = {NULL: (2, 960), "a": (36, 955)}
    assert said(right, resampled=resampled, explained=20) == (
        'Chosen: "a", since fine-tuned with nothing masked, ERM is 85 points behind '
        "the best model on ERM's mistakes; of the best masks this one hides least.\n"
        'The mask "a" hides 10% of the image, most at the top left.\n'
        "With this part taken from another image at random, ERM gets 50% of its worst "
        "class right, instead of 96%; fine-tuned with nothing masked 60%, with the "
        "mask 90%.\n"
        "So it relies on this part: is it a shortcut, or real evidence?\n"
        "Of 1,000 training images, 40 are mistakes of ERM models that have not seen "
        "them. 20 of these become right if this part comes from another image of their "
        "class: with nothing masked 2 of them are right, with the mask 20.\n"
        "Of all images that models have not seen, ERM gets 96.0% right, with nothing "
        "masked 96.2%, with the mask 99.1%.\n"
        "Look at what it hides (plotting.choice_masks): if your classes are about "
        'that, keep ERM, choice.take("ERM").'
    )


def test_the_reason_to_keep_erm_tells_which_candidate_is_closest():
    reason = said({NULL: (34, 960), "a": (20, 960), "b": (36, 960)})
    first, second, *_, last = reason.split("\n")
    assert first == (
        "ERM is kept: fine-tuned with nothing masked, ERM is 5 points behind the best "
        "model on ERM's mistakes, and no further elsewhere: too little to show that a mask "
        "helps."
    )
    assert second == 'The mask "b" hides 20% of the image, most at the bottom.'
    assert last == (
        "Look at what it hides (plotting.choice_masks): if that should not matter, "
        'you can take the mask, choice.take("b").'
    )


def test_the_reason_tells_the_distance_of_the_rule_and_on_which_images():
    """30 points, less three times the 8 that the best model loses."""
    resampled = {"a": {ERM: 0.5, NULL: 0.58, "a": 0.88}}
    reason = said({NULL: (40, 960), "a": (40, 960)}, resampled=resampled)
    words = "ERM is 6 points behind the best model "
    assert words + 'on images resampled by "a", and no further elsewhere' in reason


@pytest.mark.parametrize(("best", "is_said"), [(85, True), (87, False)])
def test_where_little_is_learnt_without_a_part_it_is_said_what_may_help(best, is_said):
    """ERM gets 96% of its worst class right as it is; 10 points less are hardly any."""
    resampled = {"a": {ERM: 0.5, NULL: best / 100, "a": best / 100}}
    reason = said({NULL: (34, 960), "a": (34, 960)}, resampled=resampled)
    assert 'should not matter, you can take the mask, choice.take("a").' in reason
    words = f"Without this part at most {best}% of the worst class are learnt: longer"
    assert (words in reason) == is_said


def test_the_reason_counts_kinds_of_mistakes_that_mostly_stay_wrong():
    words = "For {} of 2 kinds of mistakes (class, prediction), the mask leaves most "
    reason = said({NULL: (2, 960), "a": (19, 960)})  # 10 and 9 of 20 each
    assert words.format(1) in reason
    reason = said({NULL: (2, 960), "a": (17, 960)})
    assert words.format(2) in reason
    assert "leaves most" not in said({NULL: (2, 960), "a": (20, 960)})


def test_without_a_mistake_erm_is_kept_and_there_is_a_reason():
    reason = said({NULL: (0, 1000), "a": (0, 1000)}, mistakes=0)
    assert reason.startswith("ERM is kept: fine-tuned with nothing masked, ERM is 0 ")
    assert "Of 1,000 training images, 0 are mistakes" in reason


def test_few_images_are_seen_in_more_epochs():
    counts = (100, 4000, 12_000, 24_000, 60_000)
    assert [selection.default_epochs(count) for count in counts] == [6, 6, 2, 1, 1]


@pytest.fixture(scope="module")
def choice(splits) -> Choice:
    """Of digits, which are masked as a whole; the candidate is chosen."""
    train = splits.train
    masks = torch.zeros(200, 28, 28)
    nothing = MaskedDataset(train, masks, seed=3)
    everything = MaskedDataset(train, masks + 1, seed=3)
    predicted = toy({NULL: (2, 960), "a": (36, 955)})
    return Choice(
        held_out=predicted,
        candidates={NULL: nothing, "a": everything},
        schedule=lambda network, masked: selection.fine_tune(network, masked, 1),
        verdict=selection.judge(predicted),
    )


def test_a_choice_masks_the_images_and_fine_tunes_a_copy_by_our_schedule(choice):
    assert not choice.is_kept
    assert choice.masked is choice.candidates["a"]
    tuned = choice.finetune(models.new_model(1))
    expected = models.new_model(1)
    options = {"batch_size": 32, "lr": 0.02, "schedule": "linear", "seed": 3}
    training.train(expected, choice.masked, epochs=1, **options)
    sha256 = weights_sha256(expected.state_dict())
    assert weights_sha256(tuned.state_dict()) == sha256
    assert choice.reason == selection.reason(choice.held_out, choice.verdict)


def test_where_erm_is_kept_nothing_is_masked_and_nothing_fine_tuned(choice):
    choice = choice.take(ERM)
    assert choice.is_kept
    assert choice.masked is choice.candidates[NULL]
    network = models.new_model(1)
    copy = choice.finetune(network)
    assert copy is not network
    assert torch.equal(copy.backbone[0].weight, network.backbone[0].weight)


def test_a_person_may_decide_otherwise(choice):
    kept = choice.take(ERM)
    assert kept.reason.startswith('By hand: "ERM", instead of "a".\n')
    assert kept.take("a").reason == choice.reason
    assert kept.take("a").masked is choice.candidates["a"]
    with pytest.raises(ValueError, match=r"^name is 'b'; allowed: ERM; a\.$"):
        choice.take("b")


def test_the_table_of_a_choice_has_its_models_in_percent(choice):
    table = choice.table
    assert table.index.tolist() == [ERM, NULL, "a"]
    rest = 100 * 955 / 960
    percent = {"mistakes": 90, "rest": rest, "resampled": 100, "behind": 0}
    of_a = percent | {"hidden": 10, "chosen": True}
    assert table.loc["a"].to_dict() == pytest.approx(of_a)
    assert table.loc[NULL, "behind"] == pytest.approx(85)
    assert np.isnan(table.loc[NULL, "hidden"])
    assert choice.take(ERM).table["chosen"].tolist() == [True, False, False]


def test_to_choose_is_to_collect_and_to_judge(splits, monkeypatch):
    """With our schedule and our candidates, unless told."""
    predicted = toy({NULL: (2, 960), "a": (36, 955)})
    collect = Mock(return_value=(predicted, {"a": "masked"}))
    monkeypatch.setattr(selection, "collect", collect)
    train = splits.train
    choice = selection.choose(train, "fit", seed=3, jobs=2, explain="explain")
    schedule = choice.schedule
    assert schedule.func is selection.fine_tune
    assert schedule.keywords == {"epochs": 6}
    candidates = (*selection.CANDIDATES, selection.BY_EXCHANGE)
    collect.assert_called_with(
        train, "fit", schedule, candidates, 2, "explain", 3, None
    )
    assert choice.held_out is predicted
    assert choice.masked == "masked"
    choice = selection.choose(train, "fit", "finetune", [Rule()])
    assert choice.schedule == "finetune"
    assert collect.call_args.args[2:4] == ("finetune", [Rule()])
