import copy
import dataclasses
import json
import math
from importlib.metadata import version

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn import metrics as sk

from masktune_utils import evaluation, experiment, masking, saliency
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


def test_groups_are_class_by_square_and_an_empty_one_is_left_out():
    correct = torch.tensor([True, False, True, True])
    groups = evaluation.group_accuracy(correct, torch.tensor([0, 0, 1, 1]), torch.tensor([False, False, False, True]))
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
    assert report["worst_group"] == min(report["groups"].values())


def test_what_is_held_out_is_reported_by_itself(model, splits):
    held_out = splits.train[torch.arange(0, 200, 3)]
    report = evaluation.evaluate(model, splits._replace(validation=held_out))["validation"]
    correct = evaluation.predict(model, held_out).argmax(1) == held_out.labels
    assert report["accuracy"] == pytest.approx(correct.double().mean().item())
    groups = evaluation.group_accuracy(correct, held_out.labels, held_out.has_square)
    assert report["groups"] == pytest.approx(groups)
    assert "validation" not in evaluation.evaluate(model, splits)


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


@pytest.fixture
def experiments(tmp_path, model, splits) -> list[Settings]:
    """Two seeds of one experiment, each with a base model and one configuration, saved as the notebooks do."""
    every = [Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, seed=seed) for seed in (0, 1)]
    for settings in every:
        history = [{"epoch": 1, "loss": 0.1, "accuracy": 1.0, "lr": 0.1, "seconds": 2.5}]
        masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), **settings.mask_rule)
        for name, base in {"base": None, settings.configuration: model}.items():
            identity = settings.identity(base=base is None)
            experiment.save_checkpoint(settings.checkpoint_path(name), model, identity, history)
            evaluation.record(settings, model, splits, history, base, masked if base else None)
    return every


def test_a_result_says_what_made_it(experiments, model, splits):
    result = evaluation.recorded(experiments[1])
    assert result["configuration"] == "top_k_0.1" and result["experiment"] == "mnist5k_limit=200"
    assert result["seed"] == 1 and result["seconds"] == 2.5 and result["device"] == "cpu"
    assert result["versions"]["torch"] == version("torch") and result["threads"] == torch.get_num_threads()
    assert result["settings"] == experiments[1].identity(base=False)
    assert result["raw"] == evaluation.evaluate(model, splits)["raw"]


def test_a_result_of_the_same_weights_is_only_read(experiments, model, splits):
    path = experiments[0].folder("results") / "base.json"
    written = path.stat().st_mtime_ns
    loaded = [{"epoch": 1, "loss": 0.1, "accuracy": 1.0, "lr": 0.1}]
    evaluation.record(experiments[0], model, splits, loaded)
    assert path.stat().st_mtime_ns == written
    with torch.no_grad():
        model.linear[3].bias += torch.tensor([1e6, 0.0])  # other weights: the old result no longer holds
    again = evaluation.record(experiments[0], model, splits, loaded)
    assert again["raw"]["class_accuracy"] == [1.0, 0.0] and again["seconds"] is None
    assert path.stat().st_mtime_ns != written


def test_only_what_still_holds_counts_as_recorded(experiments):
    first, second = experiments
    assert evaluation.recorded(first) and evaluation.recorded(first, base=True)
    assert evaluation.recorded(dataclasses.replace(first, upsample="map")) is None
    first.checkpoint_path(first.configuration).unlink()
    assert evaluation.recorded(first) is None
    path = second.folder("results") / "base.json"
    experiment.write_json(path, experiment.read_json(path) | {"sha256": "another base model's"})
    assert evaluation.recorded(second) is None


