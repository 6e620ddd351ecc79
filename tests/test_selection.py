"""The choice: by hand on toys, and the models that it is made from."""

import dataclasses
import json
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
    models,
    results,
    selection,
    shortcuts,
    store,
)
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.selection import ERM, NULL, HeldOut
from masktune_utils.settings import Settings

SMALL = TINY | {"limit": 400, "epochs": 4}
RULES = [(False, 4.0, 3, 2), (True, 2.0, 1, 1)]
# Number of images → epochs of fine-tuning, of 32 images a step.
EPOCHS = {100: 6, 4000: 6, 12_000: 2, 24_000: 1, 60_000: 1}
IN_WORDS = {"a": "Rule a", "b": "Rule b"}


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
    return selection.judge(toy(*arguments, **options), IN_WORDS)


def test_a_candidate_is_taken_if_most_mistakes_that_erm_is_sure_of_are_right():
    verdict = judge({NULL: (2, 960), "a": (36, 955)})
    assert verdict.chosen == "a"
    assert verdict.reason == (
        f"{MISTAKES} that have not seen them. 2 of 3 models fall 10 points or more "
        "behind and are struck out. Of the candidates that then fall least behind, "
        "Rule a hides least. ERM is sure of 40 of its mistakes. 36 of these are right "
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
    monkeypatch.setattr(experiment, "CANDIDATES", RULES)
    monkeypatch.setattr(experiment, "MOST_EPOCHS", 2)


with_small_rules = pytest.mark.usefixtures("small_rules")


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
    candidates = experiment.candidates(settings, 4000)
    assert len(candidates) == sum(rounds for *_, rounds in experiment.CANDIDATES)
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
        candidates = experiment.candidates(settings, count)
        epochs[count] = candidates[0].finetune_epochs
    assert epochs == EPOCHS


def rules_of(candidates: list[Settings]) -> list[tuple]:
    return [
        (settings.shared, settings.param, settings.dilation, settings.rounds)
        for settings in candidates
    ]


def test_the_candidates_for_digits_are_those_of_the_published_choices():
    candidates = experiment.candidates(Settings(dataset="mnist"), 60_000)
    assert rules_of(candidates) == [
        (False, 4.0, 3, 1),
        (False, 4.0, 3, 2),
        (False, 3.0, 4, 1),
        (False, 3.0, 4, 2),
        (False, 2.0, 2, 1),
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
    candidates = experiment.candidates(settings, 3000)
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


@with_small_rules
def test_candidates_that_differ_in_their_rounds_alone_form_a_chain():
    candidates = experiment.candidates(Settings(**SMALL), 400)
    chains = experiment.chains(candidates[::-1])
    rounds = [[candidate.rounds for candidate in chain] for chain in chains]
    assert sorted(rounds) == [[1], [1, 2]]


def networks_of_half(
    candidates: list[Settings], half: int, train: Split
) -> tuple[dict[str, torch.nn.Module], dict[str, torch.Tensor]]:
    """The models of a half, and the masks of its images, made one by one."""
    index = data.stratified_halves(train.labels, candidates[0].seed)[half]
    seen = train[index]
    base = experiment.base_model(candidates[0].of_half(half), seen)
    null = models.new_model(0)
    null.load_state_dict(base.model.state_dict())
    experiment.training.train(null, seen, **candidates[0].finetuning)
    networks = {ERM: base.model, NULL: null}
    masks = {}
    for candidate in candidates:
        tuned = experiment.masktune(candidate.of_half(half), base, seen)
        networks[candidate.configuration] = tuned.model
        masks[candidate.configuration] = tuned.masked.own_masks
    return networks, masks


@with_small_rules
def test_what_is_judged_equals_what_is_predicted_step_by_step(tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "SAMPLE", 150)
    settings, sets = with_base(tmp_path, conflicting_share=0.1)
    candidates = experiment.candidates(settings, len(sets.train))
    held_out = experiment.predict_held_out(candidates, jobs=1, retrain=False)
    halves = data.stratified_halves(sets.train.labels, settings.seed)
    networks, masks = zip(
        *(networks_of_half(candidates, half, sets.train) for half in (0, 1)),
        strict=True,
    )
    unseen = [sets.train[halves[1]], sets.train[halves[0]]]
    assert torch.equal(held_out.labels, torch.cat([half.labels for half in unseen]))
    for name, predictions in held_out.predictions.items():
        expected = []
        for half in (0, 1):
            expected.append(evaluation.predict(networks[half][name], unseen[half]))
        expected = torch.cat(expected)
        assert torch.equal(predictions, expected.argmax(1))
        if name == ERM:
            torch.testing.assert_close(held_out.probabilities, expected.softmax(1))
    generator = torch.Generator().manual_seed(settings.seed)
    sample = torch.randperm(200, generator=generator)[:150]
    assert held_out.resampled_images == 300
    for mask, row in held_out.resampled.iterrows():
        shares = [of_half[mask].float().mean().item() for of_half in masks]
        assert held_out.hidden[mask] == sum(shares) / 2
        for name, share in row.items():
            logits = []
            labels = []
            for half in (0, 1):
                images = unseen[half][sample]
                of_other_half = masks[1 - half][mask][sample]
                masked = MaskedDataset(images, of_other_half, "resample", settings.seed)
                logits.append(evaluation.predict(networks[half][name], masked))
                labels.append(images.labels)
            worst = evaluation.worst_class(torch.cat(logits), torch.cat(labels))
            assert share == worst


@with_small_rules
def test_the_choice_is_what_the_verdict_says(tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.1)
    candidates = experiment.candidates(settings, len(sets.train))
    choice = experiment.choose(candidates)
    held_out = experiment.predict_held_out(candidates, jobs=1, retrain=False)
    verdict = selection.judge(held_out, choice["candidates"])
    assert choice["configuration"] == verdict.chosen
    assert choice["reason"] == verdict.reason
    assert choice["images"] == 400
    assert choice["mistakes"] == held_out.is_mistake.sum() > 0
    assert choice["candidates"][names_of(candidates)[1]] == (
        "mean_std 4 dilated by 3, resampled, 2 rounds"
    )
    pd.testing.assert_frame_equal(
        pd.DataFrame(choice["accuracy"]).T, verdict.accuracy, check_names=False
    )
    path = settings.folder("results") / "chosen.json"
    assert json.loads(path.read_text()) == choice


@with_small_rules
def test_candidates_with_the_same_models_are_judged_once(tmp_path):
    settings, _ = with_base(tmp_path)
    rule = {"method": "mean_std", "fill": "resample", "cross_fit": True}
    weak = settings.replace(**rule, param=28.0)  # hides nothing
    candidates = [weak, weak.replace(rounds=2), settings.replace(**rule, param=2.0)]
    held_out = experiment.predict_held_out(candidates, jobs=1, retrain=False)
    first, _, third = names_of(candidates)
    assert [*held_out.resampled.index] == [first, third] == [*held_out.hidden]


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
    explained = count_calls(monkeypatch, experiment.saliency, "saliency_maps")
    weak = settings.replace(method="mean_std", param=28.0, rounds=4)
    tuned = [*experiment.masktune_rounds(weak, base, splits.train)]
    assert [model.settings.rounds for model in tuned] == [1, 2, 3, 4]
    assert len({model.sha256 for model in tuned}) == 1
    assert len(trained) == 1
    assert len(explained) == 2  # ERM, and the model of the first round
    for model in tuned:
        path = settings.checkpoint_path(model.configuration)
        assert store.load_checkpoint(path).sha256 == model.sha256


def test_the_masks_of_a_half_are_saved_and_made_again_if_they_are_damaged(
    settings, splits, monkeypatch
):
    rule = {"method": "mean_std", "param": 2.0, "dilation": 1, "rounds": 2}
    settings = settings.replace(**rule).of_half(1)
    index = data.stratified_halves(splits.train.labels, settings.seed)[1]
    images = splits.train[index]
    base = experiment.base_model(settings, images)
    expected = experiment.masktune(settings, base, images).masked.own_masks
    assert expected.dtype == torch.bool
    explained = count_calls(monkeypatch, experiment.saliency, "saliency_maps")
    assert torch.equal(experiment.masks_of_half(settings, images), expected)
    assert not explained
    (path,) = settings.folder("checkpoints").glob("CNN_masks_*rounds=2*")
    assert path.stat().st_size < expected.numel() / 8 + 2000
    foreign = store.read_tensors(path) | {"base_sha256": "of another base model"}
    store.write_tensors(path, foreign)
    assert torch.equal(experiment.masks_of_half(settings, images), expected)
    path.write_bytes(b"damaged")
    assert torch.equal(experiment.masks_of_half(settings, images), expected)
    assert len(explained) == 2  # the second round, twice


@with_small_rules
def test_the_chosen_model_is_the_fine_tuning_that_the_choice_names(tmp_path):
    settings, sets = with_base(tmp_path)
    candidates = experiment.candidates(settings, len(sets.train))
    choice = {"configuration": candidates[1].configuration}
    base = experiment.base_model(settings, sets.train)
    model = experiment.chosen_model(choice, candidates, base, sets.train)
    assert model.configuration == choice["configuration"]
    assert model.settings == candidates[1]
    assert experiment.chosen_settings(choice, candidates) == candidates[1]


def test_where_erm_is_kept_the_chosen_model_is_the_base_model(settings, splits):
    kept = {"configuration": "base"}
    assert experiment.chosen_settings(kept, [settings]) is None
    base = experiment.base_model(settings, splits.train)
    assert experiment.chosen_model(kept, [settings], base, splits.train) is base


def test_the_chosen_model_is_loaded_unless_it_is_trained_again(settings, splits):
    base = experiment.base_model(settings, splits.train)
    arguments = ({"configuration": "top_k_0.1"}, [settings], base, splits.train)
    assert experiment.chosen_model(*arguments).seconds > 0
    assert experiment.chosen_model(*arguments).seconds is None
    assert experiment.chosen_model(*arguments, retrain=True).seconds > 0


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
def test_neither_test_images_nor_groups_nor_the_shortcut_are_known_to_the_choice(
    tmp_path, monkeypatch
):
    load = shortcuts.load
    settings, sets = with_base(tmp_path / "as they are", conflicting_share=0.1)
    candidates = experiment.candidates(settings, len(sets.train))
    expected = experiment.choose(candidates)
    settings, _ = with_base(tmp_path / "disguised", conflicting_share=0.1)
    monkeypatch.setattr(shortcuts, "load", lambda settings: disguised(load(settings)))
    candidates = experiment.candidates(settings, len(sets.train))
    assert experiment.choose(candidates) == expected


@with_small_rules
@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_without_a_shortcut_erm_is_kept(tmp_path):
    settings, sets = with_base(tmp_path, shortcut="none", limit=1000)
    choice = experiment.choose(experiment.candidates(settings, len(sets.train)))
    assert choice["configuration"] == "base"
    assert choice["mistakes"] > 0
    table = results.collect(str(tmp_path))
    assert table["chosen"].tolist() == [True]


@with_small_rules
def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(
    tmp_path, monkeypatch
):
    settings, sets = with_base(tmp_path)
    candidates = experiment.candidates(settings, len(sets.train))
    made = count_calls(monkeypatch, experiment, "predict_held_out")
    first = experiment.choose(candidates)
    assert experiment.choose(candidates) == first
    assert made == [(candidates, 1, False)]
    of_two = experiment.choose(candidates[:2])
    assert [*of_two["candidates"]] == names_of(candidates[:2])
    path = settings.folder("results") / "chosen.json"
    path.write_text(json.dumps(of_two | {"base_sha256": "of another base model"}))
    assert results.collect(str(tmp_path))["chosen"].isna().all()
    experiment.choose(candidates[:2], jobs=2)
    assert len(made) == 3
    assert made[2][1] == 2


CHOOSE = """
from masktune_utils import experiment
from masktune_utils.settings import Settings
experiment.CANDIDATES = {rules}
experiment.MOST_EPOCHS = 2
settings = Settings(**{values})
experiment.choose(experiment.candidates(settings, 400))
"""


@with_small_rules
def test_a_choice_that_is_killed_goes_on(tmp_path):
    settings, sets = with_base(tmp_path / "undisturbed")
    expected = experiment.choose(experiment.candidates(settings, len(sets.train)))
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
    before = times_of(killed, "CNN_checkpoint_*")
    choice = experiment.choose(experiment.candidates(settings, len(sets.train)))
    assert choice == expected
    after = times_of(killed, "CNN_checkpoint_*")
    assert after.items() > before.items()


def times_of(directory: Path, pattern: str) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in directory.rglob(pattern)}


@pytest.mark.filterwarnings("ignore:.*zero everywhere")
def test_one_candidate_is_enough_and_to_retrain_is_to_train_both_halves_again(tmp_path):
    settings, _ = with_base(tmp_path, limit=40, epochs=1)
    rule = {"method": "mean_std", "param": 2.0, "fill": "resample", "cross_fit": True}
    candidate = settings.replace(**rule)
    experiment.choose([candidate])
    before = times_of(tmp_path, "CNN_checkpoint_*")
    experiment.choose([candidate], retrain=True)
    after = times_of(tmp_path, "CNN_checkpoint_*")
    again = {path for path in before if before[path] != after[path]}
    expected = {path for path in before if "half=" in path.parts[-3]}
    assert again == expected
    assert len(again) == 6  # of each half: ERM, nothing masked, the candidate


def test_a_candidate_in_words():
    described = results.describe("mean_std", 3.5, 3)
    assert described == "mean_std 3.5 dilated by 3"
    described = results.describe("mean_std", 4.0, 3, "resample", 2)
    assert described == "mean_std 4 dilated by 3, resampled, 2 rounds"
    described = results.describe("mean_std", 2.0, fill="resample", shared=True)
    assert described == "mean_std 2, shared, resampled"
