"""The command `masktune`: what it runs, skips, prints, and how it fails."""

import contextlib
import json
import os
import re
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from joblib import cpu_count
from PIL import Image
from tiny_runs import OPTIONS, kernels, masktune, start, tiny

from masktune_utils import datasets, experiment, results, store
from masktune_utils.runner import command, jobs, stages
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings

pytest_plugins = ["tiny_runs"]
PARTS = ("train", "test")
NOTEBOOKS_OF_A_RUN = {"01", "02", "03", "04", "05"}


def checked_results(directory: Path) -> dict[str, dict]:
    """The results of the digits with seed 0; all that is saved is whole."""
    for path in directory.glob("checkpoints/*/*/CNN_checkpoint_*.pth"):
        store.load_checkpoint(path)
    for path in directory.glob("runs/*/*/*.ipynb"):
        nbformat.read(path, as_version=4)
    paths = directory.glob("results/mnist5k*/seed0/*.json")
    return {path.stem: json.loads(path.read_bytes()) for path in paths}


def times_of_writing(directory: Path) -> dict[Path, int]:
    """Of each file, but for those that every run writes."""
    by_every_run = ("results.csv", "report.html")
    files = [path for path in directory.rglob("*.*") if path.name not in by_every_run]
    return {path: path.stat().st_mtime_ns for path in files}