def test_masked_validation_tries_every_model_on_the_masks_of_every_rule(tmp_path, model):
    common = Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, holdout=0.5)
    experiment.save_checkpoint(common.checkpoint_path("base"), model, common.identity(base=True), [])
    sha256 = {"base_sha256": experiment.weights_sha256(model.state_dict())}
    rules = [dataclasses.replace(common, method="top_k", param=param) for param in (0.0, 0.3)]
    always_0 = copy.deepcopy(model)
    torch.nn.init.constant_(always_0.linear[3].bias[:1], 1e6)
    for settings, finetuned in zip(rules, (model, always_0), strict=True):
        identity = settings.identity(base=False) | sha256
        experiment.save_checkpoint(settings.checkpoint_path(settings.configuration), finetuned, identity, [])
    table = evaluation.masked_validation(common, images=80)
    assert list(table.columns) == list(table.index) == ["top_k_0.0", "top_k_0.3"]
    assert table.loc["top_k_0.3"].tolist() == [0, 0]  # right on one class alone
    split = experiment.load_data(common).validation[:80]
    maps = saliency.saliency_maps(model, split.images, split.labels)
    hidden = masking.image_masks(maps, "top_k", 0.3)
    for rule, images in {
        "top_k_0.0": split.images,
        "top_k_0.3": masking.apply_mask(split.images / 255, hidden),
    }.items():
        correct = evaluation.predict(model, dataclasses.replace(split, images=images)).argmax(1) == split.labels
        worst = min(correct[split.labels == label].double().mean().item() for label in (0, 1))
        assert table.loc["top_k_0.0", rule] == pytest.approx(worst)
    other = dataclasses.replace(common, method="mean").configuration
    experiment.save_checkpoint(common.checkpoint_path(other), model, identity | {"base_sha256": "another's"}, [])
    with pytest.raises(CheckpointError, match="base_sha256"):
        evaluation.masked_validation(common)


def test_results_are_collected_into_a_table_and_a_file(experiments, tmp_path):
    table = evaluation.collect(str(tmp_path))
    assert table["configuration"].tolist() == ["base", "base", "top_k_0.1", "top_k_0.1"]
    assert table["seed"].tolist() == [0, 1, 0, 1]
    result = evaluation.recorded(experiments[1])
    row = table.iloc[3]
    assert (row["raw"], row["biased"]) == (result["raw"]["accuracy"], result["biased"]["accuracy"])
    assert (
        row["worst_group"] == result["worst_group"] and row["biased_class_1"] == result["biased"]["class_accuracy"][1]
    )
    assert row["method"] == "top_k" and row["limit"] == 200 and row["seconds"] == 2.5
    assert row["hidden_square"] == 0 and math.isnan(table["hidden_square"][0])
    saved = pd.read_csv(tmp_path / "results" / "results.csv")
    pd.testing.assert_frame_equal(saved, table.replace("", math.nan), check_dtype=False)
    path = experiments[1].folder("results") / "base.json"
    experiment.write_json(path, experiment.read_json(path) | {"sha256": "another", "base_sha256": "another"})
    assert evaluation.collect(str(tmp_path))["configuration"].tolist() == ["base", "base", "top_k_0.1"]


def test_the_reference_run_fills_up_what_is_missing(experiments, tmp_path, monkeypatch):
    own = evaluation.collect(str(tmp_path))
    reference = own.assign(raw=0.5).iloc[[0, 2]].assign(seed=[0, 7])
    reference.to_csv(tmp_path / "reference.csv", index=False)
    monkeypatch.setattr(evaluation, "REFERENCE", tmp_path / "reference.csv")
    table = evaluation.collect(str(tmp_path), reference=True)
    assert table["configuration"].tolist() == ["base", "base", "top_k_0.1", "top_k_0.1", "top_k_0.1"]
    assert table["seed"].tolist() == [0, 1, 0, 1, 7]
    assert table["raw"].tolist() == [*own["raw"], 0.5]
    pd.testing.assert_frame_equal(evaluation.collect(str(tmp_path)), own)


def test_a_foreign_file_among_the_results_is_named(tmp_path):
    experiment.write_json(tmp_path / "results" / "mine.json", {"seed": 0})
    with pytest.raises(ValueError, match=r"mine\.json is not a result of this project: it has no base_sha256"):
        evaluation.collect(str(tmp_path))


def test_there_may_be_no_results(tmp_path):
    assert len(evaluation.collect(str(tmp_path))) == 0


def test_summary_is_mean_and_sample_standard_deviation_in_per_cent():
    columns = ["configuration", "seed", "raw", "biased", "worst_group"]
    rows = [("base", 0, 0.5, 0.25, 0.1), ("base", 1, 0.7, 0.25, 0.1), ("top_k_0.1", 0, 0.9, 0.8, 0.7)]
    table = pd.DataFrame(rows, columns=columns).assign(experiment="mnist")
    summary = evaluation.summarize(table)
    base = {"raw": "60.00 ± 14.14", "biased": "25.00 ± 0.00", "worst group": "10.00 ± 0.00", "seeds": 2}
    assert summary.loc["base"].to_dict() == base
    single = {"raw": "90.00", "biased": "80.00", "worst group": "70.00", "seeds": 1}
    assert summary.loc["top_k_0.1"].to_dict() == single
    both = evaluation.summarize(pd.concat([table, table.assign(experiment="mnist_epochs=2")]))
    assert both.loc[("mnist_epochs=2", "base"), "seeds"] == 2
