"""The command `masktune`, and the notebooks that it executes."""

import ast
import json
import os
import re
import signal
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from joblib import cpu_count
from tiny_runs import OPTIONS, kernels, masktune, start, tiny

from masktune_utils import results, store
from masktune_utils.runner import command, jobs
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings

pytest_plugins = ["tiny_runs"]
NOTEBOOKS = sorted(jobs.NOTEBOOKS.glob("*.ipynb"))
ORDER = "progress models strict settings images data shortcuts training saliency masking store "
ORDER += "evaluation experiment selection plotting kernels sweep command"
OWN = {  # defaults of notebooks that differ from those of the settings
    "07_limits": {"dataset": "mnist5k", "shortcut": "two_squares"},
    "08_alternatives": {"dataset": "mnist5k", "validation_share": 0.2},
    "09_selective": {"dataset": "mnist5k", "validation_share": 0.2},
    "10_your_own": {"dataset": "folder", "image_size": 64, "model": "resnet18"}
    | {"epochs": 10, "batch_size": 32},
}


def results(directory: Path) -> dict[str, dict]:
    """The results of the digits with seed 0, after a look that all that is saved is whole."""
    for path in directory.glob("checkpoints/*/*/CNN_checkpoint_*.pth"):
        store.load_checkpoint(path)
    for path in directory.glob("runs/*/*/*.ipynb"):
        nbformat.read(path, as_version=4)
    found = directory.glob("results/mnist5k*/seed0/*.json")
    return {path.stem: json.loads(path.read_bytes()) for path in found}


def changes(directory: Path) -> dict[Path, int]:
    """When each file was written, without the table that every run writes."""
    files = (path for path in directory.rglob("*.*") if path.name != "results.csv")
    return {path: path.stat().st_mtime_ns for path in files}


