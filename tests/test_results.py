"""Results: saved, gathered, summarized, and refused by name if damaged."""

import math
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
from sklearn import metrics as sk

from masktune_utils import results, store
from masktune_utils.results import collect, write_json


def result(name, seed):
    return {
        "experiment": "mnist",
        "configuration": name,
        "seed": seed,
        "sha256": f"{name} {seed}",
        "base_sha256": f"base {seed}",
    }


def test_accuracies_are_those_of_scikit_learn_over_both_test_sets(model, splits):
    row = results.evaluate(model, splits)
    recalls = {}
    for name, split in splits.tests.items():
        predicted = model(split.images / 255).argmax(1)
        assert row[name] == pytest.approx(sk.accuracy_score(split.labels, predicted))
        recalls[name] = sk.recall_score(split.labels, predicted, average=None)
        del row[name]
    groups = {
        "group low, no shortcut": recalls["raw"][0],
        "group high, no shortcut": recalls["raw"][1],
        "group high, shortcut": recalls["biased"][1],
    }
    worst_group = min(groups.values())
    assert row == pytest.approx({**groups, "worst_group": worst_group})
    unplanted = replace(splits.biased, shortcut=None)
    row = results.evaluate(model, splits._replace(biased=unplanted))
    assert row["group high, no shortcut"] == pytest.approx(recalls["raw"][1])


@pytest.fixture
def saved(tmp_path) -> Path:
    """Results of two seeds, each of a base model and of one that is fine-tuned."""
    for seed in (1, 0):
        for name in ("top_k_0.1", "base"):
            path = tmp_path / "results" / "mnist" / f"seed{seed}" / f"{name}.json"
            row = result(name, seed)
            write_json(path, {**row, "hidden_digit": math.nan})
            read = results.read(path)
            assert read.items() >= {**row, "hidden_digit": None}.items()  # JSON's null
            assert read["epochs"] == 50  # the file does not have it: the default
            assert "finetune_epochs" not in read
    (tmp_path / "results" / "notes.json").write_text("not in a folder of results")
    return tmp_path


def test_results_are_collected_into_a_table(saved):
    table = collect(str(saved))
    configurations = ["base", "base", "top_k_0.1", "top_k_0.1"]
    assert table["configuration"].tolist() == configurations
    assert table["seed"].tolist() == [0, 1, 0, 1]
    assert collect(str(saved / "none")).empty
    backup = saved / "results" / "mnist" / "seed0_before"
    shutil.copytree(backup.with_name("seed0"), backup)
    assert collect(str(saved)).equals(table)


def test_a_result_of_a_base_model_that_has_been_replaced_is_left_out(saved):
    path = saved / "results" / "mnist" / "seed1" / "base.json"
    other = {"sha256": "other", "base_sha256": "other"}
    write_json(path, result("base", 1) | other)
    assert collect(str(saved))["seed"].tolist() == [0, 1, 0]
    path.unlink()
    elsewhere = saved / "results" / "other" / "seed0" / "base.json"
    same = {"experiment": "other", "sha256": "base 1", "base_sha256": "base 1"}
    write_json(elsewhere, result("base", 0) | same)
    table = collect(str(saved))
    assert table["seed"].tolist() == [0, 0, 0]
    assert table["experiment"].tolist() == ["mnist", "mnist", "other"]


@pytest.mark.parametrize("content", [b'{"raw": ', b'{"seed": 0}', b"3"])
def test_a_damaged_or_foreign_result_is_refused_by_name(content, tmp_path):
    path = tmp_path / "results" / "mnist" / "seed0" / "mine.json"
    store.write_bytes(path, content)
    with pytest.raises(store.CheckpointError, match=f"{path} is damaged"):
        collect(str(tmp_path))


def test_summary_is_mean_and_sample_standard_deviation_in_per_cent():
    """Of two seeds of ERM, and one of a configuration."""
    rows = {
        "configuration": ["base", "base", "top_k_0.1"],
        "raw": [0.5, 0.7, 0.9],
        "biased": [0.5, 0.5, 0.5],
        "worst_group": [0.1, 0.1, math.nan],
    }
    summary = results.summarize(pd.DataFrame(rows))
    assert [*summary.columns] == ["raw", "biased", "worst group", "seeds"]
    of_base = ["60.00 ± 14.14", "50.00 ± 0.00", "10.00 ± 0.00", 2]
    assert summary.loc["base"].tolist() == of_base
    assert summary.loc["top_k_0.1"].tolist() == ["90.00", "50.00", "", 1]


def test_the_accuracies_of_each_model_and_what_was_chosen():
    rows = [
        ("base", "ERM", 0.3),
        ("chosen", "mean_std 3", 0.9),
        ("chosen", "ERM", 0.5),  # which was kept
        ("top_k_0.1", "top_k 0.1", 0.1),
        ("top_k_0.1_epochs=2", "top_k 0.1", 0.2),
    ]
    table = pd.DataFrame(rows, columns=["configuration", "rule", "worst_group"])
    table = table.assign(experiment="mnist", raw=1.0, biased=1.0)
    accuracies = results.accuracy_table(table)["worst group"]
    assert [*accuracies.items()] == [
        ("top_k_0.1", "10.00"),
        ("top_k_0.1_epochs=2", "20.00"),
        ("ERM", "30.00"),
        (results.CHOSEN, "70.00 ± 28.28"),  # the best one last
    ]
    table["experiment"] = ["other", *table["experiment"][1:]]
    accuracies = results.accuracy_table(table)["worst group"]
    assert accuracies["other", "ERM"] == "30.00"
