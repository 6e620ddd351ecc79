"""Training: reproducible, as its options say, and without waiting for the device."""

import copy
import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tqdm import tqdm

from masktune_utils import masking, models, training
from masktune_utils.settings import Settings
from masktune_utils.store import weights_sha256


def train(splits, *, seed=0, **options) -> tuple[str, list[dict]]:
    """SHA-256 of the weights, and the history."""
    model = models.new_model(seed)
    options = {"epochs": 3, "batch_size": 32} | options
    history = training.train(model, splits.train, seed=seed, **options)
    return weights_sha256(model.state_dict()), history


def test_same_seed_same_bits_whatever_the_global_generator(splits):
    first, first_history = train(splits)
    state = torch.manual_seed(99).get_state()
    second, second_history = train(splits)
    assert torch.equal(state, torch.get_rng_state())
    assert first == second
    for epoch in first_history + second_history:
        assert epoch.pop("seconds") > 0
    assert first_history == second_history
    of_another_seed, _ = train(splits, seed=1)
    assert of_another_seed != first


@pytest.mark.parametrize(
    "options",
    [
        {"lr_decay_epochs": 2},
        {"optimizer": "adam", "lr": 0.001, "schedule": "linear", "flip": True},
    ],
)
def test_an_interrupted_training_goes_on_to_the_same_bits(splits, monkeypatch, options):
    monkeypatch.setattr(training, "SECONDS_BETWEEN_STATES", 0)
    options = {"epochs": 4, "batch_size": 32} | options
    states = []

    def keep_state(state: dict) -> None:
        states.append(copy.deepcopy(state))

    def network(seed: int) -> nn.Module:
        return nn.Sequential(nn.Dropout(0.1), models.new_model(seed))

    model = network(0)
    history = training.train(model, splits.train, **options, keep_state=keep_state)
    assert [len(state["history"]) for state in states] == [1, 2, 3, 4]
    for state in states:
        later = network(1)
        later_history = training.train(later, splits.train, **options, state=state)
        weights = later.state_dict()
        assert weights_sha256(weights) == weights_sha256(model.state_dict())
        for epoch, expected in zip(later_history, history, strict=True):
            assert epoch["loss"] == expected["loss"]
            assert epoch["lr"] == expected["lr"]


def test_the_state_is_not_kept_more_often_than_once_a_minute(splits):
    states = []
    train(splits, keep_state=states.append)
    assert states == []


def test_training_lowers_the_loss(splits):
    _, history = train(splits)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > history[0]["accuracy"] > 0.5


def test_rate_is_decayed_by_steps(splits):
    _, history = train(splits, epochs=5, lr=0.1, lr_decay_epochs=2, lr_decay_factor=0.5)
    rates = [epoch["lr"] for epoch in history]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


@pytest.mark.parametrize(
    ("batch_size", "steps"), [(50, 4), (199, 1), (198, 2), (200, 1), (60, 4)]
)
def test_a_linear_schedule_ends_at_0_after_the_last_step(
    batch_size, steps, splits, monkeypatch
):
    rates = []
    step = torch.optim.SGD.step

    def recorded(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.SGD, "step", recorded)
    options = {"epochs": 2, "lr": 0.4, "schedule": "linear", "batch_size": batch_size}
    _, history = train(splits, **options)
    expected = [0.4 * (1 - k / (2 * steps)) for k in range(2 * steps)]
    assert rates == pytest.approx(expected)
    assert [epoch["lr"] for epoch in history] == pytest.approx([0.4, 0.2])


def test_each_option_of_the_optimizer_matters(splits):
    hashes = set()
    for options in (
        {},
        {"optimizer": "adam"},
        {"schedule": "linear"},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"lr": 0.02},
    ):
        sha256, _ = train(splits, epochs=1, **options)
        hashes.add(sha256)
    assert len(hashes) == 6


def test_a_last_batch_of_one_image_is_left_out(splits):
    _, history = train(splits, epochs=1, batch_size=199)
    assert 0 <= history[0]["accuracy"] <= 1


def test_the_defaults_are_those_of_the_settings():
    parameters = inspect.signature(training.train).parameters
    expected = Settings().training
    del expected["epochs"]  # has no default
    for name, value in expected.items():
        assert parameters[name].default == value, name


def test_history_counts_every_image(splits):
    """One step that changes little: the loss is that of the untrained model."""
    _, history = train(splits, epochs=1, batch_size=200, lr=1e-8)
    images, labels = splits.train.batch(slice(None))
    logits = models.new_model(0).train()(images)
    loss = torch.nn.functional.cross_entropy(logits, labels)
    assert history[0]["loss"] == pytest.approx(loss.item(), rel=0.02)


def test_bad_options_are_refused(splits):
    with pytest.raises(ValueError, match="optimizer is 'lion'; allowed: sgd or adam"):
        train(splits, epochs=1, optimizer="lion")
    with pytest.raises(ValueError, match="schedule is 'cosine'; allowed: constant or"):
        train(splits, epochs=1, schedule="cosine")
    with pytest.raises(TypeError, match="unexpected keyword argument 'finetune_lr'"):
        train(splits, epochs=1, finetune_lr=0.5)


WITHOUT_VALUES = "PyTorch 2.9 has no quantile of tensors without values"
OLD = pytest.mark.skipif(torch.__version__ < "2.10", reason=WITHOUT_VALUES)


@pytest.mark.parametrize("method", ["mean", pytest.param("top_k", marks=OLD)])
def test_an_epoch_waits_for_the_device_only_where_the_progress_bar_is_drawn(
    method, splits
):
    """By tensors without values, of which none can be waited for.

    That is of one epoch, which has no public name.
    """
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), method, 0.1)
    batches = torch.arange(200).split(128)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models.SmallCNN()
        sgd = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LinearLR(sgd, 1, 0, 2)
        arguments = (model, masked, batches, scheduler)
        undrawn = tqdm(disable=True)
        means = training._train_epoch(*arguments, undrawn, None)
        assert means.shape == (2,)
        drawn = tqdm(total=200, mininterval=0, miniters=1)
        with pytest.raises(DataDependentOutputException):
            training._train_epoch(*arguments, drawn, None)
