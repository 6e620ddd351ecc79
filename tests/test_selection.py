"""The choice: by hand on toys, and step by step on digits."""

import copy
import dataclasses

import pandas as pd
import pytest
import torch

from masktune_utils import (
    data,
    metrics,
    models,
    selection,
    training,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.saliency import saliency_maps
from masktune_utils.selection import ERM, NULL, HeldOut

RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)


def toy(
    right: dict[str, tuple[int, int]],
    resampled: dict[str, dict[str, float]] | None = None,
    mistakes: int = 40,
    sure: int = 40,
) -> HeldOut:
    """A thousand images of two classes, in turns; ERM is wrong on the first ones.

    The worst class of ERM has 2% of mistakes, if there are 20.

    Args:
        right: model → how many of ERM's mistakes, and of the rest, it gets right.
        resampled: masks → model → accuracy; by default, no model is ever wrong.
        mistakes: their number.
        sure: of how many of them ERM is sure.
    """
    labels = torch.arange(1000) % 2
    predictions = {}
    for model, (of_mistakes, of_rest) in ({ERM: (0, 1000 - mistakes)} | right).items():
        is_right = torch.zeros(1000, dtype=torch.bool)
        is_right[:of_mistakes] = True
        is_right[mistakes : mistakes + of_rest] = True
        predictions[model] = torch.where(is_right, labels, 1 - labels)
    probability = torch.full((1000,), 0.99)
    probability[sure:mistakes] = 0.9
    predicted = torch.nn.functional.one_hot(predictions[ERM]).bool()
    other = 1 - probability[:, None]
    probabilities = torch.where(predicted, probability[:, None], other)
    rules = [model for model in right if model != NULL]
    everywhere = {rule: dict.fromkeys(predictions, 1.0) for rule in rules}
    return HeldOut(
        labels=labels,
        probabilities=probabilities,
        predictions=predictions,
        resampled=pd.DataFrame(resampled or everywhere).T,
        resampled_images=1000,
        hidden={"a": 0.1, "b": 0.2},
    )


def test_the_environments_by_hand():
    right = {NULL: (5, 950), "a": (30, 900), "b": (40, 480)}
    resampled = {"a": {ERM: 0.5, NULL: 0.6, "a": 0.9, "b": 0.8}}
    accuracy, counts = selection.environments(toy(right, resampled))
    assert accuracy.loc["mistakes"].to_dict() == {
        ERM: 0,
        NULL: 5 / 40,
        "a": 30 / 40,
        "b": 1,
    }
    assert accuracy.loc["rest"].to_dict() == {
        ERM: 1,
        NULL: 950 / 960,
        "a": 900 / 960,
        "b": 480 / 960,
    }
    assert accuracy.loc["a"].to_dict() == resampled["a"]
    assert counts.to_dict() == {"mistakes": 40, "rest": 960, "a": 500}


def test_without_a_mistake_there_is_no_such_environment():
    accuracy, _ = selection.environments(toy({"a": (0, 990)}, mistakes=0, sure=0))
    assert [*accuracy.index] == ["a", "rest"]


def test_a_distance_counts_less_what_even_the_best_model_loses():
    accuracy = pd.DataFrame(
        {
            "rest": {"a": 0.9, "b": 0.7},
            "mistakes": {"a": 0.2, "b": 0.3},
            "mask": {"a": 0.95, "b": 0.5},  # the best loses 3 points of 98
            "other mask": {"a": 0.4, "b": 0.99},
        }
    ).T
    behind = selection.distances(accuracy, ["a", "b"], before=0.98)
    assert behind.loc["rest"].tolist() == pytest.approx([0, 0.2])
    assert behind.loc["mistakes"].tolist() == pytest.approx([0.1, 0])
    assert behind.loc["mask"].tolist() == pytest.approx([-0.09, 0.45 - 0.09])
    assert behind.loc["other mask"].tolist() == pytest.approx([0.59, 0])
    behind = selection.distances(accuracy, ["a"], before=0.98)
    assert behind.loc["mistakes"].tolist() == pytest.approx([0, -0.1])


