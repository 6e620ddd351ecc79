"""The command `masktune`: what it runs, skips and prints. Failures: test_failing.py."""

import re
from pathlib import Path
from unittest.mock import Mock

import nbformat
import pytest
from tiny_runs import OPTIONS, contents, masktune, tiny

from masktune_utils import results, selection
from masktune_utils.runner import command, grids, stages
from masktune_utils.settings import REPOSITORY, Settings

pytest_plugins = ["tiny_runs"]
NOTEBOOKS_OF_A_RUN = ["01", "02", "03", "04", "04", "05", "06"]


def times_of_writing(directory: Path) -> dict[Path, int]:
    """Of each file, but for the table that every run writes."""
    files = [path for path in directory.rglob("*.*") if path.name != "results.csv"]
    return {path: path.stat().st_mtime_ns for path in files}


def dry_run(capsys, *arguments: str) -> str:
    assert command.main(["sweep", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.fixture
def choice(whole_run) -> dict:
    """What that run chose."""
    folder = tiny(whole_run.directory).folder("results")
    return results.read(folder / "chosen.json")


def test_a_run_executes_every_notebook_and_chooses_one_of_all(whole_run, choice):
    assert whole_run.code == 0, whole_run.error
    directory = whole_run.directory
    copies = sorted(directory.glob("runs/*/*/*.ipynb"))
    assert [path.name[:2] for path in copies] == NOTEBOOKS_OF_A_RUN
    figures = {path.name[:2] for path in directory.glob("figures/*/*/*.png")}
    assert figures == {*NOTEBOOKS_OF_A_RUN}
    table = results.collect(str(directory))
    configurations = ["base", "chosen", "top_k_0.1", "top_k_0.3"]
    assert table["configuration"].tolist() == configurations
    rounds = [part for rule in selection.CANDIDATES for part in rule.each_round]
    assert choice["rule"] in ["ERM", *map(str, rounds)]


def test_of_a_sweep_the_default_alone_runs_the_part_from_scratch(whole_run):
    has_run = []
    for copy in sorted(whole_run.directory.glob("runs/*/*/04*.ipynb")):
        cells = nbformat.read(copy, as_version=4).cells
        tagged = [cell for cell in cells if "from-scratch" in cell.metadata.tags]
        has_run.append([cell.execution_count is not None for cell in tagged])
    assert has_run == [[True] * 5, [False] * 5]


def test_a_run_prints_what_each_model_is_worth_and_why_one_is_chosen(whole_run):
    table = results.collect(str(whole_run.directory))
    worth = results.worth(results.named(table)).to_string()
    assert f"Accuracy in %\n\n{worth}\n" in whole_run.printed
    assert max(map(len, worth.splitlines())) <= 80
    assert re.search("seed 0: (Chosen|ERM is kept)", whole_run.printed)
    for kind in ("checkpoints", "results", "runs", "figures"):
        assert f"{kind}: {whole_run.directory / kind}\n" in whole_run.printed


@pytest.mark.usefixtures("one_thread")
def test_what_is_done_is_skipped_and_retrain_does_it_again(directory):
    before = times_of_writing(directory)
    saved = contents(directory)
    assert masktune(directory, "--param", "0.1", "0.3") == 0
    assert times_of_writing(directory) == before
    assert masktune(directory, "--param", "0.1", "--retrain", "True") == 0
    after = times_of_writing(directory)
    assert before.keys() == after.keys()
    again = {path.name for path in before if before[path] != after[path]}
    assert "04_finetune_sweep_top_k_0.1.ipynb" in again
    trained = {name for name in again if name.startswith("CNN_checkpoint")}
    expected = [tiny(directory).checkpoint_path(name) for name in ("base", "top_k_0.1")]
    assert trained == {path.name for path in expected}
    assert contents(directory) == saved


def test_a_dry_run_shows_what_is_done_and_runs_nothing(directory, capsys):
    before = times_of_writing(directory)
    options = [*OPTIONS, "--directory", str(directory), "--param", "0.3", "0.5"]
    printed = dry_run(capsys, *options)
    assert times_of_writing(directory) == before
    assert printed.startswith("2 configurations, device: ")
    assert re.search(
        "done .*=20 seed0 top_k_0.3\n     .*=20 seed0 top_k_0.5\n", printed
    )


TWO_BLOCKS = """
- {method: [mean, top_k, mean], param: 0.5, epochs: 7}
- {dilation: 2, epochs: 9}
"""


def test_options_win_over_the_blocks_of_a_grid_file(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text(TWO_BLOCKS)
    _, grid = grids.read_grid(file, {"epochs": [3], "param": [0.1, 0.3]})
    assert {settings.epochs for settings in grid} == {3}
    assert [settings.configuration for settings in grid] == [
        "mean_0.1",
        "mean_0.3",
        "top_k_0.1",
        "top_k_0.3",
        "top_k_0.1_dilation=2",
        "top_k_0.3_dilation=2",
    ]


def test_a_grid_may_name_its_notebook(directory, capsys):
    file = directory / "grid.yaml"
    options = [str(file), "--directory", str(directory), "--dataset", "mnist5k"]
    file.write_text("- {notebook: 03_saliency_masks, dilation: [0, 2]}")
    assert dry_run(capsys, *options).startswith("2 configurations")
    file.write_text("- {notebook: 02_erm, limit: 200, epochs: 2, batch_size: 20}")
    printed = dry_run(capsys, *options, "--seed", "0", "1")
    assert re.search("done .*=20 seed0 base\n     .*=20 seed1 base\n", printed)
    assert command.main(["choose", *options]) == 2
    message = f"{file}: notebook is '02_erm'; allowed: ['04_finetune_sweep']."
    assert message in capsys.readouterr().err


def test_a_notebook_is_executed_and_what_it_saves_for_each_seed_is_gathered(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("- notebook: 01_dataset\n")
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", seed=1)
    folder = settings.folder("results")
    folder.mkdir(parents=True)
    (folder / "01_dataset.csv").write_text("seed,share\n1,0.5\n")
    options = ["--dataset", "mnist5k", "--directory", str(tmp_path)]
    assert command.main(["sweep", str(file), *options]) == 0
    assert [*tmp_path.glob("runs/*/*/01_dataset.ipynb")]
    gathered = tmp_path / "results" / "01_dataset.csv"
    assert gathered.read_text() == "seed,share\n1,0.5\n"


def test_the_grids_of_the_repository_are_valid():
    counts = {}
    for path in REPOSITORY.glob("sweeps/*.yaml"):
        _, grid = grids.read_grid(path, {})
        counts[path.stem] = len(grid)
    assert counts["published"] == 15
    assert counts["paper"] == 1


def test_the_help_tells_every_setting_and_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for field in Settings.model_fields.values():
        assert f" {field.description} (default: {field.default!r})" in printed


def test_a_text_that_looks_like_a_number_is_taken_as_text():
    options = ["--directory", "2024", "--square-color", "0.5", "--param", "0.5"]
    arguments = command._parser().parse_args(["run", *options])
    assert arguments.directory == ["2024"]
    assert arguments.square_color == ["0.5"]
    assert arguments.param == [0.5]


def test_a_relative_directory_becomes_absolute(tmp_path, monkeypatch):
    """Since a Dask worker may be elsewhere."""
    monkeypatch.chdir(tmp_path)
    run_stages = Mock(return_value={})
    monkeypatch.setattr(stages, "run_stages", run_stages)
    assert command.main(["sweep", *OPTIONS, "--directory", "here"]) == 0
    _, _, grid, _ = run_stages.call_args.args
    assert {settings.directory for settings in grid} == {str(tmp_path / "here")}


@pytest.mark.parametrize("name", ["05_plots", "06_choice"])
def test_a_page_needs_no_other_file_no_network_and_no_script(name, whole_run, choice):
    path = tiny(whole_run.directory).folder("results") / f"{name}.html"
    assert f"page: {path}\n" in whole_run.printed
    page = path.read_text()
    assert "experiment.from_notebook" not in page  # no code
    assert "<script" not in page
    sources = re.findall('src="(.*?)[,"]', page)
    assert {*sources} == {"data:image/png;base64"}
    assert not re.findall(r'<link [^>]*href="http|@import|url\(.?http', page)
    shown = {
        "05_plots": ["top_k 0.1", "top_k 0.3", choice["rule"]],
        "06_choice": ["Of 200 training images, "],
    }
    for text in shown[name]:
        assert text in page
