"""The command `masktune` where something fails: it is named, and the rest goes on."""

import multiprocessing
import os
import signal
import time
from unittest.mock import MagicMock, Mock

import papermill
import psutil
import pytest
from conftest import kernels_of, masktune, outcome, start, tiny

from masktune_utils.runner import jobs
from masktune_utils.settings import BaseSettings


@pytest.mark.slow
def test_a_failure_is_named_and_stops_only_what_needs_it(directory, capsys):
    """Two files that are no checkpoints: of a fine-tuned model, and of a base model."""
    tuned = tiny(directory).checkpoint_path("top_k_0.6")
    base = tiny(directory, seed=1).checkpoint_path("base")
    base.parent.mkdir()
    for path in (tuned, base):
        path.write_bytes(b"damaged")
    arguments = ["--param", "0.6", "0.8", "--seed", "0", "1"]
    assert masktune(directory, *arguments) == 1
    error = capsys.readouterr().err
    name = tiny(directory).experiment
    missing = "not run, because its base model is missing"
    for line in (
        f"seed0/04_finetune_sweep_top_k_0.6.ipynb: CheckpointError: {tuned} is damaged",
        f"seed1/02_erm.ipynb: CheckpointError: {base} is damaged",
        f"seed1/03_saliency_masks.ipynb: {missing}",
        f"seed1/04_finetune_sweep_top_k_0.8.ipynb: {missing}",
    ):
        assert f"failed: {directory}/runs/{name}/{line}" in error
    assert error.count("failed: ") == 5
    copies = sorted(directory.glob("runs/*/*/*_unfinished.ipynb"))
    assert [path.stem[:2] for path in copies] == ["04", "02"]
    for path in (tuned, base):
        assert path.read_bytes() == b"damaged"
    saved = outcome(directory)
    assert "top_k_0.8.json" in saved
    assert "top_k_0.6.json" not in saved


def test_a_notebook_gets_what_it_depends_on_and_its_share_of_the_cores(
    tmp_path, monkeypatch
):
    """Its copy keeps another name if the disk is full."""
    (job,) = jobs.make_stage("02_erm", [tiny(tmp_path)])
    execute = Mock(side_effect=OSError("the disk is full"))
    take = MagicMock()
    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(jobs.kernels, "take", take)
    monkeypatch.setattr(jobs, "cpu_count", lambda: 6)
    assert job.run(together=2) == "OSError: the disk is full"
    _, copy, values = execute.call_args.args
    assert copy == job.copy.with_stem(f"02_erm_{os.getpid()}_unfinished")
    assert values.keys() == BaseSettings.model_fields.keys()
    job.run(together=8)
    assert [taken.args for taken in take.call_args_list] == [(3,), (1,)]


def test_what_another_process_left_unfinished_is_not_taken_as_done(
    tmp_path, monkeypatch
):
    (job,) = jobs.make_stage("02_erm", [tiny(tmp_path)])
    other = multiprocessing.get_context("fork").Process(target=job.run, args=(1,))

    def execute(notebook, copy, *_, **__):
        if multiprocessing.parent_process():
            copy.write_text("a part")
            raise OSError("the disk is full")
        copy.write_text("the whole")
        other.start()
        other.join()

    monkeypatch.setattr(papermill, "execute_notebook", execute)
    monkeypatch.setattr(jobs.kernels, "take", MagicMock())
    assert job.run(together=1) is None
    assert job.copy.read_text() == "the whole"


def test_cores_are_shared_by_the_size_of_a_stage_whatever_of_it_is_done(
    tmp_path, monkeypatch
):
    """Else a sweep that goes on after a stop would have other bits."""
    shares = []
    monkeypatch.setattr(jobs.Job, "run", lambda _, together: shares.append(together))
    grid = [tiny(tmp_path, seed=seed) for seed in range(3)]
    stage = jobs.make_stage("03_saliency_masks", grid)
    stage[0].copy.parent.mkdir(parents=True)
    stage[0].copy.touch()
    jobs.execute([stage], 8)
    assert shares == [3, 3]


def wait_for(count, folder, pattern, process):
    """Until a process has made some files."""
    while len([*folder.glob(pattern)]) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_bytes(whole_run, tmp_path):
    """In another order than the run it is compared with, and without 01 and 05."""
    params = ["--param", "0.3", "0.1"]
    process = start(tmp_path, *params)
    wait_for(1, tmp_path, "checkpoints/*/*/CNN_saliency.pth", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert masktune(tmp_path, *params) == 0
    left = outcome(tmp_path)
    assert len(left) > 10
    assert left.items() <= outcome(whole_run.directory).items()


@pytest.mark.slow
def test_an_interrupt_ends_the_kernels_too(tmp_path):
    options = ["--epochs", "10000", "--param", "0.1", "--seed", "0", "1", "--jobs", "2"]
    process = start(tmp_path, *options)
    wait_for(2, tmp_path, "runs/*/*/02_erm_*_unfinished.ipynb", process)
    running = kernels_of(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "masktune: interrupted" in error
    assert len(running) == 2
    _, alive = psutil.wait_procs(running, timeout=10)
    assert not alive
