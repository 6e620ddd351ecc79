import ast
import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import psutil
import pytest
from conftest import MASKTUNE
from joblib import cpu_count
from nbclient.exceptions import DeadKernelError
from PIL import Image

from masktune_utils import evaluation, experiment, sweep
from masktune_utils.experiment import Settings

NOTEBOOKS = sorted(sweep.NOTEBOOKS.glob("*.ipynb"))
ORDER = [
    "progress",
    "data",
    "models",
    "training",
    "saliency",
    "masking",
    "experiment",
    "evaluation",
    "plotting",
    "explorer",
    "sweep",
]
TINY = ["--dataset", "mnist5k", "--epochs", "1", "-p", "limit", "200", "--methods", "top_k"]


def tiny(directory: Path, **kwargs) -> Settings:
    return Settings(directory=str(directory), dataset="mnist5k", limit=200, epochs=1, **kwargs)


def start(directory: Path, *arguments: str) -> subprocess.Popen:
    """`masktune sweep` in a process group of its own, which hears Ctrl-C even where this one was started deaf to it."""
    code = "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "from masktune_utils.sweep import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "sweep", *TINY, "--directory", str(directory), *arguments]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


def results(directory: Path) -> dict[str, dict]:
    """The results of a directory by configuration, after a look that all that is saved is whole."""
    for path in directory.glob("checkpoints/*/*/CNN_checkpoint_*.pth"):
        experiment.load_checkpoint(path)
    for path in directory.glob("runs/*/*/*.ipynb"):
        nbformat.read(path, as_version=4)
    return {path.stem: json.loads(path.read_bytes()) for path in directory.glob("results/*/*/*.json")}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory) -> tuple[Path, str]:
    """A directory after `masktune run` with two configurations, and what that printed."""
    directory = tmp_path_factory.mktemp("run")
    other = Settings(directory=str(directory), dataset="mnist5k", limit=200).folder("results") / "base.json"
    other_result = {"experiment": "mnist5k_limit=200", "configuration": "base", "seed": 0, "worst_group": 0.0}
    other_result |= {test: {"accuracy": 0.0, "class_accuracy": [0.0, 0.0]} for test in ("raw", "biased")}
    other_result |= {"sha256": "", "base_sha256": "", "settings": {}, "seconds": 0, "device": "", "threads": 1}
    experiment.write_json(other, other_result | {"versions": {"torch": ""}})  # a neighbour, not to be counted in
    command = [MASKTUNE, "run", *TINY, "--params", "0.1", "0.3", "--directory", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    other.unlink()
    return directory, done.stdout


@pytest.fixture
def directory(whole_run, tmp_path) -> Path:
    """A copy of that directory, to do things to."""
    return shutil.copytree(whole_run[0], tmp_path / "copy")


def test_two_configurations_on_a_tiny_subset(whole_run):
    directory, printed = whole_run
    runs = directory / "runs" / "mnist5k"
    assert (runs / "seed0_limit=200" / "01_dataset.ipynb").exists()  # it has no parameter of training
    assert [path.stem for path in sorted((runs / "seed0_limit=200_epochs=1").iterdir())] == [
        "02_erm",
        "03_saliency_masks",
        "04_finetune_sweep_top_k_0.1",
        "04_finetune_sweep_top_k_0.3",
        "05_plots",
    ]
    table = evaluation.collect(str(directory))
    assert table["configuration"].tolist() == ["base", "top_k_0.1", "top_k_0.3"]
    for row in table.itertuples():
        assert re.search(rf"{row.configuration} +{100 * row.raw:.2f} +{100 * row.biased:.2f} .* 1\n", printed)
    figures = sorted(directory.glob("figures/*/*/*.png"))
    assert len(figures) == 21 and all(str(figure) in printed for figure in figures)
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


def test_folders_of_three_classes_go_through_all_notebooks(tmp_path):
    for part, count in {"train": 20, "test": 5}.items():
        for name, color in {"a": "red", "b": "lime", "c": "blue"}.items():
            (tmp_path / part / name).mkdir(parents=True)
            for k in range(count):
                Image.new("RGB", (30 + k, 30), color).save(tmp_path / part / name / f"{k}.png")
    folders = ["-p", "train_folder", str(tmp_path / "train"), "-p", "test_folder", str(tmp_path / "test")]
    arguments = ["--epochs", "2", "-p", "batch_size", "8", "--methods", "top_k", "--params", "0.1"]
    assert sweep.main(["run", "--dataset", "folder", *folders, *arguments, "--directory", str(tmp_path)]) == 0
    for result in results(tmp_path).values():
        assert len(result["raw"]["class_accuracy"]) == 3 and result["raw"] == result["biased"]
    assert len(results(tmp_path)) == 2 and not list(tmp_path.glob("runs/*/*/*.log"))


def test_the_bar_says_how_far_the_running_notebooks_are(tmp_path):
    job = sweep.job("02_erm", tiny(tmp_path))
    job.log.parent.mkdir(parents=True)
    line = "\rERM:  {}%|##   | 43.6k/180k [00:05<00:{}, 8.71kimage/s, loss 0.1, accuracy 99.00%]"
    printed = "Digits: mnist.\n" + line.format(1, 59) + line.format(24, 15)
    job.log.write_bytes(b"\xff" + printed.encode())  # read in the middle of a character, perhaps
    with sweep.tqdm(total=1, file=io.StringIO(), postfix="1 skipped") as bar:
        with sweep._watching(bar, [job, sweep.job("03_saliency_masks", tiny(tmp_path))], seconds=0.01):
            while "ERM" not in bar.postfix:
                time.sleep(0.01)
            assert bar.postfix == "1 skipped; seed 0 ERM:  24%, 00:15 left"
        assert bar.postfix == "1 skipped"


def test_kernels_side_by_side_share_the_cores(whole_run):
    threads = {name: result["threads"] for name, result in results(whole_run[0]).items()}
    assert threads["base"] == cpu_count()
    assert threads["top_k_0.1"] == threads["top_k_0.3"] == cpu_count() // min(2, cpu_count())


def test_what_is_done_is_skipped_and_force_does_it_again(directory, capsys, monkeypatch):
    before = results(directory)
    arguments = ["sweep", *TINY, "--params", "0.1", "--directory", str(directory)]
    with monkeypatch.context() as patch:
        patch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("executed"))
        assert sweep.main(arguments) == 0
    assert "3 skipped" in capsys.readouterr().err
    path = tiny(directory).checkpoint_path("top_k_0.1")
    written = path.stat().st_mtime_ns
    assert sweep.main([*arguments, "--force"]) == 0
    assert "2 skipped" in capsys.readouterr().err
    assert path.stat().st_mtime_ns != written
    after = results(directory)
    assert before.keys() == after.keys() and before["base"] == after["base"]
    assert before["top_k_0.1"]["seconds"] != after["top_k_0.1"]["seconds"]


