"""The command `masktune`: what it runs, skips and prints. Failures: test_failing.py."""

import html
import re
import shutil
from unittest.mock import Mock

import pytest
from conftest import masktune, sweep, times_of_writing, tiny

from masktune_utils import results
from masktune_utils.runner import command, grids, jobs
from masktune_utils.settings import Settings

NOTEBOOKS_OF_A_RUN = ["01", "02", "03", "04", "04", "05", "06"]
OF_05 = "mean_std_2.5_dilation=2_finetune_lr=0.01"  # a model that notebook 05 makes


@pytest.fixture
def dry_run(capsys):
    """Counts what `masktune` would run; returns what it prints."""

    def run(arguments):
        assert command.main([*arguments, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run


def reason(directory):
    return (tiny(directory).folder("results") / "reason.txt").read_text()


def test_a_run_executes_every_notebook_and_chooses_one_of_all(whole_run):
    directory = whole_run.directory
    copies = sorted(directory.glob("runs/*/*/*.ipynb"))
    assert [path.name[:2] for path in copies] == NOTEBOOKS_OF_A_RUN
    figures = {path.name[:2] for path in directory.glob("figures/*/*/*.png")}
    assert figures == {*NOTEBOOKS_OF_A_RUN}
    table = results.collect(str(directory))
    configurations = ["base", "chosen", OF_05, "top_k_0.1", "top_k_0.3"]
    assert table["configuration"].tolist() == configurations


def test_a_run_prints_what_each_model_is_worth_and_last_why_one_is_chosen(whole_run):
    directory = whole_run.directory
    worth = results.accuracy_table(results.collect(str(directory))).to_string()
    assert f"Accuracy in %\n\n{worth}\n" in whole_run.printed
    assert max(map(len, worth.splitlines())) <= 80
    assert whole_run.printed.endswith(f"{reason(directory)}\n")


def names_written(directory, before):
    """Of files that are new, or written anew."""
    return {
        path.stem for path, _ in times_of_writing(directory).items() - before.items()
    }


@pytest.mark.slow
def test_what_has_an_executed_copy_is_done_and_skipped(directory):
    before = times_of_writing(directory)
    assert masktune(directory, "--param", "0.1", "0.3") == 0
    assert names_written(directory, before) == {"results"}  # a table, by every run
    (copy,) = directory.glob("runs/*/*/04_finetune_sweep_top_k_0.1.ipynb")
    copy.unlink()
    assert masktune(directory, "--param", "0.1") == 0
    figures = {"04_masked", "04_eight", "04_fill_top_k_0.1", "04_move_top_k_0.1"}
    assert names_written(directory, before) == {"results", copy.stem, *figures}


def test_results_may_be_deleted(directory):
    shutil.rmtree(directory / "results")
    assert command.main(["choose", *sweep(directory)[1:]]) == 0


def test_a_dry_run_counts_what_is_to_run_and_runs_nothing(directory, dry_run):
    before = times_of_writing(directory)
    printed = dry_run(sweep(directory, "--param", "0.3", "0.5"))
    assert printed.splitlines() == [
        "02_erm: 0 of 1 to run",
        "03_saliency_masks: 0 of 1 to run",
        "04_finetune_sweep: 1 of 2 to run",
    ]
    assert times_of_writing(directory) == before
    tiny(directory).checkpoint_path("base").touch()  # as if it were made anew
    printed = dry_run(sweep(directory, "--param", "0.3"))
    assert [line.split()[1] for line in printed.splitlines()] == ["0", "1", "1"]


def test_options_win_over_the_blocks_of_a_grid_file(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("- {method: [mean, top_k], epochs: 7}\n- {dilation: 2}")
    _, grid = grids.read_grid(file, {"epochs": [3]})
    assert {settings.epochs for settings in grid} == {3}
    assert [settings.configuration for settings in grid] == [
        "mean_0.1",
        "top_k_0.1",
        "top_k_0.1_dilation=2",
    ]


def test_a_grid_may_name_its_notebook(tmp_path, dry_run):
    file = tmp_path / "grid.yaml"
    file.write_text("- {notebook: 01_dataset, seed: [0, 1]}\n")
    printed = dry_run(sweep(tmp_path, str(file)))
    assert printed == "01_dataset: 2 of 2 to run\n"
    printed = dry_run(["choose", *sweep(tmp_path, str(file))[1:]])
    assert printed == "02_erm: 2 of 2 to run\n06_choice: 2 of 2 to run\n"


def test_the_help_tells_every_setting_and_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for field in Settings.model_fields.values():
        assert f" {field.description} (default: {field.default!r})" in printed


def test_directories_become_absolute_and_each_has_a_table(
    tmp_path, monkeypatch, capsys
):
    """With - in the name of an option, too."""
    monkeypatch.chdir(tmp_path)
    execute = Mock(return_value={})
    monkeypatch.setattr(jobs, "execute", execute)
    file = tmp_path / "grid.yaml"
    file.write_text("- {dataset: mnist5k, directory: [here, there]}")
    assert command.main(["sweep", str(file), "--square-size", "5"]) == 0
    printed = capsys.readouterr().out
    stages, _ = execute.call_args.args
    for job, name in zip(stages[0], ("here", "there"), strict=True):
        directory = tmp_path / name
        assert job.settings.directory == str(directory)
        assert job.settings.square_size == 5
        assert f"files: {directory}\n" in printed
        assert (directory / "results" / "results.csv").exists()


@pytest.mark.parametrize("name", ["05_plots", "06_choice"])
def test_a_page_needs_no_other_file_no_network_and_no_script(name, whole_run):
    folder = tiny(whole_run.directory).folder("results")
    path = folder / f"{name}.html"
    assert f"page: {path}\n" in whole_run.printed
    page = path.read_text()
    assert "experiment.from_notebook" not in page  # no code
    assert "<script" not in page
    assert "No description" not in page  # of a picture
    sources = re.findall('src="(.*?)[,"]', page)
    assert {*sources} == {"data:image/png;base64"}
    assert not re.findall(r'<link [^>]*href="http|@import|url\(.?http', page)
    shown = results.read(folder / f"{OF_05}.json")
    texts = {"05_plots": shown["rule"], "06_choice": reason(whole_run.directory)}
    assert texts[name] in html.unescape(page)