def dry_run(capsys, *arguments: str) -> str:
    assert command.main(["sweep", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def executed(directory: Path, experiment: str) -> list[str]:
    """Names of the notebooks that were executed, by their order."""
    paths = directory.glob(f"runs/{experiment}*/seed0/*.ipynb")
    return sorted(path.stem for path in paths)


@pytest.fixture
def choice(whole_run) -> dict:
    """What that run chose for the digits."""
    folder = tiny(whole_run.directory).folder("results")
    return results.read_choice(folder / "chosen.json")


def test_a_run_executes_every_notebook(whole_run, choice):
    assert whole_run.code == 0, whole_run.error
    directory = whole_run.directory
    expected = ["01", "02", "03", "04", "04", "05"]
    if choice["configuration"] != "base":
        expected.insert(3, "04")
    names = executed(directory, "mnist5k")
    assert [name[:2] for name in names] == expected
    figures = {path.name[:2] for path in directory.glob("figures/*/*/*.png")}
    assert figures == NOTEBOOKS_OF_A_RUN
    picture = tiny(directory).folder("figures") / "05_chosen.png"
    assert picture.exists() == (choice["configuration"] != "base")
    for path in directory.glob("runs/*/*/*.ipynb"):
        assert "widget-view" not in path.read_text()


def table_of_digits(directory: Path) -> pd.DataFrame:
    """By configuration."""
    table = results.collect(str(directory))
    return table[table["dataset"] == "mnist5k"].set_index("configuration")


def test_a_run_chooses_one_of_all_configurations(whole_run, choice):
    table = table_of_digits(whole_run.directory)
    chosen = choice["configuration"]
    assert {*table.index} == {"base", "top_k_0.1", "top_k_0.3", chosen}
    for name, is_chosen in table["chosen"].items():
        assert is_chosen == (name == chosen)


def test_a_run_prints_what_the_choice_is_worth(whole_run, choice):
    table = table_of_digits(whole_run.directory)
    others = table.loc[["top_k_0.1", "top_k_0.3"], "worst_group"]
    configurations = ["base", others.idxmax(), choice["configuration"]]
    for name in ("raw", "biased", "worst_group"):
        shares = 100 * table.loc[configurations, name]
        numbers = " +".join(f"{share:.2f}" for share in shares)
        title = name.replace("_", " ")
        assert re.search(rf"{title} +{numbers}\n", whole_run.printed)
    assert "best of the others, by the test sets" in whole_run.printed
    assert f"seed 0: {choice['reason']}" in whole_run.printed
    for kind in ("checkpoints", "results", "runs", "figures"):
        assert str(tiny(whole_run.directory).folder(kind)) in whole_run.printed


def test_what_was_chosen_is_exported_for_other_programs(directory, choice, capsys):
    options = [*OPTIONS, "--directory", str(directory)]
    assert command.main(["export", *options]) == 0
    folder = tiny(directory).folder("results") / "export"
    assert f"export: {folder}" in capsys.readouterr().out
    weights = torch.load(folder / "weights.pth", weights_only=True)
    path = tiny(directory).checkpoint_path(choice["configuration"])
    saved = store.load_checkpoint(path).model.state_dict()
    assert weights.keys() == saved.keys()
    assert all(torch.equal(weights[name], saved[name]) for name in weights)
    mistakes = pd.read_csv(folder / "mistakes.csv")
    assert mistakes["image"].tolist() == choice["mistake_numbers"]
    assert len(mistakes) == choice["mistakes"]
    if choice["configuration"] != "base":
        masks = np.load(folder / "masks.npz")["masks"]
        assert masks.shape == (200, 28, 28)
    nothing = [*options, "--seed", "5"]
    assert command.main(["export", *nothing]) == 2
    assert "run masktune choose first" in capsys.readouterr().err


def test_exported_weights_of_photographs_have_the_keys_of_the_network(
    whole_run, tmp_path
):
    folders = {f"{part}_folder": f"{whole_run.directory}/{part}" for part in PARTS}
    settings = Settings(
        **folders,
        dataset="folder",
        model="resnet18",
        image_size=64,
        epochs=1,
        batch_size=20,
        directory=str(tmp_path),
    )
    train = datasets.load(settings).train
    base = experiment.base_model(settings, train)
    candidate = settings.replace(method="mean_std", param=1.0, cross_fit=True)
    experiment.choose([candidate], base, train)
    folder = experiment.export(settings)
    weights = torch.load(folder / "weights.pth", weights_only=True)
    assert "conv1.weight" in weights
    mistakes = pd.read_csv(folder / "mistakes.csv")
    assert len(mistakes) > 0
    for number, path in zip(mistakes["image"], mistakes["path"], strict=True):
        with Image.open(path) as image:
            small = image.convert("RGB").resize((64, 64), Image.Resampling.BILINEAR)
        expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)
        assert torch.equal(train.images[number], expected)
    few = settings.replace(limit=30)
    train = datasets.load(few).train
    base = experiment.base_model(few, train)
    few_candidate = candidate.replace(limit=30)
    experiment.choose([few_candidate], base, train)
    mistakes = pd.read_csv(experiment.export(few) / "mistakes.csv")
    assert "path" not in mistakes  # whose numbers are others


def test_folders_of_three_classes_go_through_all_notebooks(whole_run):
    table = results.collect(str(whole_run.directory))
    table = table[table["dataset"] == "folder"]
    assert {"base", "top_k_0.1"} <= {*table["configuration"]}
    assert table["chosen"].eq(True).sum() == 1
    assert table["test_class_2"].between(0, 1).all()
    assert table["raw"].isna().all()
    names = executed(whole_run.directory, "folder")
    assert {name[:2] for name in names} == NOTEBOOKS_OF_A_RUN


@pytest.mark.usefixtures("all_cores")
def test_what_is_done_is_skipped_and_force_does_a_configuration_again(directory):
    before = times_of_writing(directory)
    assert masktune(directory, "--param", "0.1", "0.3") == 0
    assert times_of_writing(directory) == before
    assert masktune(directory, "--param", "0.1", "--force") == 0
    after = times_of_writing(directory)
    assert before.keys() == after.keys()
    again = {path.name for path in before if before[path] != after[path]}
    assert "04_finetune_sweep_top_k_0.1.ipynb" in again
    trained = [name for name in again if name.endswith(".pth")]
    assert trained == [tiny(directory).checkpoint_path("top_k_0.1").name]
    # it was alone, and had all cores
    assert checked_results(directory)["top_k_0.1"]["threads"] == cpu_count()


def test_a_dry_run_shows_what_is_done_and_runs_nothing(directory, capsys):
    before = times_of_writing(directory)
    options = [*OPTIONS, "--directory", str(directory), "--param", "0.3", "0.5"]
    printed = dry_run(capsys, *options)
    assert times_of_writing(directory) == before
    assert printed.startswith("2 configurations, images: mnist5k, device: ")
    states = "done .*=20 seed0 top_k_0.3\n     .*=20 seed0 top_k_0.5\n"
    assert re.search(states, printed)
    assert printed.endswith("1 of them are done\n")


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
    _, *lines, last = printed.splitlines()
    assert {line.strip() for line in lines} == expected
    assert len(lines) == 12
    assert last == "0 of them are done"


def test_a_grid_may_name_its_notebook(directory, capsys):
    file = directory / "grid.yaml"
    file.write_text("- notebook: 02_erm\n  seed: [0, 1]\n")
    options = [*OPTIONS, "--directory", str(directory)]
    options = [option for option in options if option not in ("--method", "top_k")]
    printed = dry_run(capsys, str(file), *options)
    states = "done .*=20 seed0 base\n     .*=20 seed1 base\n1 of them"
    assert re.search(states, printed)
    assert command.main(["sweep", str(file), *options]) == 0
    (copy,) = tiny(directory, seed=1).folder("runs").iterdir()
    assert copy.name == "02_erm.ipynb"
    assert command.main(["choose", str(file), *options]) == 2
    message = "notebook is '02_erm'; allowed, except with sweep: 04_finetune_sweep"
    assert message in capsys.readouterr().err


def test_what_a_study_saves_for_each_seed_is_gathered(directory):
    file = directory / "grid.yaml"
    file.write_text("- notebook: 01_dataset\n  seed: [0, 1]\n")
    for seed in (0, 1):
        settings = Settings(directory=str(directory), dataset="mnist5k", seed=seed)
        folder = settings.folder("results")
        folder.mkdir(parents=True)
        (folder / "01_dataset.csv").write_text(f"seed,share\n{seed},0.5\n")
    options = ["--dataset", "mnist5k", "--directory", str(directory)]
    # the notebook trains nothing, and knows no retrain
    assert command.main(["sweep", str(file), *options, "--force"]) == 0
    gathered = directory / "results" / "01_dataset.csv"
    assert gathered.read_text() == "seed,share\n0,0.5\n1,0.5\n"


def test_the_grids_of_the_repository_are_valid(tmp_path, capsys):
    options = ["--dataset", "mnist5k", "--directory", str(tmp_path)]
    counts = {}
    for path in REPOSITORY.glob("sweeps/*.yaml"):
        if path.stem != "your_own":  # it needs the images of notebook 10
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


@pytest.fixture
def damaged(directory) -> list[Path]:
    """Two files that are no checkpoints: of a fine-tuned model, and of a base model."""
    paths = [
        tiny(directory).checkpoint_path("top_k_0.6"),
        tiny(directory, seed=1).checkpoint_path("base"),
    ]
    for path in paths:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"damaged")
    return paths