def test_a_model_that_is_struck_out_no_longer_sets_the_bar():
    accuracy = pd.DataFrame(
        {
            "mistakes": {"shortcut": 0.1, "good": 0.9, "poor": 0.75},
            "mask": {"shortcut": 0.99, "good": 0.7, "poor": 0.65},
        }
    ).T
    behind = selection.distances(accuracy, [*accuracy], before=0.99)
    assert behind["good"].max() > selection.BEHIND
    assert selection.strike_out(accuracy, before=0.99) == ["good"]


@pytest.mark.parametrize(("poor", "left"), [(0.801, 2), (0.799, 1)])
def test_a_model_is_struck_out_where_it_is_ten_points_behind(poor, left):
    accuracy = pd.DataFrame({"mistakes": {"good": 0.9, "poor": poor}}).T
    assert len(selection.strike_out(accuracy, before=0.99)) == left


@pytest.mark.parametrize(
    ("a", "error", "expected"),
    [(0.02, 0.03, "a"), (0.04, 0.03, "b"), (0.04, 0.05, "a")],
)
def test_within_one_standard_error_the_candidate_that_hides_least_is_proposed(
    a, error, expected
):
    """The larger error of two environments in which the best is furthest behind."""
    behind = pd.DataFrame(
        {
            "rest": {"a": a, "b": 0.0},
            "mistakes": {"a": 0.0, "b": 0.0},
            "mask": {"a": 0.0, "b": -0.1},
        }
    ).T
    errors = pd.DataFrame(
        {"rest": {"b": 0.001}, "mistakes": {"b": error}, "mask": {"b": 0.5}}
    ).T
    assert selection.propose(behind, errors, {"a": 0.1, "b": 0.2}) == expected


MISTAKES = "40 of 1,000 training images are predicted wrongly by ERM models"
TAKEN = "ERM relies on what is hidden, so it is taken."
NOT_SHOWN = "that does not show that ERM relies on what is hidden, so it is kept."


def judge(*arguments, **options) -> selection.Verdict:
    return selection.judge(toy(*arguments, **options))


def test_a_candidate_is_taken_if_most_mistakes_that_erm_is_sure_of_are_right():
    verdict = judge({NULL: (2, 960), "a": (36, 955)})
    assert verdict.chosen == "a"
    assert verdict.reason == (
        f"{MISTAKES} that have not seen them. 2 of 3 models fall 10 points or more "
        "behind and are struck out. Of the candidates that then fall least behind, "
        "a hides least. ERM is sure of 40 of its mistakes. 36 of these are right "
        "now (95% interval 77–96%), and 2 with nothing masked, so it is taken."
    )


def test_erm_is_kept_if_most_mistakes_that_it_is_sure_of_stay_wrong():
    verdict = judge(
        {NULL: (2, 960), "a": (9, 955)}, {"a": {ERM: 0.1, NULL: 0.1, "a": 1}}
    )
    assert verdict.chosen == ERM
    assert verdict.reason.endswith(
        "9 of these are right now (95% interval 12–38%), and 2 with nothing masked: "
        "most stay wrong, and ERM is kept."
    )


def test_mistakes_that_are_right_with_nothing_masked_prove_nothing():
    """Then it only takes more training."""
    right = {NULL: (37, 960), "a": (40, 960)}
    verdict = judge(right)
    assert verdict.chosen == ERM
    longer = "With nothing masked, the same fine-tuning gets 92% of these right: train"
    assert longer in verdict.reason
    assert verdict.reason.endswith(NOT_SHOWN)
    assert judge(right | {NULL: (31, 960)}).chosen == "a"  # 91 to 100%, over 78%


@pytest.mark.parametrize(("sure", "expected"), [(9, ERM), (10, "a")])
def test_nine_mistakes_that_erm_is_sure_of_do_not_speak(sure, expected):
    assert judge({NULL: (0, 960), "a": (40, 960)}, sure=sure).chosen == expected


@pytest.mark.parametrize(
    ("erm", "null", "expected", "reason"),
    [
        (0.89, 0.89, "a", TAKEN),
        (0.91, 0.89, ERM, NOT_SHOWN),
        (0.89, 0.91, ERM, NOT_SHOWN),
    ],
)
def test_else_erm_and_nothing_masked_must_both_fall_behind_on_resampled_images(
    erm, null, expected, reason
):
    resampled = {"a": {ERM: erm, NULL: null, "a": 1.0}}
    right = {NULL: (0, 960), "a": (30, 960)}
    verdict = judge(right, resampled, sure=5)
    assert verdict.chosen == expected
    assert verdict.reason.endswith(reason)
    behind = f"is up to {100 * (1 - erm):.1f} points behind, and with nothing masked"
    assert f"{behind} {100 * (1 - null):.1f}: " in verdict.reason


