"""Results: saved, gathered into a table, summarized, and refused by name if they are damaged."""

import json
import math
import re

import pandas as pd
import pytest

from masktune_utils import results, store
from masktune_utils.settings import Settings


@pytest.fixture
def saved(tmp_path):
    """Results of two seeds, each of a base model and of one that is fine-tuned."""
    for seed in (1, 0):
        for name in ("top_k_0.1", "base"):
            row = dict.fromkeys(results.RESULT_KEYS, 0.25) | {
                "experiment": "mnist",
                "configuration": name,
            }
            row |= {
                "seed": seed,
                "sha256": f"{name} {seed}",
                "base_sha256": f"base {seed}",
            }
            row |= {"metrics": {"raw": {}}} | (
                {} if name == "base" else {"hidden_shortcut": 0.75}
            )
            path = tmp_path / "results" / "mnist" / f"seed{seed}" / f"{name}.json"
            store.write_bytes(path, json.dumps(row).encode())
            assert results.read_result(path) == row
    return tmp_path


def test_results_that_hold_are_collected_into_a_table(saved):
    table = results.collect(str(saved))
    keys = [["mnist", name, seed] for name in ("base", "top_k_0.1") for seed in (0, 1)]
    assert table[results.KEY].to_numpy().tolist() == keys
    assert (table["worst_group"] == 0.25).all() and "metrics" not in table
    assert table["hidden_shortcut"].fillna(-1).tolist() == [-1, -1, 0.75, 0.75]
    # a result of a base model that has been replaced is left out
    path = saved / "results" / "mnist" / "seed1" / "base.json"
    other = {"sha256": "other", "base_sha256": "other"}
    path.write_text(json.dumps(results.read_result(path) | other))
    assert results.collect(str(saved))["seed"].tolist() == [0, 1, 0]
    path.unlink()
    assert results.collect(str(saved))["seed"].tolist() == [0, 0]
    assert results.collect(str(saved / "none"))[results.KEY].empty


@pytest.mark.parametrize("content", ['{"raw": ', '{"seed": 0}', "3", "\xff"])
def test_a_damaged_or_foreign_result_is_refused_by_name(content, tmp_path):
    path = tmp_path / "results" / "mine.json"
    store.write_bytes(path, content.encode("latin-1"))
    message = re.escape(f"{path} is damaged or not a result (")
    with pytest.raises(ValueError, match=message):
        results.read_result(path)
    with pytest.raises(ValueError, match=message):
        results.collect(str(tmp_path))


def test_summary_is_mean_and_sample_standard_deviation_in_per_cent():
    columns = ["configuration", "raw", "biased", "worst_group"]
    rows = [
        ("base", 0.5, 0.25, 0.1),
        ("base", 0.7, 0.25, 0.1),
        ("top_k_0.1", 0.9, 0.8, math.nan),
    ]
    table = pd.DataFrame(rows, columns=columns).assign(experiment="mnist")
    summary = results.summarize(table)
    assert list(summary.columns) == ["raw", "biased", "worst group", "seeds"]
    assert summary.loc["base"].tolist() == [
        "60.00 ± 14.14",
        "25.00 ± 0.00",
        "10.00 ± 0.00",
        2,
    ]
    assert summary.loc["top_k_0.1"].tolist() == ["90.00", "80.00", "", 1]
    both = pd.concat([table, table.assign(experiment="mnist_epochs=2")])
    summary = results.summarize(both, results.KEY[:2], ["raw"])
    assert summary.loc[("mnist_epochs=2", "base")].tolist() == ["60.00 ± 14.14", 2]


def test_a_damaged_choice_is_refused_by_name(tmp_path):
    path = tmp_path / "results" / "chosen.json"
    path.parent.mkdir()
    for content in ('{"configuration": "base"}', "[", "[1]"):
        path.write_text(content)
        with pytest.raises(ValueError, match=f"{path} is damaged or not a result"):
            results.collect(str(tmp_path))


def test_what_a_choice_is_worth_is_told_by_four_rows():
    settings = Settings(dataset="mnist")
    oracle = settings.replace(shortcut="none").experiment
    rows = [
        ("mnist", "base", 0, 0.3, False),
        ("mnist", "top_k_0.1", 0, 0.6, False),
        ("mnist", "top_k_0.3", 0, 0.7, False),
        ("mnist", "mean_std_3.0", 0, 0.9, True),
        ("mnist", "base", 1, 0.3, True),  # ERM was kept
        ("mnist", "top_k_0.1", 1, 0.1, False),
        ("mnist_epochs=2", "base", 0, 0.3, None),
        (oracle, "base", 0, 1.0, None),
    ]
    table = pd.DataFrame(rows, columns=[*results.KEY, "worst_group", "chosen"])
    compared = (
        results.compare(table, settings).groupby("model")["configuration"].apply(list)
    )
    assert compared.to_dict() == {
        "ERM": ["base", "base"],
        "best of the others, by the test sets": ["top_k_0.3", "top_k_0.1"],
        "chosen by ERM's mistakes": ["mean_std_3.0", "base"],
        "oracle: ERM without the shortcut": ["base"],
    }
    assert results.compare(table[table["configuration"] == "base"], settings)[
        "seed"
    ].any()
