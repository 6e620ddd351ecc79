"""The formulas of the other methods by hand computation; studies on tiny data."""

import math
from collections.abc import Callable

import alternatives
import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from masktune_utils import datasets
from masktune_utils.runner import jobs
from masktune_utils.settings import Settings

LOG = math.log


def rules() -> Callable:
    """The function of notebook 10; nothing else of it is executed."""
    path = jobs.NOTEBOOKS / "10_selective.ipynb"
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (definition,) = [text for text in sources if text.startswith("def rules(")]
    namespace = {"torch": torch}
    exec(definition, namespace)
    return namespace["rules"]


def test_generalized_cross_entropy_has_the_gradient_of_the_authors_code():
    logits = torch.zeros(1, 2, requires_grad=True)
    alternatives.generalized_cross_entropy(logits, torch.tensor([0])).backward()
    weight = 0.7 * 0.5**0.7  # q times the probability to the power of q
    assert logits.grad[0].tolist() == pytest.approx([-weight / 2, weight / 2])


# Each one computed by hand: the function, its arguments, what it returns.
BY_HAND = [
    (
        "difficulty",  # the share of the biased network
        ([0.3, 0.0, 0.0], [0.1, 0.5, 0.0]),
        [0.75, 0.0, 0.0],
    ),
    ("group_losses", ([1.0, 3.0, 5.0], [0, 0, 3]), [2.0, 0.0, 0.0, 5.0]),
    (
        "group_weights",  # the second grows by e^0.01 against the first
        ([0.5, 0.5], [1.0, 2.0]),
        [0.4975, 0.5025],
    ),
    ("error_weights", ([False, True], 20), [1.0, 20.0]),
    (
        "labels_given_prediction",
        ([[0.75, 0.25], [0.5, 0.5]], [0, 1]),
        [[0.6, 0.4], [1 / 3, 2 / 3]],
    ),
    (
        "elbow",
        # furthest below the chord; nowhere below it; no chord
        ([[0.0, 0.0, 0.6, 2.0], [0.0, 1.9, 2.0, 2.0], [0.5, 0.5, 0.5, 0.5]],),
        [2, 3, 3],
    ),
    (
        "disagreement",  # the Kullback-Leibler divergence
        ([[LOG(0.2), LOG(0.8)], [0.0, 0.0]], [[LOG(0.6), LOG(0.4)], [0.0, 0.0]]),
        [(0.2 * LOG(0.2 / 0.6) + 0.8 * LOG(0.8 / 0.4)) / 2, 0.0],
    ),
    (
        "extremes",  # the largest and the smallest losses of each class
        ([5.0, 1.0, 9.0, 8.0, 3.0], [0, 0, 1, 1, 0], 1),
        [0, 1, 2, 3],
    ),
    (
        "disagrees",
        ([[0.9, 0.1], [0.5, 0.5]], [[0.2, 0.8], [0.3, 0.7]]),
        [-LOG(0.9 * 0.8 + 0.2 * 0.1), -LOG(0.5)],
    ),
]


@pytest.mark.parametrize(("name", "arguments", "expected"), BY_HAND)
def test_a_formula_gives_what_is_computed_by_hand(name, arguments, expected):
    tensors = [
        torch.tensor(value) if isinstance(value, list) else value for value in arguments
    ]
    result = getattr(alternatives, name)(*tensors).tolist()
    np.testing.assert_allclose(result, expected, atol=1e-4)


@pytest.mark.parametrize(("share", "chance"), [(0.999, 1), (0.8, 0.7), (0.335, 0)])
def test_xrm_flips_a_label_the_more_often_the_surer_the_twin_is(share, chance):
    """The twin predicts the last of three classes with this share."""
    other = (1 - share) / 2
    logits = torch.tensor([[other, other, share]]).log().repeat(4000, 1)
    labels = torch.zeros(4000, dtype=torch.int64)
    changed = alternatives.flipped(labels, logits, torch.Generator().manual_seed(0))
    assert {*changed.tolist()} <= {0, 2}
    assert changed.eq(2).double().mean() == pytest.approx(chance, abs=0.02)


def test_afr_fits_the_last_layer_by_plain_clipped_steps():
    generator = torch.Generator().manual_seed(0)
    inputs = 20 * torch.randn(12, 3, generator=generator, dtype=torch.double)
    weights = torch.rand(12, generator=generator, dtype=torch.double)
    labels = torch.arange(12) % 2
    layer = torch.nn.Linear(3, 2).double()
    expected = torch.cat([layer.weight, layer.bias[:, None]], 1).detach()
    with_ones = torch.cat([inputs, torch.ones(12, 1)], 1)
    for _ in range(500):
        errors = (with_ones @ expected.T).softmax(1) - F.one_hot(labels)
        gradient = (errors.T * weights) @ with_ones / weights.sum()
        # at the beginning it is longer than 1, later shorter
        expected -= 0.01 * gradient / gradient.norm().clamp(min=1)
    alternatives.fit_last_layer(layer, inputs, labels, weights)
    fitted = torch.cat([layer.weight, layer.bias[:, None]], 1)
    torch.testing.assert_close(fitted.detach(), expected, rtol=1e-4, atol=1e-6)