def test_what_only_erm_loses_to_hard_images_does_not_count():
    """Masks that hide the evidence, too: even the best model loses 10 points."""
    resampled = {"a": {ERM: 0.6, NULL: 0.6, "a": 0.88}}
    assert judge({NULL: (0, 960), "a": (30, 960)}, resampled, sure=5).chosen == ERM


@pytest.mark.parametrize(("a", "expected"), [(35, "b"), (37, "a")])
def test_of_those_that_fall_least_behind_the_one_that_hides_less_is_taken(a, expected):
    """The standard error of 38 of 40 mistakes is 3.4 points; a is 7.5 or 2.5 behind."""
    right = {NULL: (2, 960), "a": (a, 960), "b": (38, 960)}
    assert judge(right).chosen == expected


def test_erm_is_kept_if_all_candidates_are_struck_out():
    verdict = judge({NULL: (40, 960), "a": (0, 960), "b": (40, 700)})
    assert verdict.chosen == ERM
    assert verdict.reason.endswith("All candidates fall far behind: ERM is kept.")


def test_the_candidates_are_resampled_by_masks_of_their_own_and_by_shared_ones():
    assert [f"{rule}" for rule in selection.CANDIDATES] == [
        "mean_std 4 dilated by 3, resampled, 2 rounds",
        "mean_std 3 dilated by 4, resampled, 2 rounds",
        "mean_std 2 dilated by 2, resampled",
        "mean_std 1 dilated by 1, shared, resampled, 2 rounds",
        "mean_std 2 dilated by 2, shared, resampled, 5 rounds",
    ]


def test_few_images_are_seen_in_more_epochs():
    epochs = {}
    for count in (100, 4000, 12_000, 24_000, 60_000):
        schedule = selection.default_schedule(count, is_coarse=False)
        assert schedule["batch_size"] == 32
        epochs[count] = schedule["epochs"]
    assert epochs == {100: 6, 4000: 6, 12_000: 2, 24_000: 1, 60_000: 1}


def test_with_coarse_maps_fewer_images_are_seen_at_a_time():
    schedule = selection.default_schedule(3000, is_coarse=True)
    assert schedule == {"batch_size": 16, "epochs": 4}  # 750 steps


@pytest.fixture(scope="module")
def train(splits) -> Split:
    """Two hundred digits, a fifth of which conflict with the square."""
    return splits.train


def fit(fold: Split) -> torch.nn.Module:
    network = models.new_model(0)
    training.train(network, fold, epochs=4, batch_size=20)
    return network


