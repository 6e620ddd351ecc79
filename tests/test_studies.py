"""The formulas of the other methods by hand computation; studies on tiny data."""

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

WITH_OR_NOT = ("with it", "without")


def rules() -> Callable:
    """The function of notebook 10; nothing else of it is executed."""
    path = jobs.NOTEBOOKS / "10_selective.ipynb"
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells]
    (definition,) = [text for text in sources if text.startswith("def rules(")]
    namespace = {"torch": torch}
    exec(definition, namespace)
    return namespace["rules"]


def test_generalized_cross_entropy_has_the_gradient_of_its_formula():
    labels = torch.arange(7) % 2
    logits = torch.randn(7, 2, dtype=torch.double, requires_grad=True)
    losses = alternatives.generalized_cross_entropy(logits, labels)
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    probability = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    of_the_paper = (1 - probability**0.7) / 0.7
    (expected,) = torch.autograd.grad(of_the_paper.sum(), logits)
    torch.testing.assert_close(gradient, 0.7 * expected)  # as in the authors' code


def test_difficulty_is_the_share_of_the_biased_network():
    biased_losses = torch.tensor([0.3, 0.0, 0.0])
    losses = torch.tensor([0.1, 0.5, 0.0])
    shares = alternatives.difficulty(biased_losses, losses).tolist()
    assert shares == pytest.approx([0.75, 0.0, 0.0], abs=1e-6)


def test_groupdro_means_and_weights_are_those_of_the_formula():
    losses = torch.tensor([1.0, 3.0, 5.0])
    groups = torch.tensor([0, 0, 3])
    means = alternatives.group_losses(losses, groups)
    assert means.tolist() == [2.0, 0.0, 0.0, 5.0]
    weights = alternatives.group_weights(torch.full((4,), 0.25), means)
    grown = torch.tensor([2.0, 0.0, 0.0, 5.0]).mul(0.01).exp() / 4
    torch.testing.assert_close(weights, grown / grown.sum())


def test_jtt_weighs_what_is_wrong_as_in_the_paper():
    is_wrong = torch.tensor([False, True, False, True])
    losses = torch.tensor([1.0, 2.0, 3.0, 4.0])
    weights = alternatives.error_weights(is_wrong, 20)
    # the paper's equation 2, times the number of images
    objective = 20 * losses[is_wrong].sum() + losses[~is_wrong].sum()
    assert (weights * losses).sum() == objective


def test_xrm_flips_a_label_the_more_often_the_surer_the_twin_is():
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(3).repeat(4000)
    for share, chance in {1.0: 1.0, 0.8: 0.7, 1 / 3: 0.0}.items():
        # of three classes, the twin predicts class 2 with this share
        shares = torch.tensor([(1 - share) / 2, (1 - share) / 2, share + 1e-9])
        logits = shares.log().repeat(len(labels), 1)
        changed = alternatives.flipped(labels, logits, rng)
        is_flipped = changed != labels
        assert changed[is_flipped].eq(2).all()
        other = labels != 2
        assert is_flipped[other].double().mean() == pytest.approx(chance, abs=0.02)


def test_ula_knows_how_often_a_class_goes_with_a_prediction():
    probabilities = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7], [0.6, 0.4]])
    labels = torch.tensor([0, 0, 1, 1])
    conditional = alternatives.labels_given_prediction(probabilities, labels)
    expected = [[1.7 / 2.6, 0.9 / 2.6], [0.3 / 1.4, 1.1 / 1.4]]
    torch.testing.assert_close(conditional.float(), torch.tensor(expected))


def test_afr_fits_the_last_layer_by_plain_clipped_steps():
    generator = torch.Generator().manual_seed(0)
    inputs = 20 * torch.randn(12, 3, generator=generator, dtype=torch.double)
    labels = torch.arange(12) % 2
    weights = torch.rand(12, generator=generator, dtype=torch.double)
    layer = torch.nn.Linear(3, 2).double()
    expected = torch.cat([layer.weight.detach(), layer.bias.detach()[:, None]], 1)
    with_ones = torch.cat([inputs, torch.ones(12, 1)], 1)
    lengths = []
    for _ in range(500):
        errors = (with_ones @ expected.T).softmax(1) - F.one_hot(labels)
        gradient = (errors * weights[:, None]).T @ with_ones / weights.sum()
        lengths.append(gradient.norm().item())
        expected = expected - 0.01 * gradient / max(1, lengths[-1])
    assert max(lengths) > 1 > min(lengths)  # some are clipped, not all
    alternatives.fit_last_layer(layer, inputs, labels, weights)
    fitted = torch.cat([layer.weight, layer.bias[:, None]], 1)
    torch.testing.assert_close(fitted.detach(), expected, rtol=1e-4, atol=1e-6)


def test_dac_masks_at_the_elbow_of_the_loss_or_where_most_is_hidden():
    losses = torch.tensor(
        [
            [0.0, 0.0, 0.1, 0.3, 1.0],  # furthest below the chord: 0.75 − 0.3
            [0.0, 0.0, 0.9, 1.0, 1.0],
            [0.0, 0.9, 1.0, 1.0, 1.0],  # nowhere below it
            [0.5, 0.5, 0.5, 0.5, 0.5],
        ]
    )
    assert alternatives.elbow(losses).tolist() == [3, 1, 4, 4]