def dry_run(capsys, *arguments: str) -> str:
    assert command.main(["sweep", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_run_executes_every_notebook_and_prints_a_table(whole_run):
    directory, code, printed, error = whole_run
    assert code == 0, error
    runs = directory / "runs"
    assert (runs / "mnist5k_limit=200" / "seed0" / "01_dataset.ipynb").exists()
    names = [path.stem for path in sorted(tiny(directory).folder("runs").iterdir())]
    choice = results.read_choice(tiny(directory).folder("results") / "chosen.json")
    kept = choice["configuration"] == "base"
    stages = (
        ["02", "03", "04", "04", "05"] if kept else ["02", "03", "04", "04", "04", "05"]
    )
    assert [name[:2] for name in names] == stages
    table = results.collect(str(directory))
    table = table[table["dataset"] == "mnist5k"].set_index("configuration")
    expected = {"base", "top_k_0.1", "top_k_0.3", choice["configuration"]}
    assert {*table.index} == expected
    assert table["chosen"].to_dict() == {
        name: name == choice["configuration"] for name in table.index
    }
    others = table.loc[["top_k_0.1", "top_k_0.3"], "worst_group"]
    rows = {"ERM": "base", "best of the others, by the test sets": others.idxmax()}
    for name, configuration in (
        rows | {results.CHOSEN: choice["configuration"]}
    ).items():
        row = table.loc[configuration]
        numbers = f"{100 * row.raw:.2f} +{100 * row.biased:.2f} +{100 * row.worst_group:.2f} +1\n"
        assert re.search(rf"{name} +{numbers}", printed)
    assert f"seed 0: {choice['reason']}" in printed
    sentence = (
        "In its worst group, ERM is right on {:.1%} of the images; what was chosen, on {:.1%}."
    )
    worst = table.loc[["base", choice["configuration"]], "worst_group"]
    assert sentence.format(*worst) in printed
    assert (tiny(directory).folder("figures") / "05_chosen.png").exists() != kept
    for kind in ("checkpoints", "results", "runs", "figures"):
        assert str(tiny(directory).folder(kind)) in printed
    figures = {path.name[:2] for path in directory.glob("figures/*/*/*.png")}
    assert figures == {"01", "02", "03", "04", "05"}
    assert not [
        path for path in runs.rglob("*.ipynb") if "widget-view" in path.read_text()
    ]


def test_folders_of_three_classes_go_through_all_notebooks(whole_run):
    table = (
        results.collect(str(whole_run.directory)).set_index("dataset").loc[["folder"]]
    )
    assert {"base", "top_k_0.1"} <= {*table["configuration"]}
    assert table["chosen"].eq(True).sum() == 1
    assert table["test_class_2"].between(0, 1).all() and table["raw"].isna().all()
    copies = [
        path.stem[:2] for path in whole_run.directory.glob("runs/folder*/seed0/*.ipynb")
    ]
    assert {*copies} == {"01", "02", "03", "04", "05"}


def test_what_is_done_is_skipped_and_force_does_a_configuration_again(
    directory, all_cores
):
    before = changes(directory)
    assert masktune(directory, "--param", "0.1", "0.3") == 0
    assert changes(directory) == before
    assert masktune(directory, "--param", "0.1", "--force") == 0
    after = changes(directory)
    again = {path.name for path in before if before[path] != after[path]}
    assert (
        before.keys() == after.keys() and "04_finetune_sweep_top_k_0.1.ipynb" in again
    )
    trained = [name for name in again if name.endswith(".pth")]
    assert trained == [tiny(directory).checkpoint_path("top_k_0.1").name]
    assert results(directory)["top_k_0.1"]["threads"] == cpu_count()  # it had all cores


def test_a_dry_run_shows_what_is_done_and_runs_nothing(directory, capsys):
    before = changes(directory)
    options = [*OPTIONS, "--directory", str(directory), "--param", "0.3", "0.5"]
    printed = dry_run(capsys, *options)
    assert changes(directory) == before
    assert printed.startswith("2 configurations, images: mnist5k, device: ")
    assert re.search(
        "done .*=20 seed0 top_k_0.3\n     .*=20 seed0 top_k_0.5\n", printed
    )
    assert printed.endswith("1 of them are done\n")


def test_options_win_over_the_blocks_of_a_grid_file(tmp_path, capsys):
    file = tmp_path / "grid.yaml"
    first, second = (
        "{method: [mean, top_k], param: 0.5, epochs: 7}",
        "{dilation: 2, epochs: 9}",
    )
    file.write_text(f"- {first}\n- {second}\n")
    given = [
        "--dataset",
        "mnist5k",
        "--param",
        "0.1",
        "0.3",
        "--seed",
        "0",
        "1",
        "--epochs",
        "3",
    ]
    printed = dry_run(capsys, str(file), *given, "--directory", str(tmp_path))
    names = [
        f"{method}_{param}" for param in (0.1, 0.3) for method in ("mean", "top_k")
    ]
    names += ["top_k_0.1_dilation=2", "top_k_0.3_dilation=2"]
    expected = {
        f"mnist5k_epochs=3 seed{seed} {name}" for seed in (0, 1) for name in names
    }
    assert {line.strip() for line in printed.splitlines()[1:-1]} == expected
    assert printed.endswith("\n0 of them are done\n") and len(expected) == 12


def test_a_grid_may_name_its_notebook(directory, capsys):
    file = directory / "grid.yaml"
    file.write_text("- notebook: 02_erm\n  seed: [0, 1]\n")
    given = [*OPTIONS[:-2], "--directory", str(directory)]
    printed = dry_run(capsys, str(file), *given)
    assert re.search("done .*=20 seed0 base\n     .*=20 seed1 base\n1 of them", printed)
    for seed in (0, 1):
        folder = tiny(directory, seed=seed).folder("results")
        folder.mkdir(exist_ok=True)
        (folder / "02_erm.csv").write_text(f"seed,found\n{seed},0.5\n")
    assert command.main(["choose", str(file), *given]) == 2
    assert (
        "notebook is '02_erm'; allowed, except with sweep: 04_f"
        in capsys.readouterr().err
    )
    assert command.main(["sweep", str(file), *given]) == 0
    assert (
        directory / "results" / "02_erm.csv"
    ).read_text() == "seed,found\n0,0.5\n1,0.5\n"
    (copy,) = tiny(directory, seed=1).folder("runs").iterdir()
    assert copy.name == "02_erm.ipynb"
    file.write_text("- notebook: 01_dataset\n")
    first = ["--dataset", "mnist5k", "--directory", str(directory), "--force"]
    assert (
        command.main(["sweep", str(file), *first]) == 0
    )  # it trains nothing, and knows no retrain


def test_the_grids_of_the_repository_are_valid(tmp_path, capsys):
    given = ["--dataset", "mnist5k", "--directory", str(tmp_path)]
    files = sorted(REPOSITORY.glob("sweeps/*.yaml"))
    files = [
        path for path in files if path.stem != "your_own"
    ]  # needs images of notebook 10
    counts = {
        path.stem: int(dry_run(capsys, str(path), *given).split()[0]) for path in files
    }
    assert (counts["published"], counts["paper"]) == (15, 1)


def test_every_setting_is_an_option_and_the_help_tells_its_default(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        about = f"{field.description} (default: {DEFAULTS[name]!r})"
        value = r" VALUE( \[VALUE ...\])?"
        spellings = rf" --{name}{value}(, --{name.replace('_', '-')}{value})?"
        assert re.search(rf"{spellings} {re.escape(about)}", printed)


def test_a_failure_is_named_and_stops_only_what_needs_it(directory, capsys, all_cores):
    settings = {"top_k_0.6": tiny(directory), "base": tiny(directory, seed=1)}
    bad = [settings[name].checkpoint_path(name) for name in settings]
    for path in bad:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"damaged")
    arguments = ["--param", "0.6", "0.8", "--seed", "0", "1"]
    assert masktune(directory, *arguments) == 1
    printed, error = capsys.readouterr()
    missing = "not run, because its base model is missing"
    for line in (
        f"failed: 04_finetune_sweep_top_k_0.6, seed 0: CheckpointError: {bad[0]} is damaged",
        f"failed: 02_erm, seed 1: CheckpointError: {bad[1]} is damaged",
        f"failed: 03_saliency_masks, seed 1: {missing}",
        f"failed: 04_finetune_sweep_top_k_0.8, seed 1: {missing}",
    ):
        assert line in error
    assert "\n5 notebooks failed" in printed and "Traceback" not in error
    copies = sorted(directory.glob("runs/mnist5k*/*/*_failed.ipynb"))
    assert [path.stem[:2] for path in copies] == ["04", "02"]
    assert all("CheckpointError" in path.read_text() for path in copies)
    assert all(path.read_bytes() == b"damaged" for path in bad)
    for path in bad:
        path.unlink()
    found = results(directory)
    assert {
        "top_k_0.1",
        "top_k_0.3",
        "top_k_0.8",
    } < found.keys() and "top_k_0.6" not in found
    assert results(directory)["top_k_0.8"]["threads"] == max(
        1, cpu_count() // 2
    )  # two at once
    shown = dry_run(capsys, *OPTIONS, "--directory", str(directory), *arguments)
    assert re.findall("done .* (seed.*)", shown) == ["seed0 top_k_0.8"]


def test_a_choice_that_fails_is_named_and_made_once_its_cause_is_gone(
    directory, capsys
):
    file = directory / "two.yaml"
    file.write_text("- param: [0.1, 0.3]\n")
    arguments = [
        "choose",
        str(file),
        *OPTIONS,
        "--directory",
        str(directory),
        "--jobs",
        "1",
    ]
    path = tiny(directory, half=1).checkpoint_path("base")
    content, before = path.read_bytes(), changes(directory)
    path.write_bytes(b"damaged")
    assert command.main(arguments) == 1
    error = capsys.readouterr().err
    assert f"failed: choice, seed 0: CheckpointError: {path} is damaged" in error
    saved = tiny(directory).folder("results") / "chosen.json"
    assert "Traceback" not in error and changes(directory)[saved] == before[saved]
    path.write_bytes(content)
    assert command.main(arguments) == 0
    printed, choice = capsys.readouterr().out, results(directory)["chosen"]
    names = ["top_k_0.1_cross_fit=True", "top_k_0.3_cross_fit=True"]
    assert [*choice["candidates"]] == names
    assert f"seed 0: {choice['reason']}" in printed
    assert re.search(rf"{results.CHOSEN} +\d", printed)


def test_a_folder_is_run_without_the_published_rules_unless_a_grid_asks_for_them(
    whole_run, tmp_path, capsys
):
    folders = ["--train_folder", f"{whole_run.directory}/train"]
    folders += ["--test_folder", f"{whole_run.directory}/test"]
    given = ["--dataset", "folder", *folders, "--epochs", "2", "--batch_size", "20"]
    options = ["--directory", str(tmp_path), "--jobs", "2"]
    assert command.main(["run", *given, *options]) == 0
    printed = capsys.readouterr().out
    copies = [path.stem for path in tmp_path.glob("runs/*/*/*.ipynb")]
    assert not [
        name for name in copies if name.startswith("04") and "cross_fit" not in name
    ]
    assert {name[:2] for name in copies} >= {"01", "02", "03", "05"}
    assert "seed 0: ERM gets" in printed and "best of the others" not in printed


def test_an_interrupt_ends_the_kernels_too_and_progress_is_seen_before(directory):
    two = ["--seed", "0", "1", "--jobs", "2"]
    sweeping = start(directory, "--epochs", "10000", "--param", "0.1", *two)
    seen = ""
    while not re.search(r"ERM, epoch \d+/10000: +\d+%", seen):
        assert sweeping.poll() is None, seen
        seen += sweeping.stderr.read(1)
    running = kernels(sweeping)
    os.killpg(sweeping.pid, signal.SIGINT)
    _, error = sweeping.communicate(timeout=30)
    assert sweeping.returncode == 130 and "masktune: interrupted" in error
    assert len(running) == 2 and not psutil.wait_procs(running, timeout=10)[1]


def test_a_dask_cluster_loses_nothing_when_a_worker_is_killed(directory):
    distributed = pytest.importorskip("distributed")
    options = {"n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
    ):
        sweeping = start(
            directory, "--param", "0.4", "0.5", "--dask", cluster.scheduler_address
        )
        while not (
            busy := [worker for worker, tasks in client.processing().items() if tasks]
        ):
            assert sweeping.poll() is None, sweeping.stderr.read()
            time.sleep(0.1)
        os.kill(client.run(os.getpid, workers=busy[:1])[busy[0]], signal.SIGKILL)
        _, error = sweeping.communicate()
        assert sweeping.returncode == 0, error
    assert {"top_k_0.4", "top_k_0.5"} < results(directory).keys()


def test_no_module_imports_one_that_comes_after_it():
    package, order = Path(sweep.__file__).parent, ORDER.split()
    assert {path.stem for path in package.glob("*.py")} == {*order, "__init__"}
    for position, name in enumerate(order):
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            assert not isinstance(
                node, ast.Import
            ) or "masktune_utils" not in ast.unparse(node)
            if isinstance(node, ast.ImportFrom) and node.module.startswith(
                "masktune_utils"
            ):
                parts = node.module.split(".")[1:] or [
                    alias.name for alias in node.names
                ]
                assert set(parts) <= set(order[:position]), name


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request) -> nbformat.NotebookNode:
    """A notebook; `code` are its cells of code, the parameters first."""
    notebook = nbformat.read(request.param, as_version=4)
    notebook.path = request.param
    notebook.code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert notebook.code[0].metadata.tags == ["parameters"]
    return notebook


def test_notebooks_are_committed_as_executed_from_top_to_bottom(notebook):
    counts = [cell.execution_count for cell in notebook.code]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in notebook.code for output in cell.outputs]
    assert not [
        o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert not re.search("/(work|tmp|root|home)/", notebook.path.read_text())
    assert notebook.path.stat().st_size < 1_000_000


def test_notebooks_are_short(notebook):
    assert len(notebook.cells) <= 25
    assert [
        c.source for c in notebook.code[1:] if len(c.source.splitlines()) > 20
    ] == []


def test_parameters_are_literals_with_default_and_comment_of_the_settings(notebook):
    lines = [
        line
        for line in notebook.code[0].source.splitlines()
        if not line.startswith("# ")
    ]
    found = {name: line for name, _, line in (line.partition(" = ") for line in lines)}
    if notebook.path.stem == "05_plots":
        for name in ("base_model", "finetuned_model"):
            assert found.pop(name).startswith('""  # path of a checkpoint; empty: ')
    assert notebook.path.stem != "06_study" or found.keys() == {"directory"}
    for name, line in found.items():
        value, _, comment = line.partition("  # ")
        default = OWN.get(notebook.path.stem, {}).get(name, DEFAULTS[name])
        assert repr(ast.literal_eval(value)) == repr(default)
        assert comment == Settings.model_fields[name].description
