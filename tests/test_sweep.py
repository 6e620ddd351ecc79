"""The command `masktune`: what it runs, skips and prints. Failures: test_failing.py."""

import re
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from tiny_runs import OPTIONS, contents, masktune, tiny

from masktune_utils import results, selection
from masktune_utils.runner import command, jobs, stages
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings

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


@pytest.fixture
def table(whole_run) -> pd.DataFrame:
    """Its results, by configuration."""
    return results.collect(str(whole_run.directory)).set_index("configuration")


def test_a_run_executes_every_notebook(whole_run, choice):
    assert whole_run.code == 0, whole_run.error
    directory = whole_run.directory
    copies = sorted(directory.glob("runs/*/*/*.ipynb"))
    assert [path.name[:2] for path in copies] == NOTEBOOKS_OF_A_RUN
    figures = {path.name[:2] for path in directory.glob("figures/*/*/*.png")}
    assert figures == {*NOTEBOOKS_OF_A_RUN}
    for path in copies:
        assert "widget-view" not in path.read_text()


def test_a_run_chooses_one_of_all_configurations(table, choice):
    assert {*table.index} == {"base", "top_k_0.1", "top_k_0.3", "chosen"}
    assert choice["configuration"] == "chosen"
    of_choice = selection.CANDIDATES
    rounds = [f"{part}" for rule in of_choice for part in rule.each_round]
    assert choice["rule"] in ["ERM", *rounds]