def networks_of_fold(
    fold: Split, seed: int
) -> tuple[dict[str, torch.nn.Module], dict[str, torch.Tensor]]:
    """The models of a fold, and the masks of its images, made one by one."""
    base = fit(fold)
    null = copy.deepcopy(base)
    # on the images as they are
    steps = {"epochs": 2, "batch_size": 32, "lr": 0.02, "schedule": "linear"}
    training.train(null, fold, seed=seed, **steps)
    networks = {ERM: base, NULL: null}
    masks = {}
    for rule in RULES:
        maps = saliency_maps(base, fold.images, fold.labels)
        masked = None
        for rounds in range(1, rule.rounds + 1):
            masked = rule.mask(fold, maps, seed, masked)
            tuned = copy.deepcopy(base)
            training.train(tuned, masked, seed=seed, **steps)
            name = str(dataclasses.replace(rule, rounds=rounds))
            networks[name] = tuned
            masks[name] = masked.own_masks
            maps = saliency_maps(tuned, masked.images, fold.labels)
    return networks, masks


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_what_is_judged_equals_what_is_predicted_step_by_step(train, monkeypatch):
    monkeypatch.setattr(selection, "CANDIDATES", RULES)
    monkeypatch.setattr(selection, "MOST_EPOCHS", 2)
    monkeypatch.setattr(selection, "SAMPLE", 80)
    kept = []
    judge = selection.judge
    monkeypatch.setattr(
        selection, "judge", lambda held_out: kept.append(held_out) or judge(held_out)
    )
    choice = selection.choose(train, fit, seed=3)
    (held_out,) = kept
    index = data.folds(train.labels, 3)
    folds = [train[of_fold] for of_fold in index]
    networks, masks = zip(*(networks_of_fold(fold, 3) for fold in folds), strict=True)
    assert torch.equal(held_out.labels, torch.cat([fold.labels for fold in folds]))
    for name, predictions in held_out.predictions.items():
        logits = [metrics.predict(networks[1 - k][name], folds[k]) for k in (0, 1)]
        logits = torch.cat(logits)
        assert torch.equal(predictions, logits.argmax(1))
        if name == ERM:
            torch.testing.assert_close(held_out.probabilities, logits.softmax(1))
            is_mistake = predictions != held_out.labels
    assert torch.equal(choice.is_mistake[torch.cat(index)], is_mistake)
    sample = torch.randperm(100, generator=torch.Generator().manual_seed(3))[:80]
    assert held_out.resampled_images == 160
    for mask, row in held_out.resampled.iterrows():
        of_folds = torch.cat([of_fold[mask] for of_fold in masks])
        assert held_out.hidden[mask] == of_folds.float().mean().item()
        for name, share in row.items():
            logits = []
            labels = []
            for k in (0, 1):
                images = folds[k][sample]
                masked = MaskedDataset(images, masks[k][mask][sample], "resample", 3)
                logits.append(metrics.predict(networks[1 - k][name], masked))
                labels.append(images.labels)
            worst = metrics.worst_class(torch.cat(logits), torch.cat(labels))
            assert share == worst
    assert choice.reason == judge(held_out).reason
    if not choice.is_kept:
        of_folds = [of_fold[choice.verdict.chosen] for of_fold in masks]
        assert torch.equal(choice.masks[torch.cat(index)], torch.cat(of_folds))


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_a_round_that_hides_nothing_more_is_no_candidate(train):
    weak = Rule(param=28.0, fill="resample", rounds=3)  # hides nothing
    choice = selection.choose(train, fit, lambda network, _: network, [weak])
    assert [*choice.verdict.accuracy.columns] == [ERM, NULL, str(weak)[:-10]]


def test_the_chosen_masks_and_the_schedule_are_handed_on(train, monkeypatch):
    """Whatever the verdict."""
    tuned = []

    def finetune(network, masked):
        tuned.append(masked)
        return network

    rule = Rule("threshold", 0.5, "nearest", fill="resample")
    monkeypatch.setattr(selection, "judge", lambda _: verdict(str(rule)))
    choice = selection.choose(train, fit, finetune, [rule])
    assert len(tuned) == 4  # of each fold: nothing masked, and the rule
    assert not tuned[0].own_masks.any()
    index = torch.cat(data.folds(train.labels, 0))
    masks = torch.cat([tuned[2].own_masks, tuned[3].own_masks])
    assert torch.equal(choice.masks[index], masks)
    assert choice.masked.fill == "resample"
    network = models.new_model(1)
    again = choice.finetune(network)
    assert again is not network
    assert tuned[-1] is choice.masked
    monkeypatch.setattr(selection, "judge", lambda _: verdict(ERM))
    kept = selection.choose(train, fit, finetune, [rule])
    assert not kept.masks.any()
    tuned.clear()
    kept.finetune(network)
    assert not tuned


def verdict(chosen: str) -> selection.Verdict:
    return selection.Verdict(chosen, "", pd.DataFrame(), pd.DataFrame(), [])


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_what_fit_and_finetune_return_is_checked_and_one_class_is_refused(train):
    network = models.new_model(0)
    with pytest.raises(ValueError, match="fit returned the same network twice"):
        selection.choose(train, lambda _: network)
    with pytest.raises(ValueError, match="fit returned the same network twice"):
        selection.choose(train, lambda _: torch.nn.Sequential(network))
    with pytest.raises(TypeError, match="fit returned None; allowed: the trained"):
        selection.choose(train, lambda _: None)
    with pytest.raises(TypeError, match="finetune returned None; allowed"):
        selection.choose(train, fit, lambda *_: None)
    with pytest.raises(ValueError, match=r"classes have \[100\] images; allowed"):
        selection.choose(train[train.labels == 1], fit)
