import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from masktune_utils import evaluation, experiment
from masktune_utils.experiment import CheckpointError, Settings


def test_metrics_equal_scikit_learns():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(500, 2, generator=generator), torch.randint(0, 2, (500,), generator=generator)
    ours, predicted = evaluation.metrics(logits, labels), logits.argmax(1)
    assert ours["loss"] == pytest.approx(sk.log_loss(labels, logits.double().softmax(1)), rel=1e-5)
    assert ours["accuracy"] == sk.accuracy_score(labels, predicted)
    np.testing.assert_allclose(ours["class_accuracy"], sk.recall_score(labels, predicted, average=None))
    assert ours["confusion_matrix"] == sk.confusion_matrix(labels, predicted).tolist()
    for name, score in {"precision": sk.precision_score, "recall": sk.recall_score, "f1": sk.f1_score}.items():
        assert ours[name] == score(labels, predicted, average="macro")


def test_a_class_without_images_is_nan():
    ours = evaluation.metrics(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([0, 0]))
    assert ours["class_accuracy"][0] == 0.5 and math.isnan(ours["class_accuracy"][1])


def test_groups_are_class_by_square_and_an_empty_one_is_nan():
    correct = torch.tensor([True, False, True, True])
    groups = evaluation.group_accuracy(correct, torch.tensor([0, 0, 1, 1]), torch.tensor([False, False, False, True]))
    assert math.isnan(groups.pop("class 0, square"))
    assert groups == {"class 0, no square": 0.5, "class 1, no square": 1.0, "class 1, square": 1.0}


def test_report_over_both_test_sets(model, splits):
    report = evaluation.evaluate(model, splits)
    for name, split in {"raw": splits.raw, "biased": splits.biased}.items():
        with torch.no_grad():
            predicted = model(split.images / 255).argmax(1)
        assert report[name]["accuracy"] == pytest.approx(sk.accuracy_score(split.labels, predicted))
    assert report["groups"]["class 1, square"] == report["biased"]["class_accuracy"][1]
    assert report["groups"]["class 1, no square"] == report["raw"]["class_accuracy"][1]
    assert report["groups"]["class 0, no square"] == report["raw"]["class_accuracy"][0]
    assert report["worst_group"] == min(v for v in report["groups"].values() if not math.isnan(v))


def test_a_plain_state_dict_can_be_evaluated(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "theirs.pth")
    report = evaluation.evaluate_checkpoint(tmp_path / "theirs.pth", dataset="mnist5k")
    settings = Settings(dataset="mnist5k")
    assert json.dumps(report) == json.dumps(evaluation.evaluate(model, experiment.load_data(settings)))
    assert 0 < report["biased"]["accuracy"] < 1


def test_our_checkpoint_is_evaluated_with_its_own_square(model, tmp_path):
    settings = Settings(dataset="mnist5k", square_size=9, square_color="red")
    experiment.save_checkpoint(tmp_path / "ours.pth", model, settings.identity(base=True), [])
    report = evaluation.evaluate_checkpoint(tmp_path / "ours.pth", dataset="mnist5k")
    assert json.dumps(report) == json.dumps(evaluation.evaluate(model, experiment.load_data(settings)))


def test_a_checkpoint_of_other_digits_is_not_evaluated(model, tmp_path):
    experiment.save_checkpoint(tmp_path / "ours.pth", model, Settings(dataset="mnist").identity(base=True), [])
    with pytest.raises(CheckpointError, match=r"ours.pth was trained on 'mnist'"):
        evaluation.evaluate_checkpoint(tmp_path / "ours.pth", dataset="mnist5k")


def test_results_are_recorded_once_and_collected(model, splits, tmp_path):
    for seed in (0, 1):
        settings = Settings(dataset="mnist5k", limit=200, seed=seed, directory=str(tmp_path))
        first = evaluation.record(settings, model, splits, base=True)
        evaluation.record(settings, model, splits)
    path = settings.folder("results") / "base.json"
    written = path.stat().st_mtime_ns
    again = evaluation.record(settings, model, splits, base=True)
    assert json.dumps(again) == json.dumps(first) and path.stat().st_mtime_ns == written
    table = evaluation.collect(tmp_path / "results")
    assert table["configuration"].tolist() == ["base", "base", "top_k_0.1", "top_k_0.1"]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    assert table["raw"].tolist() == [first["raw"]["accuracy"]] * 4
    with torch.no_grad():
        model.linear[3].bias += torch.tensor([1e6, 0.0])  # other weights: the old result no longer holds
    assert evaluation.record(settings, model, splits, base=True)["raw"]["class_accuracy"] == [1.0, 0.0]
    assert path.stat().st_mtime_ns != written


def test_summary_is_mean_and_sample_standard_deviation_in_per_cent():
    columns = ["configuration", "seed", "raw", "biased", "worst_group"]
    rows = [("base", 0, 0.5, 0.25, 0.1), ("base", 1, 0.7, 0.25, 0.1), ("top_k_0.1", 0, 0.9, 0.8, 0.7)]
    summary = evaluation.summarize(pd.DataFrame(rows, columns=columns))
    base = {"raw": "60.00 ± 14.14", "biased": "25.00 ± 0.00", "worst group": "10.00 ± 0.00", "seeds": 2}
    assert summary.loc["base"].to_dict() == base
    single = {"raw": "90.00", "biased": "80.00", "worst group": "70.00", "seeds": 1}
    assert summary.loc["top_k_0.1"].to_dict() == single