def test_a_failure_of_03_stops_nothing(tmp_path, monkeypatch):
    ran = []

    def run(job, together, force):
        ran.append(job.stem)
        return job, "a figure failed" if job.stem == jobs.BASE[1] else None

    monkeypatch.setattr(jobs.Job, "run", run)
    stems = (*jobs.BASE, "04_finetune_sweep")
    every = [jobs.make_stage(stem, [tiny(tmp_path)]) for stem in stems]
    errors = jobs.execute(every, count=1)
    assert ran == [*stems]
    assert [job.stem for job in errors] == [jobs.BASE[1]]


@pytest.mark.parametrize(("retrain", "force"), [(True, False), (False, True)])
def test_the_models_of_the_halves_are_trained_again_on_request(
    retrain, force, tmp_path, monkeypatch
):
    asked = []

    def choose(candidates, base, train, jobs, retrain):
        asked.append(retrain)
        return {"configuration": "base"}

    monkeypatch.setattr(stages.experiment, "choose", choose)
    settings = tiny(tmp_path, retrain=retrain)
    assert stages.choose("run", settings, [settings], 1, force) == []
    assert asked == [True]


def test_a_text_that_looks_like_a_number_is_taken_as_text():
    options = ["--directory", "2024", "--square-color", "0.5", "--param", "0.5"]
    arguments = command._parser().parse_args(["run", *options])
    assert arguments.directory == ["2024"]
    assert arguments.square_color == ["0.5"]
    assert arguments.param == [0.5]


