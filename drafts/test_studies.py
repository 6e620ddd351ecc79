"""The formulas of notebooks 07 to 09 against hand computations, and the notebooks on tiny data."""

import ast

import nbformat
import pytest
import torch
import torch.nn.functional as F

from masktune_utils import sweep
from masktune_utils.settings import Settings


def functions(stem: str, *names: str) -> list:
    """Functions that a notebook defines; nothing else of it is executed."""
    cells = nbformat.read(sweep.NOTEBOOKS / f"{stem}.ipynb", as_version=4).cells
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    found = [node for node in ast.parse(code).body if getattr(node, "name", None) in names]
    space = {"torch": torch, "F": F, "count": 2}
    exec(compile(ast.Module(found, []), stem, "exec"), space)  # noqa: S102
    return [space[name] for name in names]


def test_generalized_cross_entropy_has_the_gradient_of_its_formula():
    (loss,) = functions("08_alternatives", "generalized_cross_entropy")
    logits, labels = torch.randn(7, 2, dtype=torch.double, requires_grad=True), torch.arange(7) % 2
    loss(logits, labels).sum().backward()
    found, logits.grad = logits.grad, None
    own = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    ((1 - own**0.7) / 0.7).sum().backward()  # the paper's; the authors' code has 0.7 times it
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


@pytest.mark.parametrize("stem", ["07_limits", "08_alternatives", "09_selective"])
def test_the_studies_run_on_tiny_data(stem, tmp_path):
    given = {"dataset": "mnist5k", "limit": 200, "epochs": 1, "batch_size": 20}
    given |= {"directory": str(tmp_path)}
    if stem != "07_limits":
        given["validation_share"] = 0.2
    (job,) = sweep.make_stage(stem, [Settings(**given)])
    assert job.run(1) == (job, None)
    assert (job.settings.folder("results") / f"{stem}.csv").exists()