def test_a_sweep_killed_at_any_moment_goes_on_to_the_same_bits(directory, whole_run):
    for path in [*directory.rglob("*top_k*"), *directory.rglob("base.json"), *directory.rglob("*02_erm*")]:
        path.unlink()
    arguments = ["--params", "0.1", "0.3", "--seeds", "0", "1"]
    for moment in (4, 8, 13):
        sweeping = start(directory, *arguments)
        time.sleep(moment)
        os.killpg(sweeping.pid, signal.SIGKILL)
        sweeping.wait()
        results(directory)
    done = start(directory, *arguments)
    _, error = done.communicate()
    assert done.returncode == 0, error
    table = evaluation.collect(str(directory))
    assert sorted(zip(table["seed"], table["configuration"], strict=True)) == [
        (seed, name) for seed in (0, 1) for name in ("base", "top_k_0.1", "top_k_0.3")
    ]
    expected = {name: result["sha256"] for name, result in results(whole_run[0]).items()}
    found = table[table["seed"] == 0].configuration
    seed_0 = {path.stem: json.loads(path.read_bytes()) for path in directory.glob("results/*/seed0_*/*.json")}
    assert len(found) == 3 and {name: result["sha256"] for name, result in seed_0.items()} == expected


def test_two_sweeps_at_once_do_no_harm(directory):
    both = [start(directory, "--params", "0.5") for _ in range(2)]
    for sweeping in both:
        _, error = sweeping.communicate()
        assert sweeping.returncode == 0, error
    assert results(directory).keys() == {"base", "top_k_0.1", "top_k_0.3", "top_k_0.5"}


