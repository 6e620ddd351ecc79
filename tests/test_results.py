"""Results: saved, gathered, summarized, compared, and refused by name if damaged."""

import json
import math
import re
from pathlib import Path

import pandas as pd
import pytest

from masktune_utils import results, store
from masktune_utils.settings import Settings


def result(name: str, seed: int) -> dict:
    row = dict.fromkeys(results.RESULT_KEYS, 0.25)
    row |= {"experiment": "mnist", "configuration": name, "seed": seed}
    row |= {"sha256": f"{name} {seed}", "base_sha256": f"base {seed}"}
    row["metrics"] = {"raw": {}}
    if name != "base":
        row["hidden_shortcut"] = 0.75
    return row


@pytest.fixture
def saved(tmp_path) -> Path:
    """Results of two seeds, each of a base model and of one that is fine-tuned."""
    for seed in (1, 0):
        for name in ("top_k_0.1", "base"):
            path = tmp_path / "results" / "mnist" / f"seed{seed}" / f"{name}.json"
            results.write_json(path, result(name, seed))
            assert results.read_result(path) == result(name, seed)
    return tmp_path


def test_results_are_collected_into_a_table(saved):
    table = results.collect(str(saved))
    assert table[results.KEY].to_numpy().tolist() == [
        ["mnist", "base", 0],
        ["mnist", "base", 1],
        ["mnist", "top_k_0.1", 0],
        ["mnist", "top_k_0.1", 1],
    ]
    assert (table["worst_group"] == 0.25).all()
    assert "metrics" not in table
    assert table["hidden_shortcut"].fillna(-1).tolist() == [-1, -1, 0.75, 0.75]
    assert results.collect(str(saved / "none"))[results.KEY].empty


def test_a_result_of_a_base_model_that_has_been_replaced_is_left_out(saved):
    path = saved / "results" / "mnist" / "seed1" / "base.json"
    other = {"sha256": "other", "base_sha256": "other"}
    results.write_json(path, result("base", 1) | other)
    assert results.collect(str(saved))["seed"].tolist() == [0, 1, 0]
    path.unlink()
    assert results.collect(str(saved))["seed"].tolist() == [0, 0]


def test_what_is_finished_is_told_by_experiment_name_seed_and_test_folder(saved):
    path = saved / "results" / "mnist" / "seed0" / "base.json"
    results.write_json(path, result("base", 0) | {"test_folder": "birds"})
    of_birds = {key for key in results.finished(str(saved)) if key[3] == "birds"}
    assert of_birds == {("mnist", "base", 0, "birds")}


def test_a_result_on_other_test_images_than_its_base_model_is_left_out(saved):
    path = saved / "results" / "mnist" / "seed1" / "base.json"
    results.write_json(path, result("base", 1) | {"test_folder": "birds"})
    kept = results.collect(str(saved))[["configuration", "seed"]].to_numpy().tolist()
    assert kept == [["base", 0], ["base", 1], ["top_k_0.1", 0]]


@pytest.mark.parametrize("content", ['{"raw": ', '{"seed": 0}', "3", "\xff"])
def test_a_damaged_or_foreign_result_is_refused_by_name(content, tmp_path):
    path = tmp_path / "results" / "mnist" / "seed0" / "mine.json"
    store.write_bytes(path, content.encode("latin-1"))
    message = re.escape(f"{path} is damaged or not a result or a choice (")
    with pytest.raises(ValueError, match=message):
        results.read_result(path)
    with pytest.raises(ValueError, match=message):
        results.collect(str(tmp_path))


def choice(**values: str) -> dict:
    return dict.fromkeys([*results.CHOICE_KEYS, "chosen"], "") | values


def test_a_choice_is_told_with_its_reason_and_the_results_of_its_seeds(saved):
    made = choice(configuration="top_k_0.1", base_sha256="base 0", reason="Why.")
    folder = saved / "results" / "mnist"
    results.write_json(folder / "seed0" / "chosen.json", made)
    other = result("base", 1) | {"worst_group": 0.75}
    results.write_json(folder / "seed1" / "base.json", other)
    text = results.conclude([Settings(dataset="mnist", directory=str(saved))])
    assert "seed 0: Why.\n" in text
    assert re.search(r"worst group +25\.00 +25\.00\n", text)
    bases = [Settings(dataset="mnist", directory=str(saved), seed=s) for s in (0, 1)]
    assert re.search(r"worst group +50\.00 ± 35\.36", results.conclude(bases))


def test_a_choice_whose_model_has_no_result_is_told_all_the_same(saved):
    made = choice(configuration="mean_0.5", base_sha256="base 0", reason="Why.")
    results.write_json(saved / "results" / "mnist" / "seed0" / "chosen.json", made)
    text = results.conclude([Settings(dataset="mnist", directory=str(saved))])
    assert "seed 0: Why.\n" in text


def test_a_choice_of_a_base_model_that_has_been_replaced_is_not_told(saved):
    made = choice(configuration="base", base_sha256="an older one", reason="Why.")
    results.write_json(saved / "results" / "mnist" / "seed0" / "chosen.json", made)
    text = results.conclude([Settings(dataset="mnist", directory=str(saved))])
    assert "Why." not in text


