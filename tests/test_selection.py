"""Choosing among candidates without groups and test sets."""

import dataclasses
import json
import zlib

import pandas as pd
import pytest
import torch

from masktune_utils import evaluation, experiment, masking, selection, shortcuts, store
from masktune_utils.data import Split
from masktune_utils.settings import Settings

COMMON = {"dataset": "mnist5k", "limit": 200, "epochs": 2, "batch_size": 20, "param": 2.0}
COMMON |= {"method": "mean_std", "finetune_schedule": "linear"}


@pytest.fixture
def candidates(tmp_path, splits) -> list[Settings]:
    """Two masks of one and two rounds, and no mask; their base model is saved."""
    first = Settings(**COMMON, directory=str(tmp_path), dilation=2)
    several = {"iterations": 2, "accumulate": True, "restart": True}
    masks = [dataclasses.replace(first, param=param, **kept) for param in (2.0, 3.0)
             for kept in ({}, several)]  # fmt: skip
    base, about = experiment.base_model(first, splits.train)
    experiment.record(first, base, about, splits)
    return [*masks, dataclasses.replace(first, method="threshold", param=1.0)]


def test_a_set_weighs_by_the_gain_of_the_best_candidate_and_the_share_hidden():
    accuracy = pd.DataFrame(
        [[0.9, 0.7, 0.1], [0.5, 0.8, 0.1], [0.2, 0.6, 0.5], [0.3, 0.1, 0.1], [1.0, 1.0, 1.0]],
        index=["a", "b", "c", "base", "other"],  # other is judged, but is no candidate
    )
    hidden, own = pd.Series([0.1, 0.2, 0.5]), ["a", "b", "c"]
    assert selection.gains(accuracy, own).tolist() == pytest.approx([0.6, 0.7, 0.4])
    weights = pd.Series([0.6**2.5 / 0.1**1.5, 0.7**2.5 / 0.2**1.5, 0.4**2.5 / 0.5**1.5])
    expected = (accuracy * weights).sum(axis=1) / weights.sum()
    assert selection.scores(accuracy, hidden, own).tolist() == pytest.approx(expected.tolist())
    accuracy[2] = [0.2, 0.3, 0.1, 0.9, 1.0]  # nobody gains: no weight
    expected = (accuracy * weights)[[0, 1]].sum(axis=1) / weights[:2].sum()
    assert selection.scores(accuracy, hidden, own).tolist() == pytest.approx(expected.tolist())


def test_without_any_gain_all_sets_weigh_the_same():
    accuracy = pd.DataFrame([[0.2, 0.4], [0.4, 0.4], [0.9, 0.9]], index=["a", "b", "base"])
    scores = selection.scores(accuracy, pd.Series([0.0, 0.3]), ["a", "b"])
    assert scores.tolist() == pytest.approx([0.3, 0.4, 0.9])


def test_what_a_mask_hides_is_removed_or_exchanged_with_that_of_another_class(splits):
    maps = torch.zeros(200, 8, 8)
    maps[:, :, :4] = 1  # the left half
    dataset = masking.mask_dataset(splits.train, maps, "threshold", 0.5, "nearest")
    (hidden, share), (exchanged, other_share) = selection.masked_and_exchanged(dataset, seed=5)
    assert share == other_share == 0.5 and len(hidden) == len(exchanged) == 200
    index = torch.randperm(200, generator=torch.Generator().manual_seed(5))
    assert torch.equal(hidden.images, dataset.images[index])
    assert torch.equal(hidden.labels, splits.train.labels[index])
    assert torch.equal(exchanged.labels, hidden.labels)
    assert torch.equal(exchanged.images[..., 14:], hidden.images[..., 14:])
    halves = splits.train.images[..., :14].flatten(1)
    for label, half in zip(exchanged.labels, exchanged.images[..., :14].flatten(1), strict=True):
        donors = splits.train.labels[(halves == half).all(1)]
        assert len(donors) and (donors != label).any()


def test_the_worst_class_is_that_of_the_metrics(splits, model, tmp_path):
    store.save_checkpoint(tmp_path / "model.pth", model, {}, [])
    sets = [splits.train, splits.biased]
    path = tmp_path / "model.pth"
    worst = selection.worst_classes([path], sets, torch.device("cpu"))[path]
    for images, found in zip(sets, worst, strict=True):
        metrics = evaluation.metrics(evaluation.predict(model, images), images.labels)
        assert found == pytest.approx(min(metrics["class_accuracy"]))


def test_candidates_that_differ_in_their_rounds_alone_form_a_chain(candidates):
    chains = selection.chains(candidates[::-1])
    assert sorted(map(len, chains)) == [1, 2, 2]
    for chain in chains:
        assert [one.iterations for one in chain] == [1, 2][: len(chain)]
        assert len({(one.method, one.param) for one in chain}) == 1


