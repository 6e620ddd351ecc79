"""The formulas of notebook 08 against hand computations, and notebooks 07 to 10 on tiny data."""

import ast

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from masktune_utils.runner import jobs
from masktune_utils.settings import Settings


def functions(stem: str, *names: str) -> list:
    """Functions that a notebook defines; nothing else of it is executed."""
    cells = nbformat.read(jobs.NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    found = [
        node for node in ast.parse(code).body if getattr(node, "name", None) in names
    ]
    space = {"torch": torch, "F": F, "count": 2}
    exec(compile(ast.Module(found, []), stem, "exec"), space)  # noqa: S102
    return [space[name] for name in names]


def test_generalized_cross_entropy_has_the_gradient_of_its_formula():
    (loss,) = functions("08_alternatives", "generalized_cross_entropy")
    logits, labels = (
        torch.randn(7, 2, dtype=torch.double, requires_grad=True),
        torch.arange(7) % 2,
    )
    loss(logits, labels).sum().backward()
    found, logits.grad = logits.grad, None
    own = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    (
        (1 - own**0.7) / 0.7
    ).sum().backward()  # the paper's; the authors' code has 0.7 times it
    torch.testing.assert_close(found, 0.7 * logits.grad)


def test_difficulty_is_the_share_of_the_biased_network():
    (difficulty,) = functions("08_alternatives", "difficulty")
    found = difficulty(torch.tensor([0.3, 0.0, 0.0]), torch.tensor([0.1, 0.5, 0.0]))
    assert found.tolist() == pytest.approx([0.75, 0.0, 0.0], abs=1e-6)


def test_groupdro_means_and_weights_are_those_of_the_formula():
    losses, weights = functions("08_alternatives", "group_losses", "group_weights")
    found = losses(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 3]))
    assert found.tolist() == [2.0, 0.0, 0.0, 5.0]
    q = weights(torch.full((4,), 0.25), found)
    raw = torch.tensor([2.0, 0.0, 0.0, 5.0]).mul(0.01).exp() / 4
    torch.testing.assert_close(q, raw / raw.sum())


def test_jtt_weighs_what_is_wrong_as_in_the_paper():
    (error_weights,) = functions("08_alternatives", "error_weights")
    wrong, losses = (
        torch.tensor([False, True, False, True]),
        torch.tensor([1.0, 2.0, 3.0, 4.0]),
    )
    objective = (
        20 * losses[wrong].sum() + losses[~wrong].sum()
    )  # its equation 2, times N
    assert (error_weights(wrong, 20) * losses).sum() == objective


def test_dfr_averages_regressions_on_groups_of_equal_size():
    balanced, last_layer = functions("08_alternatives", "balanced", "last_layer")
    members = [torch.arange(0, 30), torch.arange(30, 37), torch.arange(37, 60)]
    index = balanced(members, torch.Generator().manual_seed(0))
    assert [len({*some.tolist()} & {*index.tolist()}) for some in members] == [7, 7, 7]
    rng = np.random.default_rng(0)
    inputs, labels = 3 * rng.normal(size=(60, 5)) + 2, np.arange(60) % 2
    scaler = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    fits = [
        LogisticRegression(C=c).fit(scaled + labels[:, None], labels) for c in (0.1, 1)
    ]
    weight, bias = last_layer(fits, scaler)
    logits = torch.tensor(inputs) @ weight.T + bias
    mean = sum(one.decision_function(scaled) for one in fits) / 2
    assert (logits[:, 1] - logits[:, 0]).numpy() == pytest.approx(mean)


@pytest.mark.parametrize("stem", ["07_limits", "08_alternatives", "09_selective"])
def test_the_studies_run_on_tiny_data(stem, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "studies"
    given = {"dataset": "mnist5k", "limit": 200, "epochs": 1, "batch_size": 20}
    given |= {} if stem == "07_limits" else {"validation_share": 0.2}
    (job,) = jobs.make_stage(stem, [Settings(**given, directory=str(directory))])
    assert job.run(2) == (job, None)
    found = pd.read_csv(job.settings.folder("results") / f"{stem}.csv")
    assert found["seed"].eq(0).all() and len(found) > 4


def test_notebook_10_makes_its_photographs_and_runs_on_few_of_them(tmp_path):
    values = {"directory": str(tmp_path), "limit": 40, "epochs": 1}
    source, target = jobs.NOTEBOOKS / "10_your_own.ipynb", tmp_path / "copy.ipynb"
    papermill.execute_notebook(source, target, values, progress_bar=False)
    (file,) = tmp_path.glob("results/folder-watermark-train*/seed0/10_your_own.csv")
    found = pd.read_csv(file).set_index("model")
    assert [*found.index] == ["ERM", "chosen", "oracle"]
    groups = found[["rare", "usual"]]
    assert groups.map(lambda share: 0 <= share <= 1).all(None)