@pytest.mark.usefixtures("all_cores")
def test_a_failure_is_named_and_stops_only_what_needs_it(directory, damaged, capsys):
    arguments = ["--param", "0.6", "0.8", "--seed", "0", "1"]
    assert masktune(directory, *arguments) == 1
    printed, error = capsys.readouterr()
    tuned, base = damaged
    experiment = tiny(directory).experiment
    missing = "not run, because its base model is missing"
    for line in (
        f"seed 0, 04_finetune_sweep_top_k_0.6: CheckpointError: {tuned} is damaged",
        f"seed 1, 02_erm: CheckpointError: {base} is damaged",
        f"seed 1, 03_saliency_masks: {missing}",
        f"seed 1, 04_finetune_sweep_top_k_0.8: {missing}",
    ):
        assert f"failed: {experiment}, {line}" in error
    assert "\n5 failed or not run" in printed
    assert "Traceback" not in error
    copies = sorted(directory.glob("runs/mnist5k*/*/*_failed.ipynb"))
    assert [path.stem[:2] for path in copies] == ["04", "02"]
    for path in copies:
        assert "CheckpointError" in path.read_text()
    for path in damaged:
        assert path.read_bytes() == b"damaged"
        path.unlink()
    saved = checked_results(directory)
    assert {"top_k_0.1", "top_k_0.3", "top_k_0.8"} < saved.keys()
    assert "top_k_0.6" not in saved
    assert saved["top_k_0.8"]["threads"] == max(1, cpu_count() // 2)  # two at once
    shown = dry_run(capsys, *OPTIONS, "--directory", str(directory), *arguments)
    assert re.findall("done .* (seed.*)", shown) == ["seed0 top_k_0.8"]


def test_a_choice_that_fails_is_named_and_made_once_its_cause_is_gone(
    directory, capsys
):
    file = directory / "two.yaml"
    file.write_text("- param: [0.1, 0.3]\n")
    options = [*OPTIONS, "--directory", str(directory), "--jobs", "1"]
    path = tiny(directory, fold=1).checkpoint_path("base")
    content = path.read_bytes()
    saved = tiny(directory).folder("results") / "chosen.json"
    written = saved.stat().st_mtime_ns
    path.write_bytes(b"damaged")
    assert command.main(["choose", str(file), *options]) == 1
    error = capsys.readouterr().err
    assert f"seed 0, choice: CheckpointError: {path} is damaged" in error
    assert "Traceback" not in error
    assert saved.stat().st_mtime_ns == written
    path.write_bytes(content)
    assert command.main(["choose", str(file), *options]) == 0
    printed = capsys.readouterr().out
    choice = checked_results(directory)["chosen"]
    names = ["top_k_0.1_cross_fit=True", "top_k_0.3_cross_fit=True"]
    assert choice["candidates"] == names
    assert f"seed 0: {choice['reason']}" in printed
    assert results.CHOSEN in printed


@pytest.fixture
def asked(monkeypatch) -> dict[str, list]:
    """What a command would execute and choose among; the base model of seed 1 fails."""
    asked = {"executed": [], "candidates": []}

    def execute(todo, count, force=False):
        asked["executed"].append((todo, force))
        listed = [job for stage in todo for job in stage]
        failing = [job for job in listed if job.stem == "02_erm" and job.settings.seed]
        return dict.fromkeys(failing, "failed")

    def choose(candidates, base, train, count, force):
        asked["candidates"].append(candidates)
        return {"configuration": "base"}

    monkeypatch.setattr(stages.jobs, "execute", execute)
    monkeypatch.setattr(stages.jobs, "write_page", lambda job: job.copy)
    monkeypatch.setattr(stages.experiment, "choose", choose)
    return asked


def test_without_a_base_model_nothing_is_chosen_and_notebook_05_not_run(
    asked, tmp_path
):
    grid = [tiny(tmp_path, seed=seed) for seed in (0, 1)]
    stages.run_stages("run", ["02_erm", "04_finetune_sweep"], grid, 1, force=True)
    [(_, first_force), (last, last_force)] = asked["executed"]
    assert first_force
    assert last_force
    assert [*filter(None, last)] == [jobs.make_stage("05_plots", grid[:1])]
    assert len(asked["candidates"]) == 1


def test_one_rule_that_is_given_is_the_candidate(asked, tmp_path):
    given = tiny(tmp_path, method="mean", param=0.5)
    stages.run_stages("choose", [*jobs.BASE], [given], 1, force=False)
    stages.run_stages("choose", [*jobs.BASE], [tiny(tmp_path)], 1, False)
    cross_fitted = given.replace(cross_fit=True)
    twice = [given, cross_fitted]
    stages.run_stages("choose", [*jobs.BASE], twice, 1, force=False)
    assert asked["candidates"][0] == [cross_fitted]
    assert len(asked["candidates"][1]) == 5
    assert asked["candidates"][2] == [cross_fitted]


def test_the_copy_of_a_failure_goes_once_the_notebook_went_through(
    tmp_path, monkeypatch
):
    (job,) = jobs.make_stage("02_erm", [tiny(tmp_path)])
    failed = job.copy.with_stem("02_erm_failed")
    problems = ["the disk is full"]

    def execute(_source, copy, *_arguments, **_options):
        copy.touch()
        if problems:
            raise RuntimeError(problems.pop())

    monkeypatch.setattr(jobs.papermill, "execute_notebook", execute)
    kept = SimpleNamespace(take=lambda _: contextlib.nullcontext())
    monkeypatch.setattr(jobs, "warm_kernels", kept)
    assert job.run(together=1) == (job, "RuntimeError: the disk is full")
    assert failed.exists()
    assert not job.copy.exists()
    assert job.run(together=1) == (job, None)
    assert not failed.exists()
    assert job.copy.exists()


def test_to_retrain_is_to_do_what_is_done(directory):
    (job,) = jobs.make_stage("02_erm", [tiny(directory)])
    finished = results.finished(str(directory))
    assert job.is_done(finished)
    again = job._replace(settings=job.settings.replace(retrain=True))
    assert not again.is_done(finished)


def test_the_command_of_the_readme_for_photographs(whole_run, tmp_path, capsys):
    readme = (REPOSITORY / "README.md").read_text()
    (line,) = re.findall(r"masktune (run --dataset folder .*)", readme)
    arguments = line.split()
    replacements = {
        "--train-folder": f"{whole_run.directory}/train",
        "--test-folder": f"{whole_run.directory}/test",
        "--weights": "",  # there is no network to download them
        "--epochs": "1",
    }
    for option, value in replacements.items():
        arguments[arguments.index(option) + 1] = value
    arguments += ["--limit", "20", "--directory", str(tmp_path), "--jobs", "2"]
    assert command.main(arguments) == 0
    printed = capsys.readouterr().out
    (experiment,) = (tmp_path / "results").glob("folder*")
    names = executed(tmp_path, experiment.name)
    assert {name[:2] for name in names} >= {"01", "02", "03", "05"}
    for name in names:
        assert not name.startswith("04") or "cross_fit" in name
    for kind in ("figures", "runs"):
        assert [path.name for path in (tmp_path / kind).iterdir()] == [experiment.name]
    assert "training images are predicted wrongly by ERM models" in printed
    assert "best of the others" not in printed


def test_a_folder_is_run_with_the_configurations_that_are_asked_for(whole_run, capsys):
    options = ["--dataset", "folder", "--directory", str(whole_run.directory)]
    options += ["--train_folder", f"{whole_run.directory}/train"]
    options += ["--test_folder", f"{whole_run.directory}/test"]
    options += ["--method", "mean_std", "--param", "1.0", "1.5", "--dry-run"]
    assert command.main(["run", *options]) == 0
    printed = capsys.readouterr().out
    for name in ("mean_std_1.0", "mean_std_1.5"):
        assert name in printed


def test_an_interrupt_ends_the_kernels_too_and_progress_is_seen_before(directory):
    options = ["--epochs", "10000", "--param", "0.1", "--seed", "0", "1", "--jobs", "2"]
    process = start(directory, *options)
    seen = ""
    while not re.search(r"ERM, epoch \d+/10000: +\d+%", seen):
        assert process.poll() is None, seen
        seen += process.stderr.read(1)
    running = kernels(process)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "masktune: interrupted" in error
    assert len(running) == 2
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive


def test_a_dask_cluster_loses_nothing_when_a_worker_is_killed(directory):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
    ):
        address = cluster.scheduler_address
        process = start(directory, "--param", "0.4", "0.5", "--dask", address)
        busy = []
        while not busy:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
            tasks = client.processing()
            busy = [worker for worker in tasks if tasks[worker]]
        (pid,) = client.run(os.getpid, workers=busy[:1]).values()
        os.kill(pid, signal.SIGKILL)
        _, error = process.communicate()
        assert process.returncode == 0, error
    assert {"top_k_0.4", "top_k_0.5"} < checked_results(directory).keys()