def test_a_choice_for_another_base_model_or_of_an_older_version_is_made_again(saved):
    path = saved / "results" / "mnist" / "seed0" / "chosen.json"
    base = Settings(dataset="mnist", directory=str(saved))
    results.write_json(path, choice(base_sha256="base 0"))
    assert results.current_choice(base, "base 0")
    assert results.current_choice(base, "another one") is None
    older = choice(base_sha256="base 0")
    del older["chosen"]
    results.write_json(path, older)
    assert results.current_choice(base, "base 0") is None


def test_json_knows_no_nan(tmp_path):
    path = tmp_path / "a.json"
    results.write_json(path, {"class_accuracy": [0.5, math.nan]})
    assert json.loads(path.read_text()) == {"class_accuracy": [0.5, None]}


@pytest.mark.parametrize("content", ['{"configuration": "base"}', "[", "[1]"])
def test_a_damaged_choice_is_refused_by_name(content, tmp_path):
    path = tmp_path / "results" / "mnist" / "seed0" / "chosen.json"
    store.write_bytes(path, content.encode())
    with pytest.raises(ValueError, match=f"{path} is damaged or not a result"):
        results.collect(str(tmp_path))


@pytest.fixture
def table() -> pd.DataFrame:
    """Two seeds of ERM, and one of a configuration."""
    columns = ["configuration", "raw", "biased", "worst_group"]
    rows = [
        ("base", 0.5, 0.25, 0.1),
        ("base", 0.7, 0.25, 0.1),
        ("top_k_0.1", 0.9, 0.8, math.nan),
    ]
    return pd.DataFrame(rows, columns=columns).assign(experiment="mnist")


def test_summary_is_mean_and_sample_standard_deviation_in_per_cent(table):
    summary = results.summarize(table)
    assert [*summary.columns] == ["raw", "biased", "worst group", "seeds"]
    of_two = ["60.00 ± 14.14", "25.00 ± 0.00", "10.00 ± 0.00", 2]
    assert summary.loc["base"].tolist() == of_two
    assert summary.loc["top_k_0.1"].tolist() == ["90.00", "80.00", "", 1]


def test_a_summary_may_tell_experiments_apart_and_have_some_shares_only(table):
    both = pd.concat([table, table.assign(experiment="mnist_epochs=2")])
    summary = results.summarize(both, ["experiment", "configuration"], ["raw"])
    row = summary.loc[("mnist_epochs=2", "base")]
    assert row.to_dict() == {"raw": "60.00 ± 14.14", "seeds": 2}


def test_what_a_choice_is_worth_is_told_by_three_rows():
    rows = [
        ("mnist", "base", 0, 0.3, False),
        ("mnist", "top_k_0.1", 0, 0.6, False),
        ("mnist", "top_k_0.3", 0, 0.7, False),
        ("mnist", "mean_std_3.0", 0, 0.9, True),
        ("mnist", "base", 1, 0.3, True),  # ERM was kept
        ("mnist", "top_k_0.1", 1, 0.1, False),
        ("mnist_epochs=2", "base", 0, 0.3, None),
    ]
    table = pd.DataFrame(rows, columns=[*results.KEY, "worst_group", "chosen"])
    by_model = results.compare(table, "mnist").groupby("model")["configuration"]
    assert by_model.apply(list).to_dict() == {
        "ERM": ["base", "base"],
        results.BEST: ["top_k_0.3", "top_k_0.1"],
        results.CHOSEN: ["mean_std_3.0", "base"],
    }
    without_others = table[table["configuration"] == "base"]
    compared = results.compare(without_others, "mnist")
    assert {*compared["model"]} == {"ERM", results.CHOSEN}


def test_a_file_that_is_not_in_a_folder_of_results_is_not_read(saved):
    before = results.collect(str(saved))
    (saved / "results" / "notes.json").write_text("mine")
    pd.testing.assert_frame_equal(results.collect(str(saved)), before)


def test_configurations_are_named_in_words():
    rows = [
        {"configuration": "base"},
        {"method": "top_k", "param": 0.1, "dilation": 0, "fill": "zero"},
        {"method": "mean_std", "param": 4.0, "dilation": 3, "fill": "resample"},
        {"method": "mean_std", "param": 2.0, "dilation": 0, "shared": True},
    ]
    table = pd.DataFrame(rows).assign(rounds=2, upsample="bilinear")
    assert results.names(table).tolist() == [
        "ERM",
        "top_k 0.1, 2 rounds",
        "mean_std 4 dilated by 3, resampled, 2 rounds",
        "mean_std 2, shared, 2 rounds",
    ]


def test_tables_of_a_study_are_joined(tmp_path):
    for seed in (0, 1):
        settings = Settings(directory=str(tmp_path), dataset="mnist5k", seed=seed)
        table = pd.DataFrame({"seed": [seed], "share": [0.5]})
        results.save_study(table, settings, "study")
    results.gather_study(str(tmp_path), "study")
    joined = pd.read_csv(tmp_path / "results" / "study.csv")
    assert joined.to_dict("list") == {"seed": [0, 1], "share": [0.5, 0.5]}
    results.gather_study(str(tmp_path), "none")
    assert not (tmp_path / "results" / "none.csv").exists()
