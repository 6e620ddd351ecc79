"""The choice: by hand on toys, and the models that it is made from."""

import copy
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY

from masktune_utils import (
    data,
    datasets,
    experiment,
    metrics,
    models,
    results,
    selection,
    store,
    training,
)
from masktune_utils.data import Split
from masktune_utils.experiment import Trained
from masktune_utils.masking import MaskedDataset, Rule
from masktune_utils.saliency import saliency_maps
from masktune_utils.selection import ERM, NULL, HeldOut
from masktune_utils.settings import Settings

SMALL = TINY | {"limit": 400, "epochs": 4}
RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)
# Number of images → epochs of fine-tuning, of 32 images a step.
EPOCHS = {100: 6, 4000: 6, 12_000: 2, 24_000: 1, 60_000: 1}


def toy(
    right: dict[str, tuple[int, int]],
    resampled: dict[str, dict[str, float]] | None = None,
    mistakes: int = 40,
    sure: int = 40,
) -> HeldOut:
    """A thousand images of two classes, in turns; ERM is wrong on the first ones.

    The worst class of ERM has 2 % of mistakes, if there are 20.

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
        "now (95 % interval 77–96 %), and 2 with nothing masked, so it is taken."
    )


def test_erm_is_kept_if_most_mistakes_that_it_is_sure_of_stay_wrong():
    verdict = judge(
        {NULL: (2, 960), "a": (9, 955)}, {"a": {ERM: 0.1, NULL: 0.1, "a": 1}}
    )
    assert verdict.chosen == ERM
    assert verdict.reason.endswith(
        "9 of these are right now (95 % interval 12–38 %), and 2 with nothing masked: "
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
    assert judge(right | {NULL: (31, 960)}).chosen == "a"  # 91 to 100 %, over 78 %


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


@pytest.fixture
def small_rules(monkeypatch) -> None:
    """Three candidates, which are quick to train."""
    monkeypatch.setattr(selection, "CANDIDATES", RULES)
    monkeypatch.setattr(selection, "MOST_EPOCHS", 2)


with_small_rules = pytest.mark.usefixtures("small_rules")


def with_base(directory: Path, **values) -> tuple[Settings, Split, Trained]:
    """Settings, training images, and a base model."""
    settings = Settings(**(SMALL | values), directory=str(directory))
    train = datasets.load(settings).train
    return settings, train, experiment.base_model(settings, train)


def names_of(candidates: list[Settings]) -> list[str]:
    return [candidate.configuration for candidate in candidates]


def test_the_candidates_are_resampled_by_masks_of_their_own_and_by_shared_ones():
    settings = Settings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    candidates = experiment.candidates(settings, 4000)
    assert tuple(candidate.rule for candidate in candidates) == selection.CANDIDATES
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
        candidates = experiment.candidates(settings, count)
        epochs[count] = candidates[0].finetune_epochs
    assert epochs == EPOCHS


def test_the_candidates_for_digits_are_those_of_the_published_choices():
    candidates = experiment.candidates(Settings(dataset="mnist"), 60_000)
    assert [f"{candidate.rule}" for candidate in candidates] == [
        "mean_std 4 dilated by 3, resampled, 2 rounds",
        "mean_std 3 dilated by 4, resampled, 2 rounds",
        "mean_std 2 dilated by 2, resampled",
        "mean_std 1 dilated by 1, shared, resampled, 2 rounds",
        "mean_std 2 dilated by 2, shared, resampled, 5 rounds",
    ]
    for settings in candidates:
        assert settings.finetune_lr == 0.02
        assert settings.finetune_batch_size == 32


@pytest.mark.parametrize(("size", "batch_size"), [(96, 16), (256, 32)])
def test_the_candidates_for_coarse_maps_are_coarser_and_see_fewer_at_a_time(
    size, batch_size, tmp_path
):
    folders = {"train_folder": str(tmp_path), "test_folder": str(tmp_path)}
    settings = Settings(dataset="folder", model="resnet18", image_size=size, **folders)
    candidates = experiment.candidates(settings, 3000)
    rules = tuple(candidate.rule for candidate in candidates)
    is_coarse = size == 96  # 3×3 cells
    expected = selection.COARSE_CANDIDATES if is_coarse else selection.CANDIDATES
    assert rules == expected
    for settings in candidates:
        assert settings.finetune_batch_size == batch_size
        assert settings.finetune_epochs == (4 if is_coarse else 6)  # 750 steps


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
@with_small_rules
def test_what_is_judged_equals_what_is_predicted_step_by_step(monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 150)
    kept = []
    judge = selection.judge
    monkeypatch.setattr(
        selection, "judge", lambda held_out: kept.append(held_out) or judge(held_out)
    )
    train = datasets.load(Settings(**SMALL, conflicting_share=0.1, seed=3)).train
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
    sample = torch.randperm(200, generator=torch.Generator().manual_seed(3))[:150]
    assert held_out.resampled_images == 300
    for mask, row in held_out.resampled.iterrows():
        shares = [of_fold[mask].float().mean().item() for of_fold in masks]
        assert held_out.hidden[mask] == sum(shares) / 2
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
def test_a_round_that_hides_nothing_more_is_no_candidate():
    train = datasets.load(Settings(**SMALL)).train
    weak = Rule(param=28.0, fill="resample", rounds=3)  # hides nothing
    choice = selection.choose(train, fit, lambda network, _: network, [weak])
    assert [*choice.verdict.accuracy.columns] == [ERM, NULL, str(weak)[:-10]]


def test_the_chosen_masks_and_the_schedule_are_handed_on(monkeypatch):
    """Whatever the verdict."""
    train = datasets.load(Settings(**SMALL)).train
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


def test_what_fit_and_finetune_return_is_checked_and_one_class_is_refused():
    train = datasets.load(Settings(**SMALL)).train
    network = models.new_model(0)
    with pytest.raises(ValueError, match="fit returned the same network twice"):
        selection.choose(train, lambda _: network)
    with pytest.raises(TypeError, match="fit returned None; allowed: the trained"):
        selection.choose(train, lambda _: None)
    with pytest.raises(TypeError, match="finetune returned None; allowed"):
        selection.choose(train, fit, lambda *_: None)
    with pytest.raises(ValueError, match=r"classes have \[200\] images; allowed"):
        selection.choose(train[train.labels == 1], fit)


@with_small_rules
def test_the_choice_is_saved_as_the_verdict_says(tmp_path):
    settings, train, base = with_base(tmp_path, conflicting_share=0.1)
    candidates = experiment.candidates(settings, len(train))
    choice = experiment.choose(candidates, base, train)
    saved = experiment.Saved(candidates[0])
    core = selection.choose(train, saved.fit, saved.finetune, RULES)
    assert choice["chosen"] == core.verdict.chosen
    assert choice["reason"] == core.reason
    assert choice["images"] == 400
    assert choice["mistakes"] == core.is_mistake.sum() > 0
    assert choice["candidates"] == names_of(candidates)
    pd.testing.assert_frame_equal(
        pd.DataFrame(choice["accuracy"]).T, core.verdict.accuracy, check_names=False
    )
    path = settings.folder("results") / "chosen.json"
    assert json.loads(path.read_text()) == choice


def count_calls(monkeypatch, module: object, name: str) -> list:
    calls = []
    function = getattr(module, name)

    def counted(*arguments, **options):
        calls.append(arguments)
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_rounds_end_when_they_hide_nothing_more(settings, splits, monkeypatch):
    base = experiment.base_model(settings, splits.train)
    trained = count_calls(monkeypatch, experiment.training, "train")
    weak = settings.replace(method="mean_std", param=28.0, rounds=4)
    tuned = experiment.masktune(weak, base, splits.train)
    assert len(trained) == 2  # the first round, and the last by its own name
    assert tuned.configuration == weak.configuration
    first = settings.checkpoint_path(weak.replace(rounds=1).configuration)
    assert store.load_checkpoint(first).sha256 == tuned.sha256
    assert not settings.checkpoint_path(weak.replace(rounds=2).configuration).exists()


@with_small_rules
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_the_masks_of_a_choice_are_handed_over_and_refused_if_they_are_damaged(
    tmp_path, monkeypatch
):
    settings, train, base = with_base(tmp_path)
    candidates = experiment.candidates(settings, len(train))
    name = "mean_std 4 dilated by 3, resampled, 2 rounds"
    monkeypatch.setattr(selection, "judge", lambda _: verdict(name))
    choice = experiment.choose(candidates, base, train)
    chosen = experiment.chosen_settings(choice, candidates)
    assert chosen == candidates[0]
    core = selection.choose(train, fit, candidates=RULES)
    saved = experiment.handed_over(chosen, base, train)
    assert saved.own_masks.shape == core.masks.shape
    assert saved.fill == "resample"
    tuned = experiment.chosen_model(choice, candidates, base, train)
    network = copy.deepcopy(base.model)
    training.train(network, saved, **chosen.finetuning)
    assert tuned.sha256 == store.weights_sha256(network.state_dict())
    (path,) = settings.folder("checkpoints").glob("CNN_masks_*rounds=2*")
    assert path.stat().st_size < 400 * 784 / 8 + 2000
    other = dataclasses.replace(base, sha256="of another base model")
    with pytest.raises(ValueError, match=r"has no masks \(they are of another base"):
        experiment.handed_over(chosen, other, train)
    for content in (b"damaged", path.read_bytes()[:200]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="Choose again: masktune choose --force"):
            experiment.handed_over(chosen, base, train)
    path.unlink()
    with pytest.raises(ValueError, match=r"has no masks .*No such file"):
        experiment.handed_over(chosen, base, train)
    experiment.choose(candidates, base, train, retrain=True)
    again = experiment.handed_over(chosen, base, train)
    assert torch.equal(again.own_masks, saved.own_masks)


@with_small_rules
def test_the_chosen_model_is_the_fine_tuning_that_the_choice_names(tmp_path):
    settings, train, base = with_base(tmp_path)
    candidates = experiment.candidates(settings, len(train))
    one_round = candidates[0].replace(rounds=1)
    choice = {"configuration": one_round.configuration}
    masks = torch.zeros(400, 28, 28, dtype=torch.bool).numpy()
    path = experiment._masks_path(one_round)
    np.savez(path, masks=masks, base_sha256=base.sha256)
    model = experiment.chosen_model(choice, candidates, base, train)
    assert model.configuration == choice["configuration"]
    assert model.settings == one_round
    assert experiment.chosen_settings(choice, candidates) == one_round


def test_where_erm_is_kept_the_chosen_model_is_the_base_model(settings, splits):
    kept = {"configuration": "base"}
    assert experiment.chosen_settings(kept, [settings]) is None
    base = experiment.base_model(settings, splits.train)
    assert experiment.chosen_model(kept, [settings], base, splits.train) is base


def test_the_chosen_model_is_loaded_unless_it_is_trained_again(settings, splits):
    base = experiment.base_model(settings, splits.train)
    arguments = ({"configuration": "top_k_0.1"}, [settings], base, splits.train)
    assert experiment.chosen_model(*arguments).seconds is None  # trained in its round
    path = settings.checkpoint_path("top_k_0.1")
    written = path.stat().st_mtime_ns
    experiment.chosen_model(*arguments)
    assert path.stat().st_mtime_ns == written
    experiment.chosen_model(*arguments, retrain=True)
    assert path.stat().st_mtime_ns > written


@with_small_rules
def test_neither_groups_nor_the_shortcut_are_known_to_the_choice(tmp_path):
    settings, train, base = with_base(tmp_path / "as they are", conflicting_share=0.1)
    candidates = experiment.candidates(settings, len(train))
    expected = experiment.choose(candidates, base, train)
    settings, train, base = with_base(tmp_path / "disguised", conflicting_share=0.1)
    disguised = dataclasses.replace(
        train,
        shortcut=torch.rand(len(train), 28, 28) < 0.5,
        groups=torch.randint(10, (len(train),)),
    )
    candidates = experiment.candidates(settings, len(train))
    assert experiment.choose(candidates, base, disguised) == expected


@with_small_rules
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_without_a_shortcut_erm_is_kept(tmp_path):
    settings, train, base = with_base(tmp_path, shortcut="none", limit=1000)
    experiment.record(base, datasets.load(settings))
    candidates = experiment.candidates(settings, len(train))
    choice = experiment.choose(candidates, base, train)
    assert choice["configuration"] == "base"
    assert choice["mistakes"] > 0
    table = results.collect(str(tmp_path))
    assert table["chosen"].tolist() == [True]


@with_small_rules
def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(
    tmp_path, monkeypatch
):
    settings, train, base = with_base(tmp_path)
    candidates = experiment.candidates(settings, len(train))
    made = count_calls(monkeypatch, selection, "choose")
    first = experiment.choose(candidates, base, train)
    assert experiment.choose(candidates, base, train) == first
    assert len(made) == 1
    of_one = experiment.choose(candidates[:1], base, train)
    assert of_one["candidates"] == names_of(candidates[:1])
    experiment.choose(candidates[:1], base, train)
    assert len(made) == 2
    path = settings.folder("results") / "chosen.json"
    path.write_text(json.dumps(of_one | {"base_sha256": "of another base model"}))
    experiment.choose(candidates[:1], base, train, jobs=2)
    assert len(made) == 3


def test_candidates_that_differ_in_more_than_their_masks_are_refused(settings, splits):
    base = experiment.base_model(settings, splits.train)
    candidates = [settings, settings.replace(finetune_lr=0.5)]
    with pytest.raises(ValueError, match="several schedules; allowed: only method, "):
        experiment.choose(candidates, base, splits.train)


def test_weights_that_may_have_seen_all_images_are_refused(settings, splits, tmp_path):
    base = experiment.base_model(settings, splits.train)
    path = tmp_path / "mine.pth"
    torch.save(base.model.state_dict(), path)
    candidate = settings.replace(weights=str(path), cross_fit=True)
    with pytest.raises(ValueError, match="allowed: with public_weights True"):
        experiment.choose([candidate], base, splits.train)
    public = candidate.replace(public_weights=True)
    assert experiment.choose([public], base, splits.train)["images"] == 200


CHOOSE = """
from masktune_utils import datasets, experiment, selection
from masktune_utils.masking import Rule
from masktune_utils.settings import Settings
selection.CANDIDATES = {rules}
selection.MOST_EPOCHS = 2
settings = Settings(**{values})
train = datasets.load(settings).train
base = experiment.base_model(settings, train)
experiment.choose(experiment.candidates(settings, 400), base, train)
"""


@with_small_rules
def test_a_choice_that_is_killed_goes_on(tmp_path):
    settings, train, base = with_base(tmp_path / "undisturbed")
    expected = experiment.choose(experiment.candidates(settings, 400), base, train)
    killed = tmp_path / "killed"
    settings, train, base = with_base(killed)
    code = CHOOSE.format(rules=RULES, values=dict(settings))
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    while not [*killed.glob("checkpoints/*half=0*/seed0/*finetuned*rounds=2*.pth")]:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (settings.folder("results") / "chosen.json").exists()
    before = times_of(killed, "CNN_checkpoint_*")
    choice = experiment.choose(experiment.candidates(settings, 400), base, train)
    assert choice == expected
    after = times_of(killed, "CNN_checkpoint_*")
    assert after.items() > before.items()


def times_of(directory: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob(pattern)}


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_one_candidate_is_enough_and_to_retrain_is_to_train_both_folds_again(tmp_path):
    settings, train, base = with_base(tmp_path, limit=40, epochs=1)
    rule = {"method": "mean_std", "param": 2.0, "fill": "resample", "cross_fit": True}
    candidate = settings.replace(**rule)
    experiment.choose([candidate], base, train)
    before = times_of(tmp_path, "CNN_checkpoint_*")
    experiment.choose([candidate], base, train, retrain=True)
    after = times_of(tmp_path, "CNN_checkpoint_*")
    again = {path for path in before if before[path] != after[path]}
    expected = {path for path in before if "half=" in path.parts[-3]}
    assert again == expected
    assert len(again) == 6  # of each fold: ERM, nothing masked, the candidate


def test_a_rule_in_words():
    assert str(Rule(param=3.5, dilation=3)) == "mean_std 3.5 dilated by 3"
    described = str(Rule(param=4.0, dilation=3, fill="resample", rounds=2))
    assert described == "mean_std 4 dilated by 3, resampled, 2 rounds"
    described = str(Rule(fill="resample", shared=True))
    assert described == "mean_std 2, shared, resampled"