def test_a_run_prints_what_each_model_is_worth_and_why_one_is_chosen(
    whole_run, table, choice
):
    for _, row in results.named(table.reset_index()).iterrows():
        name = row["model"]
        numbers = [f"{100 * row[name]:.2f}" for name in results.ACCURACIES]
        words = " +".join(map(re.escape, [name, *numbers]))
        assert re.search(rf"{words} +1\n", whole_run.printed)
    *_, printed = whole_run.printed.partition("Accuracy in %")
    assert max(map(len, printed.splitlines())) <= 80
    assert re.search("seed 0: [0-9]+ of 200 training images", whole_run.printed)
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
- {method: [mean, top_k], param: 0.5, epochs: 7}
- {dilation: 2, epochs: 9}
"""


def test_options_win_over_the_blocks_of_a_grid_file(tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    file.write_text(TWO_BLOCKS)
    options = ["--dataset", "mnist5k", "--epochs", "3", "--directory", str(tmp_path)]
    options += ["--param", "0.1", "0.3", "--seed", "0", "1"]
    printed = dry_run(capsys, str(file), *options)
    expected = set()
    for seed in (0, 1):
        for param in (0.1, 0.3):
            for name in ("mean_{}", "top_k_{}", "top_k_{}_dilation=2"):
                configuration = name.format(param)
                expected.add(f"mnist5k_epochs=3 seed{seed} {configuration}")
    _, *lines = printed.splitlines()
    assert {line.strip() for line in lines} == expected
    assert len(lines) == 12


def test_a_grid_may_name_its_notebook(directory, capsys):
    file = directory / "grid.yaml"
    file.write_text("- notebook: 02_erm\n  seed: [0, 1]\n")
    options = [*OPTIONS, "--directory", str(directory)]
    options = [option for option in options if option not in ("--method", "top_k")]
    printed = dry_run(capsys, str(file), *options)
    assert re.search("done .*=20 seed0 base\n     .*=20 seed1 base\n", printed)
    assert command.main(["choose", str(file), *options]) == 2
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
    gathered = tmp_path / "results" / "01_dataset.csv"
    assert gathered.read_text() == "seed,share\n1,0.5\n"
    (copy,) = tmp_path.glob("runs/*/*/*.ipynb")
    assert copy == settings.replace(seed=0).folder("runs") / "01_dataset.ipynb"


def test_the_grids_of_the_repository_are_valid(tmp_path, capsys):
    options = ["--dataset", "mnist5k", "--directory", str(tmp_path)]
    counts = {}
    for path in REPOSITORY.glob("sweeps/*.yaml"):
        printed = dry_run(capsys, str(path), *options)
        counts[path.stem] = int(printed.split()[0])
    assert counts["published"] == 15
    assert counts["paper"] == 1


def test_every_setting_is_an_option_and_the_help_tells_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    value = r" VALUE( \[VALUE ...\])?"
    for name, field in Settings.model_fields.items():
        spelling = f" --{name}{value}"
        if "_" in name:  # Python 3.13 writes the value once
            spelling = f" --{name}({value})?, --{name.replace('_', '-')}{value}"
        text = f"{field.description} (default: {DEFAULTS[name]!r})"
        assert re.search(rf"{spelling} {re.escape(text)}", printed)


def test_a_text_that_looks_like_a_number_is_taken_as_text():
    options = ["--directory", "2024", "--square-color", "0.5", "--param", "0.5"]
    arguments = command._parser().parse_args(["run", *options])
    assert arguments.directory == ["2024"]
    assert arguments.square_color == ["0.5"]
    assert arguments.param == [0.5]


def test_to_retrain_is_to_do_what_is_done(directory):
    (job,) = jobs.make_stage("02_erm", [tiny(directory)])
    finished = results.finished(str(directory))
    assert job.is_done(finished)
    again = job._replace(settings=job.settings.replace(retrain=True))
    assert not again.is_done(finished)


def test_a_run_that_trains_again_chooses_once(tmp_path, monkeypatch):
    executed = []
    monkeypatch.setattr(stages, "choose", lambda *_: None)
    monkeypatch.setattr(stages.jobs, "write_page", lambda job: job.stem)
    monkeypatch.setattr(
        stages.jobs, "execute", lambda stage, _: executed.extend(stage[0]) or {}
    )
    stages.run_stages("run", ["02_erm"], [tiny(tmp_path, retrain=True)], 1)
    retrained = {job.stem: job.settings.retrain for job in executed}
    assert retrained == {"02_erm": True, "05_plots": False, "06_choice": False}


def test_masks_of_notebook_03_can_be_swept(tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    file.write_text(
        "- {notebook: 03_saliency_masks, dilation: [0, 2], dataset: mnist5k}"
    )
    printed = dry_run(capsys, str(file), "--directory", str(tmp_path))
    assert printed.startswith("2 configurations")


def test_a_relative_directory_becomes_absolute(tmp_path, monkeypatch):
    """Since a Dask worker may be elsewhere."""
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        stages, "run_stages", lambda *arguments: seen.extend(arguments[2]) or {}
    )
    assert command.main(["sweep", *OPTIONS, "--directory", "here"]) == 0
    assert {settings.directory for settings in seen} == {str(tmp_path / "here")}


def test_the_models_of_both_folds_are_trained_again_on_request(tmp_path, monkeypatch):
    asked = []

    def choose(base, train, jobs, retrain):
        asked.append(retrain)
        return SimpleNamespace(is_kept=True, reason="Why.")

    monkeypatch.setattr(stages.experiment, "choose", choose)
    for retrain in (False, True):
        stages.choose(tiny(tmp_path, retrain=retrain), 1)
    assert asked == [False, True]


@pytest.mark.parametrize("name", ["05_plots", "06_choice"])
def test_a_run_writes_pages_that_need_no_other_file_no_network_and_no_script(
    name, whole_run, choice
):
    path = tiny(whole_run.directory).folder("results") / f"{name}.html"
    assert f"page: {path}\n" in whole_run.printed
    page = path.read_text()
    assert "experiment.from_notebook" not in page  # no code
    assert "<script" not in page
    sources = re.findall('src="(.*?)[,"]', page)
    assert {*sources} == {"data:image/png;base64"}
    assert not re.findall('<link [^>]*href="http', page)
    assert not re.findall(r"@import|url\(.?http", page)


def test_the_pages_tell_what_was_chosen_and_why(whole_run, choice):
    folder = tiny(whole_run.directory).folder("results")
    text = (folder / "06_choice.html").read_text()
    assert "of 200 training images are predicted wrongly" in text
    page = (folder / "05_plots.html").read_text()
    for name in ("top_k 0.1", "top_k 0.3", choice["rule"]):
        assert name in page