def test_the_choice_has_the_best_score_of_the_accuracies_on_all_masks(candidates, splits):
    choice = selection.choose(candidates)
    base, _ = experiment.base_model(candidates[0], splits.train)
    maps = experiment.training_saliency(candidates[0], base, splits.train)
    names, sets = ["base"], []
    for one in candidates:
        first = masking.mask_dataset(splits.train, maps, **one.mask_rule)
        names.append(one.configuration)
        _, about = experiment.finetuned_model(one, base, first)
        sets += selection.masked_and_exchanged(about["masked"], zlib.crc32(names[-1].encode()))
    images, device = [images for images, _ in sets], torch.device("cpu")
    paths = [candidates[0].checkpoint_path(name) for name in names]
    rows = selection.worst_classes(paths, images, device).values()
    accuracy = pd.DataFrame(rows, index=names)
    own = [one.configuration for one in candidates]
    scores = selection.scores(accuracy, pd.Series([share for _, share in sets]), own)
    assert choice["scores"] | choice["others"] == pytest.approx(scores.to_dict())
    best, second, *_ = scores[own].sort_values(ascending=False)
    near = [name for name in own if scores[name] >= best - 0.005]
    shares = dict(zip(own, [share for _, share in sets[::2]], strict=True))
    assert choice["configuration"] == min(near, key=shares.get)
    assert choice["doubt"]["near"] == len(near)
    assert choice["doubt"]["lead"] == pytest.approx(best - second)
    gain = (selection.gains(accuracy, own) / [max(share, 1e-3) for _, share in sets]).mean()
    assert choice["doubt"]["gain"] == pytest.approx(gain)
    assert bool(choice["doubt"]["warning"]) == (gain < selection.LITTLE)
    path = candidates[0].folder("results") / "chosen.json"
    assert json.loads(path.read_text()) == choice


def test_neither_test_images_nor_squares_are_known_to_the_choice(candidates, splits, monkeypatch):
    expected = selection.choose(candidates)
    train = dataclasses.replace(splits.train, shortcut=torch.rand(200, 28, 28) < 0.5)
    noise = Split(torch.randint(256, (50, 3, 28, 28), dtype=torch.uint8), torch.arange(50) % 2)
    other = splits._replace(train=train, raw=noise, biased=noise)
    monkeypatch.setattr(shortcuts, "load", lambda settings: other)
    assert selection.choose(candidates, retrain=True) == expected


def test_a_choice_is_made_once_per_base_model_and_set_of_candidates(candidates, monkeypatch):
    first, calls, finetune = selection.choose(candidates), [], selection.finetune
    monkeypatch.setattr(selection, "finetune", lambda *a: calls.append(1) or finetune(*a))
    assert selection.choose(candidates) == first and not calls
    few = selection.choose(candidates[:3], candidates[3:])
    assert len(calls) == 2 and [*few["scores"]] == [one.configuration for one in candidates[:3]]
    assert {*few["others"]} == {"base", *(one.configuration for one in candidates[3:])}
    table = store.collect(candidates[0].directory).set_index("configuration")
    assert table["score"].to_dict() == few["scores"] | few["others"]
    assert table.loc[few["configuration"], "chosen"] and table["chosen"].count() == 3
    assert table["gain"].dropna().tolist() == [few["doubt"]["gain"]] * 3
    path = candidates[0].folder("results") / "chosen.json"
    path.write_text(json.dumps(few | {"base_sha256": "of another base model"}))
    assert store.collect(candidates[0].directory)["chosen"].isna().all()
    selection.choose(candidates[:3])
    assert len(calls) == 4


def test_a_damaged_choice_is_refused_by_name(candidates):
    path = candidates[0].folder("results") / "chosen.json"
    for content in ('{"configuration": "base"}', "[", "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is damaged or not a result"):
            store.collect(candidates[0].directory)


def test_what_a_choice_is_worth_is_told_by_four_rows():
    settings = Settings(dataset="mnist")
    oracle = dataclasses.replace(settings, shortcut="none").experiment
    rows = [
        ("mnist", "base", 0, 0.3, None),
        ("mnist", "top_k_0.1", 0, 0.6, None),
        ("mnist", "top_k_0.3", 0, 0.7, None),
        ("mnist", "mean_0.1", 0, None, None),
        ("mnist", "mean_std_2.0", 0, 0.8, False),
        ("mnist", "mean_std_3.0", 0, 0.9, True),
        ("mnist_epochs=2", "base", 0, 0.3, None),
        (oracle, "base", 0, None, None),
    ]
    table = pd.DataFrame(rows, columns=[*store.KEY, "score", "chosen"])
    compared = selection.compare(table, settings).set_index("model")["configuration"]
    assert compared.to_dict() == {
        "ERM": "base",
        "MaskTune, best published": "top_k_0.3",
        "MaskTune, self-tuned": "mean_std_3.0",
        "oracle: ERM without the shortcut": "base",
    }


def test_a_choice_in_words():
    long = (
        "mean_std_3.5_dilation=3_finetune_lr=0.02_finetune_schedule=linear_finetune_batch_size=32"
    )
    assert selection.short(long) == "mean_std_3.5_dilation=3"
    later = f"{long}_iterations=2_accumulate=True_restart=True"
    assert selection.short(later) == "mean_std_3.5_dilation=3_iterations=2"
    choice = {"configuration": long, "scores": {long: 0.955, later: 0.96}}
    alone = selection.describe(choice | {"doubt": {"near": 1, "warning": ""}})
    assert alone == "mean_std_3.5_dilation=3 has the best score by more than half a point, 96.0%."
    text = selection.describe(choice | {"doubt": {"near": 2, "warning": "Doubt."}})
    expected = "mean_std_3.5_dilation=3 hides least of the 2 candidates within half a point of the"
    assert text == f"{expected} best score, 96.0%. Doubt."