def test_a_failing_configuration_stops_no_other_and_is_named(directory):
    path = tiny(directory).checkpoint_path("top_k_0.6")
    path.write_bytes(b"damaged")
    sweeping = start(directory, "--params", "0.6", "0.8")
    _, error = sweeping.communicate()
    assert sweeping.returncode == 1
    copy = directory / "runs" / "mnist5k" / "seed0_limit=200_epochs=1" / "04_finetune_sweep_top_k_0.6.ipynb"
    assert f"failed: 04_finetune_sweep_top_k_0.6, seed 0: CheckpointError: {path} is damaged" in error
    assert str(copy) in error and "CheckpointError" in copy.read_text()
    assert path.read_bytes() == b"damaged"
    path.unlink()
    assert results(directory).keys() == {"base", "top_k_0.1", "top_k_0.3", "top_k_0.8"}


def test_a_kernel_that_dies_is_named(directory, capsys, monkeypatch):
    def die(*_args, **_kwargs):
        raise DeadKernelError("Kernel died")

    monkeypatch.setattr(papermill, "execute_notebook", die)
    assert sweep.main(["sweep", *TINY, "--params", "0.9", "--directory", str(directory)]) == 1
    assert "failed: 04_finetune_sweep_top_k_0.9, seed 0: DeadKernelError: Kernel died" in capsys.readouterr().err


def test_a_notebook_that_failed_is_not_done(directory):
    job = sweep.job("03_saliency_masks", tiny(directory))
    assert job.done()
    copy = experiment.read_json(job.copy)
    copy["metadata"]["papermill"]["exception"] = True
    experiment.write_json(job.copy, copy)
    assert not job.done()


def test_a_damaged_result_is_named_and_costs_the_table_alone(directory, capsys):
    other = directory / "results" / "mnist5k" / "seed7" / "base.json"
    other.parent.mkdir()
    other.write_text('{"raw": ')
    assert sweep.main(["sweep", *TINY, "--params", "0.1", "--directory", str(directory)]) == 1
    printed = capsys.readouterr()
    assert f"masktune: no table: {other} is damaged" in printed.err and "0 notebooks failed" in printed.out
    assert other.read_text() == '{"raw": '


def test_a_result_that_is_damaged_is_named_and_not_replaced(directory, capsys):
    path = tiny(directory).folder("results") / "top_k_0.1.json"
    path.write_text("[]")
    assert sweep.main(["sweep", *TINY, "--params", "0.1", "--directory", str(directory)]) == 1
    error = capsys.readouterr().err
    assert f"failed: 04_finetune_sweep_top_k_0.1, seed 0: ValueError: {path} is damaged (no dict). Delete it" in error
    assert path.read_text() == "[]"


def test_configurations_without_a_base_model_are_not_run(directory, capsys, monkeypatch):
    path = tiny(directory).checkpoint_path("base")
    path.write_bytes(b"damaged")
    tiny(directory).folder("results").joinpath("base.json").unlink()
    assert sweep.main(["sweep", *TINY, "--params", "0.1", "--directory", str(directory)]) == 1
    error = capsys.readouterr().err
    assert "failed: 02_erm, seed 0: CheckpointError" in error
    assert "failed: 04_finetune_sweep_top_k_0.1, seed 0: not run, for want of its base model" in error
    assert path.read_bytes() == b"damaged"


def test_an_interrupt_ends_the_kernels_too(directory):
    sweeping = start(directory, "--params", *(f"0.{tenth}" for tenth in range(4, 10)))
    kernels = []
    while not kernels and sweeping.poll() is None:
        time.sleep(0.2)
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(sweeping.pid).children(recursive=True)
            kernels = [child for child in children if "ipykernel_launcher" in " ".join(child.cmdline())]
    time.sleep(2)
    os.killpg(sweeping.pid, signal.SIGINT)
    _, error = sweeping.communicate(timeout=30)
    assert sweeping.returncode == 130 and "interrupted" in error
    _, alive = psutil.wait_procs(kernels, timeout=10)
    assert kernels and not alive
    assert len(results(directory)) < 9