def test_dac_pastes_a_part_over_the_rest_of_an_image_of_another_class():
    labels = torch.tensor([0, 1, 1])
    images = torch.tensor([10.0, 20.0, 30.0])[:, None, None, None].expand(3, 1, 1, 3)
    parts = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 1, 0]]).bool()[:, None, None]
    color = torch.full((1, 1, 1, 1), 5.0)
    rng = torch.Generator().manual_seed(0)
    made = alternatives.composed(images, parts, labels, color, rng)[:, 0, 0]
    # the partner of both images of class 1 is image 0, whose part is cut out
    assert made[1].tolist() == [20, 5, 10]
    assert made[2].tolist() == [5, 30, 10]
    assert made[0].tolist() in ([10, 10, 20], [10, 10, 30])
    alone = alternatives.composed(images[1:], parts[1:], labels[1:], color, rng)
    assert alone.shape == (2, 1, 1, 3)  # of one class only


def test_self_measures_disagreement_by_the_kullback_leibler_divergence():
    early = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.0, 1.0]])
    final = torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.5, 0.5]])
    shares = alternatives.disagreement((early + 1e-12).log(), final.log())
    expected = 0.2 * np.log(0.2 / 0.6) + 0.8 * np.log(0.8 / 0.4)
    assert shares.tolist() == pytest.approx([expected / 2, 0, np.log(2) / 2], abs=1e-6)


def test_evals_takes_the_largest_and_smallest_losses_of_each_class():
    losses = torch.tensor([5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 8.0])
    labels = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    index = alternatives.extremes(losses, labels, 2)
    assert index.tolist() == [0, 2, 3, 1, 5, 6, 5, 6]


def test_eiil_puts_what_erm_gets_wrong_into_an_environment_of_its_own():
    logits = torch.tensor([[4.0, -4.0]]).repeat(30, 1)
    labels = torch.zeros(30, dtype=torch.int64)
    labels[:3] = 1
    logits[10:] *= -1
    labels[10:] = 1
    labels[10:13] = 0
    is_wrong = logits.argmax(1) != labels
    members = alternatives.environments(logits, labels, torch.Generator())
    assert torch.equal(members // 2, labels)
    sides = (members % 2).bool()
    assert sides[is_wrong].unique().numel() == 1
    assert sides[~is_wrong].eq(~sides[is_wrong][0]).all()


def test_dbat_wants_another_class_the_more_the_surer_both_networks_are():
    first = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.5, 0.5]])
    second = torch.tensor([[0.2, 0.8], [0.9, 0.1], [0.3, 0.7]])
    losses = alternatives.disagrees(first, second)
    expected = [-np.log(0.9 * 0.8 + 0.2 * 0.1), -np.log(0.9 * 0.1 * 2), -np.log(0.5)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-5)


def test_the_shifted_images_are_those_held_out_and_their_shortcut_says_nothing():
    settings = Settings(dataset="mnist5k", validation_share=0.2, seed=3)
    for placement in ("random", "ordered"):
        biased = settings.replace(placement=placement)
        held_out = datasets.load(biased).validation
        shifted = datasets.load(biased.replace(conflicting_share=0.5)).validation
        assert torch.equal(held_out.labels, shifted.labels)
        both = ~(held_out.has_shortcut | shifted.has_shortcut)
        assert both.any()
        assert torch.equal(held_out.images[both], shifted.images[both])
        for label in (0, 1):
            share = shifted.has_shortcut[shifted.labels == label].double().mean()
            assert share == pytest.approx(0.5, abs=0.08)


@pytest.mark.parametrize("is_weighted", [False, True])
def test_an_epoch_has_each_image_once_unless_they_are_weighted(is_weighted):
    weights = torch.tensor([0.0, 1, 1, 1, 1, 1, 1, 1, 1]) if is_weighted else None
    batches = alternatives.draw_batches(9, 2, 4, weights, torch.Generator())
    drawn = torch.cat(batches).tolist()
    assert [len(index) for index in batches] == [4, 4, 4, 4]  # without one of a single
    if is_weighted:
        assert 0 not in drawn
    else:
        assert len({*drawn[:8]}) == len({*drawn[8:]}) == 8


def test_dfr_takes_equally_many_images_of_each_group():
    members = [torch.arange(0, 30), torch.arange(30, 37), torch.arange(37, 60)]
    index = alternatives.balanced(members, torch.Generator().manual_seed(0))
    for group in members:
        assert torch.isin(group, index).sum() == 7
    assert len(index) == len(index.unique()) == 21


def test_dfr_averages_its_regressions():
    rng = np.random.default_rng(0)
    inputs = 3 * rng.normal(size=(60, 5)) + 2
    labels = np.arange(60) % 2
    scaler = StandardScaler().fit(inputs)
    scaled = scaler.transform(inputs)
    regressions = []
    for strength in (0.1, 1):
        regression = LogisticRegression(C=strength)
        regressions.append(regression.fit(scaled + labels[:, None], labels))
    weight, bias = alternatives.last_layer(regressions, scaler)
    logits = torch.tensor(inputs) @ weight.T + bias
    difference = (logits[:, 1] - logits[:, 0]).numpy()
    scores = [regression.decision_function(scaled) for regression in regressions]
    assert difference == pytest.approx(np.mean(scores, axis=0))


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
    values = {"directory": str(tmp_path), "count": 8, "epochs": 1, "seed": 0}
    source = jobs.NOTEBOOKS / "11_your_own.ipynb"
    target = tmp_path / "copy.ipynb"
    papermill.execute_notebook(source, target, values, progress_bar=False)
    file = tmp_path / "results" / "your_own" / "watermark_0.csv"
    table = pd.read_csv(file).set_index("model")
    assert [*table.index] == ["ERM", "chosen", "oracle"]
    groups = [f"{name}, {word}" for name in ("brick", "grass") for word in WITH_OR_NOT]
    assert table[groups].min(axis=1).equals(table["worst group"])
    assert table["worst group"].between(0, 1).all()
    for name in ("planted", "seed", "mistakes", "is kept"):
        assert table[name].nunique() == 1