def test_dac_pastes_a_part_over_the_rest_of_an_image_of_another_class():
    labels = torch.tensor([0, 1])
    images = torch.tensor([10.0, 20.0])[:, None, None, None].expand(2, 1, 1, 3)
    parts = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()[:, None, None]
    color = torch.full((1, 1, 1, 1), 5.0)
    rng = torch.Generator().manual_seed(0)
    made = alternatives.composed(images, parts, labels, color, rng)
    assert made.flatten(1).tolist() == [[10, 10, 20], [20, 5, 10]]
    of_one_class = alternatives.composed(images, parts, 0 * labels, color, rng)
    assert of_one_class.shape == images.shape


def test_eiil_puts_what_erm_gets_wrong_into_an_environment_of_its_own():
    labels = torch.arange(30) % 2
    is_wrong = torch.arange(30) < 6
    logits = 8.0 * F.one_hot(labels ^ is_wrong) - 4
    members = alternatives.environments(logits, labels, torch.Generator())
    assert torch.equal(members // 2, labels)
    is_first = members % 2 == 0
    assert torch.equal(is_first, is_wrong) or torch.equal(~is_first, is_wrong)


def test_the_shifted_images_are_those_held_out_and_their_shortcut_says_nothing():
    settings = Settings(dataset="mnist5k", validation_share=0.2, seed=3)
    for placement in ("random", "ordered"):
        biased = settings.replace(placement=placement)
        held_out = datasets.load(biased).validation
        shifted = datasets.load(biased.replace(conflicting_share=0.5)).validation
        assert torch.equal(held_out.groups, shifted.groups)
        is_plain = ~(held_out.has_shortcut | shifted.has_shortcut)
        assert torch.equal(held_out.images[is_plain], shifted.images[is_plain])
        of_class = [shifted.has_shortcut[shifted.labels == k] for k in (0, 1)]
        shares = [part.double().mean().item() for part in of_class]
        assert shares == pytest.approx([0.5, 0.5], abs=0.08)


def test_an_epoch_has_each_image_once_unless_they_are_weighted():
    plain = alternatives.draw_batches(9, 2, 4, None, torch.Generator())
    for epoch in (plain[:2], plain[2:]):
        drawn = torch.cat(epoch).tolist()
        assert len({*drawn}) == len(drawn) == 8  # without the batch of a single image
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1])
    weighted = alternatives.draw_batches(9, 2, 4, weights, torch.Generator())
    assert [len(index) for index in weighted] == [4, 4, 4, 4]
    assert 0 not in torch.cat(weighted)


def test_dfr_takes_equally_many_images_of_each_group():
    members = torch.arange(60).split([30, 7, 23])
    index = alternatives.balanced(members, torch.Generator().manual_seed(0))
    assert [torch.isin(group, index).sum().item() for group in members] == [7, 7, 7]
    assert len(index) == 21


def test_dfr_averages_its_regressions():
    rng = np.random.default_rng(0)
    inputs = 3 * rng.normal(size=(60, 5)) + 2
    scaler = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    labels = np.arange(60) % 2
    fits = [LogisticRegression(C=c).fit(scaled, labels) for c in (0.1, 1)]
    weight, bias = alternatives.last_layer(fits, scaler)
    low, high = weight @ torch.tensor(inputs).T + bias[:, None]
    expected = (
        fits[0].decision_function(scaled) + fits[1].decision_function(scaled)
    ) / 2
    assert (high - low).tolist() == pytest.approx(expected)


def test_where_the_models_disagree_masktune_decides_and_comes_last():
    erm = torch.tensor([[0.1, 0.9], [0.9, 0.1], [0.4, 0.6]])
    masktune = torch.tensor([[0.4, 0.6], [0.2, 0.8], [0.9, 0.1]])
    score = rules()(erm, masktune)["mean, if they agree"]
    confidence, label = score.max(1)
    assert label.tolist() == [1, 1, 0]
    assert confidence.tolist() == pytest.approx([0.75, -0.2, -0.1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stem", "validation_share"), [("08_limits", 0.0), ("10_selective", 0.2)]
)
def test_the_studies_run_on_tiny_data(stem, validation_share, tmp_path):
    values = TINY | {"limit": 60, "validation_share": validation_share}
    settings = Settings(**values, directory=str(tmp_path))
    (job,) = jobs.make_stage(stem, [settings])
    assert job.run(together=1) is None
    table = pd.read_csv(job.settings.folder("results") / f"{stem}.csv")
    assert table["seed"].eq(0).all()
    assert len(table) > 4
    (job,) = jobs.make_stage("05_plots", [settings])  # whether ERM was kept or not
    assert job.run(together=1) is None


@pytest.mark.slow
def test_all_methods_make_the_table_that_notebook_09_shows(tmp_path):
    values = TINY | {"limit": 60, "validation_share": 0.2}
    settings = Settings(**values, directory=str(tmp_path))
    made = alternatives.compare(settings)
    committed = pd.read_csv(alternatives.FILE)
    assert made.columns.equals(committed.columns)
    assert {*made["method"]} == {*committed["method"]}
    (job,) = jobs.make_stage("09_alternatives", [settings])
    assert job.run(together=1) is None


@pytest.mark.slow
def test_notebook_11_makes_its_photographs_and_runs_on_few_of_them(tmp_path):
    values = {"count": 8, "epochs": 1}
    source = jobs.NOTEBOOKS / "11_your_own.ipynb"
    target = tmp_path / "copy.ipynb"
    papermill.execute_notebook(source, target, values, progress_bar=False)