def test_a_dask_cluster_loses_nothing_when_a_worker_is_killed(directory):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        sweeping = start(directory, "--params", "0.4", "0.5", "0.6", "--dask", cluster.scheduler_address)
        while not any(client.processing().values()) and sweeping.poll() is None:
            time.sleep(0.2)
        time.sleep(4)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        _, error = sweeping.communicate()
        assert sweeping.returncode == 0, error
    names = {"base", *(f"top_k_0.{tenth}" for tenth in (1, 3, 4, 5, 6))}
    assert results(directory).keys() == names
    assert all(results(directory)[f"top_k_0.{tenth}"]["threads"] == 1 for tenth in (4, 5, 6))


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ([], {}),
        (["--methods", "top_k", "--params", "0.1"], {"method": "top_k", "param": 0.1}),
        (["-p", "square_size", "6"], {"square_size": 6}),
    ],
)
def test_a_preset_is_where_a_grid_starts_from(arguments, changed, monkeypatch):
    grids = []
    monkeypatch.setattr(sweep, "run", lambda grid, **kwargs: grids.append(grid))
    sweep.main(["sweep", "--dataset", "mnist5k", "--preset", "paper", *arguments])
    directory = str(experiment.REPOSITORY)
    preset = experiment.PRESETS["paper"] | changed
    assert grids == [[Settings(directory=directory, dataset="mnist5k", **preset)]]


def test_values_of_a_parameter_are_a_dimension_of_the_grid(monkeypatch):
    grids = []
    monkeypatch.setattr(sweep, "run", lambda grid, **_: grids.append(grid) or 0)
    sweep.main(["sweep", *TINY, "--params", "0.1", "0.3", "--seeds", "0", "1", "-p", "upsample", "map", "nearest"])
    found = {(settings.param, settings.seed, settings.upsample) for settings in grids[0]}
    assert len(grids[0]) == 8 and found == {(p, s, u) for p in (0.1, 0.3) for s in (0, 1) for u in ("map", "nearest")}


def test_a_single_parameter_takes_the_place_of_the_option(monkeypatch):
    grids = []
    monkeypatch.setattr(sweep, "run", lambda grid, **_: grids.append(grid) or 0)
    assert (
        sweep.main(["run", *TINY, "-p", "method", "mean", "--params", "0.1", "0.1", "-p", "finetune_lr", "1e-3"]) == 0
    )
    (settings,) = grids[0]
    assert (settings.method, settings.param, settings.finetune_lr, settings.limit) == ("mean", 0.1, 0.001, 200)


def test_no_module_imports_one_that_comes_after_it():
    package = Path(sweep.__file__).parent
    assert {path.stem for path in package.glob("*.py")} == {*ORDER, "__init__"}
    for position, name in enumerate(ORDER):
        for node in ast.walk(ast.parse((package / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("masktune_utils"):
                parts = node.module.split(".")[1:] or [alias.name for alias in node.names]
                assert all(ORDER.index(part) < position for part in parts), f"{name} imports {parts}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_committed_as_executed_top_to_bottom(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert str(experiment.REPOSITORY) not in path.read_text()
    assert path.stat().st_size < 1_000_000
    long = [cell for cell in code if len(cell.source.splitlines()) > 25]
    assert all("parameters" in cell.metadata.get("tags", []) for cell in long)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_are_literals_with_the_defaults_of_the_settings(path):
    cells = [cell for cell in nbformat.read(path, as_version=4).cells if "parameters" in cell.metadata.get("tags", [])]
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(cells[0].source).body}
    defaults = vars(Settings())
    assert len(cells) == 1
    assert {name: value for name, value in values.items() if name in defaults} == {
        name: defaults[name] for name in values if name in defaults
    }
    assert set(values) - set(defaults) <= {"base_model", "finetuned_model"}


def test_readme_lists_every_parameter_of_every_notebook():
    rows = re.findall(
        r"^\| `(\w+)` \| `.*?` \|(.*)\| .* \|$", (experiment.REPOSITORY / "README.md").read_text(), re.MULTILINE
    )
    listed = {
        (name, stem) for name, dots in rows for stem, dot in zip("12345", dots.split("|"), strict=True) if "●" in dot
    }
    assert listed == {(name, path.stem[1]) for path in NOTEBOOKS for name in sweep.notebook_parameters(path.stem)}
