"""Choosing among candidates by ERM's mistakes, without groups and test sets."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from masktune_utils import (
    data,
    evaluation,
    experiment,
    masking,
    results,
    selection,
    shortcuts,
    store,
)
from masktune_utils.data import Split
from masktune_utils.selection import HeldOut
from masktune_utils.settings import Settings

SMALL = {"dataset": "mnist5k", "limit": 400, "epochs": 4, "batch_size": 20}
RULES = [("resample", 4.0, 3, 2), ("zero", 2.0, 1, 1)]


@pytest.fixture
def small_rules(monkeypatch) -> None:
    monkeypatch.setattr(selection, "RULES", RULES)
    monkeypatch.setattr(selection, "MOST_EPOCHS", 2)


def with_base(directory, **values) -> tuple[Settings, shortcuts.BiasedSets]:
    """Settings, whose base model and its result are saved, and images."""
    settings = Settings(**(SMALL | values), directory=str(directory))
    sets = shortcuts.load(settings)
    experiment.record(experiment.base_model(settings, sets.train), sets)
    return settings, sets


def test_the_candidates_go_from_few_salient_pixels_to_many_in_both_fills():
    settings = Settings(dataset="mnist5k", square_size=8, seed=3, epochs=7)
    listed = selection.candidates(settings, 4000)
    names = [candidate.configuration for candidate in listed]
    assert len({*names}) == len(names) == sum(rounds for *_, rounds in selection.RULES)
    for candidate in listed:
        assert candidate.identity(base=True) == settings.identity(base=True)
        assert candidate.cross_fit and candidate.finetune_schedule == "linear"
    assert {candidate.fill for candidate in listed} == {"zero", "resample"}
    epochs = {
        count: selection.candidates(settings, count)[0].finetune_epochs
        for count in COUNTS
    }
    assert epochs == COUNTS


COUNTS = {
    100: 6,
    4000: 6,
    12_000: 2,
    24_000: 1,
    60_000: 1,
}  # images → epochs of 32 images a step


def held_out() -> HeldOut:
    """Twelve images of two classes; ERM is wrong on the first and last two of each."""
    labels = torch.tensor([0] * 6 + [1] * 6)
    erm = torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 0, 0])
    candidates = {
        "a": torch.tensor(
            [0, 1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1]
        ),  # 3 of 4 mistakes, 6 of 8 others
        "b": torch.tensor([1, 1, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0]),  # 1 of 4, 8 of 8
    }
    return HeldOut(labels, erm, candidates, {"a": 0.1, "b": 0.2})


def test_a_candidate_is_judged_by_the_mistakes_of_erm_and_by_the_rest():
    judged = selection.judge(held_out())
    assert judged["a"]["mistakes"] == {"right": [1, 2], "all": [2, 2]}
    assert judged["a"]["rest"] == {"right": [3, 3], "all": [4, 4]}
    assert judged["b"]["mistakes"] == {"right": [0, 1], "all": [2, 2]}
    assert judged["b"]["rest"] == {"right": [4, 4], "all": [4, 4]}
    assert (judged["a"]["score"], judged["b"]["score"]) == (0.75, 0.25)
    assert (judged["a"]["hidden"], judged["b"]["hidden"]) == (0.1, 0.2)
    for name, share in {"a": 0.75, "b": 0.25}.items():
        z, n = 1.959963984540054, 4  # Wilson, 1927
        middle = (share + z * z / (2 * n)) / (1 + z * z / n)
        width = (
            z
            * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
            / (1 + z * z / n)
        )
        assert judged[name]["interval"] == pytest.approx(
            [middle - width, middle + width]
        )


def row(right: int, rest: int, hidden: float, count: int = 40) -> dict:
    """A judged candidate, of `count` mistakes and 1,000 other images."""
    labels = torch.zeros(count + 1000, dtype=torch.long)
    erm = torch.cat([torch.ones(count), torch.zeros(1000)]).long()
    wrong = [0] * right + [1] * (count - right) + [0] * rest + [1] * (1000 - rest)
    (judged,) = selection.judge(
        HeldOut(labels, erm, {"a": torch.tensor(wrong)}, {"a": hidden})
    ).values()
    return judged | {"description": f"rule {hidden}"}


def test_of_the_candidates_within_one_standard_error_the_one_that_hides_least_is_chosen():
    judged = {
        "best": row(38, 960, 0.3),  # 0.95; its standard error is 0.034
        "near": row(37, 970, 0.2),  # 0.925
        "far": row(36, 999, 0.1),  # 0.9
    }
    chosen, reason = selection.by_mistakes(judged)
    assert chosen == "near"
    assert (
        reason
        == ". With rule 0.2, 37 of these are right (80–97 %), and 97.0% of the others."
    )
    judged["near"] = row(40, 910, 0.2)  # the rest is what it gets wrong
    assert selection.by_mistakes(judged)[0] == "best"


def test_erm_is_kept_unless_most_of_its_mistakes_are_right_beyond_doubt():
    chosen, reason = selection.by_mistakes(
        {"a": row(25, 999, 0.1), "b": row(20, 999, 0.2)}
    )
    assert chosen == "base"
    kept = ". No candidate gets most of them right beyond doubt, so ERM is kept. With the best, "
    assert (
        reason
        == f"{kept}rule 0.1, 25 of these are right (47–76 %), and 99.9% of the others."
    )
    assert selection.by_mistakes({"a": row(27, 999, 0.1)})[0] == "a"  # 52–80 %
    of_many = {"a": row(220, 999, 0.1, count=400)}  # 50–60 %
    assert (
        of_many["a"]["interval"][0] > 0.5 and selection.by_mistakes(of_many)[0] == "a"
    )


def test_candidates_that_differ_in_their_rounds_alone_form_a_chain(small_rules):
    listed = selection.candidates(Settings(**SMALL), 400)
    rounds = [
        [candidate.rounds for candidate in chain]
        for chain in selection.chains(listed[::-1])
    ]
    assert sorted(rounds) == [[1], [1, 2]]


def test_the_choice_equals_one_made_step_by_step(small_rules, tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.1)
    listed = selection.candidates(settings, len(sets.train))
    choice = selection.choose(listed)
    labels = sets.train.labels
    halves = data.stratified_halves(labels, settings.seed)
    erm = torch.zeros_like(labels)
    predicted = {
        candidate.configuration: torch.zeros_like(labels) for candidate in listed
    }
    for half, other in ((0, 1), (1, 0)):
        train, rest = sets.train[halves[half]], sets.train[halves[other]]
        for candidate in listed:
            of_half = selection.of_half(candidate, half)
            base = experiment.base_model(of_half, train)
            erm[halves[other]] = evaluation.predict(base.model, rest).argmax(1)
            tuned = experiment.masktune(of_half, base, train)
            predictions = evaluation.predict(tuned.model, rest).argmax(1)
            predicted[candidate.configuration][halves[other]] = predictions
    hidden = {name: judged["hidden"] for name, judged in choice["candidates"].items()}
    judged = selection.judge(HeldOut(labels, erm, predicted, hidden))
    for name, expected in judged.items():
        found = choice["candidates"][name]
        assert {key: found[key] for key in expected} == expected
    assert choice["mistakes"] == (erm != labels).sum() >= selection.FEW
    assert choice["images"] == 400
    found, reason = selection.by_mistakes(choice["candidates"])
    assert choice["configuration"] == found and choice["reason"].endswith(reason)
    path = settings.folder("results") / "chosen.json"
    assert json.loads(path.read_text()) == choice
    base = experiment.base_model(settings, sets.train)
    model = selection.chosen_model(choice, listed, base, sets.train)
    assert model.configuration == choice["configuration"]
    kept = choice | {"configuration": "base"}
    assert selection.chosen_model(kept, listed, base, sets.train) is base


def test_neither_test_images_nor_groups_nor_the_shortcut_are_known_to_the_choice(
    small_rules, tmp_path, monkeypatch
):
    load, choices = shortcuts.load, []

    def disguised(settings):
        """The training images and classes as they are, and everything else changed."""
        sets = load(settings)
        noise = Split(
            torch.randint(256, (50, 3, 28, 28), dtype=torch.uint8), torch.arange(50) % 2
        )
        parts = []
        for split in (sets.train, sets.validation):
            shortcut = torch.rand(len(split), 28, 28) < 0.5
            groups = torch.randint(10, (len(split),))
            parts.append(dataclasses.replace(split, shortcut=shortcut, digits=groups))
        return sets._replace(
            train=parts[0], raw=noise, biased=noise, validation=parts[1]
        )

    for name, how in {"as it is": load, "disguised": disguised}.items():
        settings, sets = with_base(tmp_path / name)
        monkeypatch.setattr(shortcuts, "load", how)
        choices.append(
            selection.choose(selection.candidates(settings, len(sets.train)))
        )
        monkeypatch.setattr(shortcuts, "load", load)
    assert choices[0] == choices[1]


def test_without_a_shortcut_erm_is_kept(small_rules, tmp_path):
    settings, sets = with_base(tmp_path, shortcut="none", limit=1000)
    choice = selection.choose(selection.candidates(settings, len(sets.train)))
    assert choice["configuration"] == "base" and choice["mistakes"] >= selection.FEW
    assert "so ERM is kept" in choice["reason"]
    table = results.collect(str(tmp_path))
    assert table["chosen"].tolist() == [True]


def test_without_mistakes_resampled_images_are_the_judge(small_rules, tmp_path):
    settings, sets = with_base(tmp_path, conflicting_share=0.0, limit=1000)
    listed = selection.candidates(settings, len(sets.train))
    choice = selection.choose(listed)
    assert choice["mistakes"] < selection.FEW
    shortfalls = selection.resampled_shortfalls(listed)
    found, reason = selection.by_shortfalls(choice["candidates"], shortfalls)
    assert choice["configuration"] == found != "base" and choice["reason"].endswith(
        reason
    )
    assert "too few to judge by" in reason and "in doubt" in reason
    assert shortfalls[found] < shortfalls["base"]


def test_shortfalls_are_those_of_a_computation_by_hand(small_rules, tmp_path):
    settings, sets = with_base(tmp_path)
    listed = selection.candidates(settings, len(sets.train))[1:]
    selection.choose(listed)
    names = ["base", *(candidate.configuration for candidate in listed)]
    worst = pd.DataFrame(0.0, index=names, columns=names[1:])
    halves = data.stratified_halves(sets.train.labels, settings.seed)
    for half, other in ((0, 1), (1, 0)):
        train = sets.train[halves[half]]
        generator = torch.Generator().manual_seed(settings.seed)
        sample = torch.randperm(len(train), generator=generator)[: selection.SAMPLE]
        for candidate in listed:
            of_half = selection.of_half(candidate, half)
            tuned = experiment.masktune(
                of_half, experiment.base_model(of_half, train), train
            )
            masks = tuned.masked.own_masks[sample]
            images = masking.MaskedDataset(
                train[sample], masks, "resample", settings.seed
            )
            for name in names:
                of_other = selection.of_half(candidate, other)
                if name != "base":
                    same = {one.configuration: one for one in listed}[name]
                    name_of_half = selection.of_half(same, other).configuration
                path = of_other.checkpoint_path(
                    "base" if name == "base" else name_of_half
                )
                network = store.load_checkpoint(path).model
                metrics = evaluation.metrics(
                    evaluation.predict(network, images), images.labels
                )
                worst.loc[name, candidate.configuration] += (
                    min(metrics["class_accuracy"]) / 2
                )
    expected = (worst.max() - worst).max(axis=1)
    assert selection.resampled_shortfalls(listed) == pytest.approx(expected.to_dict())


def test_by_shortfalls_erm_is_kept_only_if_no_candidate_falls_behind_less():
    judged = {"a": row(0, 999, 0.3), "b": row(0, 999, 0.1)}
    chosen, reason = selection.by_shortfalls(
        judged, {"base": 0.4, "a": 0.05, "b": 0.055}
    )
    assert (
        chosen == "b"
        and "rule 0.1 is at most 6 points behind the best, and ERM 40" in reason
    )
    assert selection.by_shortfalls(judged, {"base": 0.4, "a": 0.05, "b": 0.2})[0] == "a"
    assert (
        selection.by_shortfalls(judged, {"base": 0.02, "a": 0.05, "b": 0.2})[0]
        == "base"
    )


def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(
    small_rules, tmp_path, monkeypatch
):
    settings, sets = with_base(tmp_path)
    listed = selection.candidates(settings, len(sets.train))
    calls, predict = [], selection.predict_held_out
    monkeypatch.setattr(
        selection, "predict_held_out", lambda *given: calls.append(1) or predict(*given)
    )
    first = selection.choose(listed)
    assert selection.choose(listed) == first and len(calls) == 1
    few = selection.choose(listed[:2])
    assert [*few["candidates"]] == [candidate.configuration for candidate in listed[:2]]
    path = settings.folder("results") / "chosen.json"
    path.write_text(json.dumps(few | {"base_sha256": "of another base model"}))
    assert results.collect(str(tmp_path))["chosen"].isna().all()
    selection.choose(listed[:2])
    assert len(calls) == 3


def test_a_choice_that_is_killed_goes_on(small_rules, tmp_path):
    settings, sets = with_base(tmp_path / "undisturbed")
    expected = selection.choose(selection.candidates(settings, len(sets.train)))
    settings, sets = with_base(tmp_path / "killed")
    code = f"""
from masktune_utils import selection
from masktune_utils.settings import Settings
selection.RULES, selection.MOST_EPOCHS = {RULES}, 2
settings = Settings(**{SMALL}, directory={str(tmp_path / "killed")!r})
selection.choose(selection.candidates(settings, 400))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    tuned = "checkpoints/*half=0*/seed0/*finetuned*rounds=2*.pth"
    while not [*(tmp_path / "killed").glob(tuned)]:
        assert process.poll() is None
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    before = {
        path: path.stat().st_mtime_ns for path in tmp_path.glob("killed/**/*.pth")
    }
    assert not (settings.folder("results") / "chosen.json").exists()
    found = selection.choose(selection.candidates(settings, len(sets.train)))
    assert found["candidates"].keys() == expected["candidates"].keys()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert len([*tmp_path.glob("killed/**/*.pth")]) > len(before)


def test_a_candidate_in_words():
    described = results.describe("mean_std", 3.5, 3)
    assert described == "mean_std 3.5 dilated by 3"
    described = results.describe("mean_std", 4.0, 3, "resample", 2)
    assert described == "mean_std 4 dilated by 3, resampled, 2 rounds"
