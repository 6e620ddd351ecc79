import ast
import re
from pathlib import Path

import nbformat
import papermill
import pytest

from masktune_utils import evaluation, experiment, sweep
from masktune_utils.experiment import Settings

NOTEBOOKS = sorted(sweep.NOTEBOOKS.glob("*.ipynb"))
ORDER = ["data", "models", "training", "saliency", "masking", "experiment", "evaluation", "plotting", "sweep"]
TINY = ["--dataset", "mnist5k", "--epochs", "1", "-p", "limit", "200"]


def test_two_configurations_on_a_tiny_subset(tmp_path, capsys):
    other = Settings(directory=str(tmp_path), dataset="mnist5k", limit=200)  # a neighbour that must not be counted in
    experiment.write_json(other.folder("results") / "base.json", {"configuration": "base"})
    arguments = [*TINY, "--directory", str(tmp_path), "--methods", "top_k", "--params", "0.1", "0.3"]
    assert sweep.main(["run", *arguments]) == 0
    runs = tmp_path / "runs" / "mnist5k"
    assert (runs / "seed0_limit=200" / "01_dataset.ipynb").exists()  # it has no parameter of training
    assert [path.stem for path in sorted((runs / "seed0_limit=200_epochs=1").iterdir())] == [
        "02_erm",
        "03_saliency_masks",
        "04_finetune_sweep_top_k_0.1",
        "04_finetune_sweep_top_k_0.3",
        "05_plots",
    ]
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, epochs=1)
    results = evaluation.collect(settings.folder("results"))
    assert results["configuration"].tolist() == ["base", "top_k_0.1", "top_k_0.3"]
    printed = capsys.readouterr().out
    for row in results.itertuples():
        assert re.search(rf"{row.configuration} +{100 * row.raw:.2f} +{100 * row.biased:.2f}", printed)
        report = evaluation.evaluate_checkpoint(settings.checkpoint_path(row.configuration), "mnist5k")
        assert 0 <= report["raw"]["accuracy"] <= 1
    figures = sorted(tmp_path.glob("figures/*/*/*.png"))
    assert len(figures) == 11 and all(str(figure) in printed for figure in figures)
    assert all(figure.read_bytes().startswith(b"\x89PNG") for figure in figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--methods", "foo"], "method is 'foo'; allowed: 'threshold', 'top_k', 'mean'"),
        (["-p", "method", "foo"], "method is 'foo'; allowed: 'threshold', 'top_k', 'mean'"),
        (["-p", "param", "7"], "param is 7.0; allowed for method"),
        (["--params", "7"], "param is 7.0; allowed for method"),
        (["--dataset", "cifar"], "dataset is 'cifar'; allowed: 'auto', 'mnist', 'mnist5k'"),
        (["--epoch", "3"], "unknown arguments: --epoch 3"),
        (["-p", "metod", "top_k"], "unknown parameter 'metod'; allowed: directory, dataset"),
        (["-p", "momentum", "0.5"], "unknown parameter 'momentum'"),  # a setting, but of no notebook
        (["--epochs", "0"], "epochs is 0; allowed: 1 to"),
        (["--seeds", "x"], "invalid int value: 'x'"),
        (["-p", "limit", "many"], "limit is 'many'"),
    ],
)
def test_bad_arguments_end_the_command_before_anything_runs(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "run", lambda grid: pytest.fail("started"))
    with pytest.raises(SystemExit) as stop:
        sweep.main(["run", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_single_parameter_takes_the_place_of_the_option(monkeypatch):
    grids = []
    monkeypatch.setattr(sweep, "run", lambda grid: grids.append(grid) or 0)
    assert (
        sweep.main(["run", *TINY, "-p", "method", "mean", "--params", "0.1", "0.1", "-p", "finetune_lr", "1e-3"]) == 0
    )
    (settings,) = grids[0]
    assert (settings.method, settings.param, settings.finetune_lr, settings.limit) == ("mean", 0.1, 0.001, 200)


def test_a_failing_notebook_is_named_and_ends_the_command_with_1(tmp_path, capsys):
    settings = Settings(directory=str(tmp_path), dataset="mnist5k", limit=200, epochs=1)
    path = settings.checkpoint_path("base")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"damaged")
    arguments = [*TINY, "--directory", str(tmp_path), "--methods", "mean", "--params", "0.9"]
    assert sweep.main(["run", *arguments]) == 1
    error = capsys.readouterr().err
    assert "02_erm failed: CheckpointError" in error and "02_erm.ipynb" in error
    assert path.read_bytes() == b"damaged"


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"methd": "top_k"}, "unknown parameter methd; this notebook has: directory, dataset"),
        ({"method": "foo"}, "method is 'foo'; allowed: 'threshold', 'top_k', 'mean'"),
    ],
)
def test_papermill_alone_stops_at_bad_parameters(parameters, message, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match=message):
        papermill.execute_notebook(
            sweep.NOTEBOOKS / "04_finetune_sweep.ipynb",
            tmp_path / "out.ipynb",
            {"directory": str(tmp_path), "dataset": "mnist5k", **parameters},
            progress_bar=False,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["out.ipynb"]


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
    assert max(len(cell.source.splitlines()) for cell in code) <= 25


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
