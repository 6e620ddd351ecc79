"""Training: reproducible, as its options say, and without waiting for the device."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from masktune_utils import models, training
from masktune_utils.settings import Settings
from masktune_utils.store import sha256


def train(splits, **options):
    """SHA-256 of the weights, and the history."""
    options = {"epochs": 3, "batch_size": 32} | options
    network = models.new_model(0)
    model = nn.Sequential(nn.Dropout(0.1), network)
    history = training.train(model, splits.train, **options)
    return sha256(model.state_dict()), history


def test_same_seed_same_bits_whatever_the_global_generator(splits):
    expected = train(splits)
    state = torch.manual_seed(99).get_state()
    assert train(splits) == expected
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("index", "dropout"), [(slice(None), 0.0), ([0] * 40, 0.5)])
def test_the_seed_decides_the_order_of_images_and_what_drops_out(
    index, dropout, splits
):
    weights = set()
    for seed in (0, np.int64(1)):
        model = nn.Sequential(nn.Dropout(dropout), models.new_model(0))
        training.train(model, splits.train[index], epochs=1, seed=seed)
        weights.add(sha256(model.state_dict()))
    assert len(weights) == 2


def test_the_rate_is_decayed_by_steps_and_the_loss_falls(splits):
    _, history = train(splits, lr_decay_epochs=2)
    first, second, last = history
    assert last["epoch"] == 3
    assert first["lr"] == second["lr"] == 0.01
    assert last["lr"] == 0.005
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > first["accuracy"] > 0.5


@pytest.fixture
def steps():
    """The options of the optimizer, in each step."""
    noted = []

    def note(optimizer, *_arguments):
        (options,) = optimizer.param_groups
        name = type(optimizer).__name__
        noted.append({"optimizer": name, **options})

    with register_optimizer_step_pre_hook(note):
        yield noted


def test_a_linear_schedule_falls_to_0(splits, steps):
    """A last batch of one image is left out."""
    options = {"epochs": 2, "lr": 0.4, "schedule": "linear"}
    train(splits, batch_size=199, **options)
    train(splits, batch_size=198, **options)
    rates = [step["lr"] for step in steps]
    two_steps = [0.4, 0.2]
    four_steps = [0.4, 0.3, 0.2, 0.1]
    assert rates == pytest.approx(two_steps + four_steps)


def test_the_defaults_are_those_of_the_settings():
    parameters = inspect.signature(training.train).parameters
    expected = Settings(epochs=1).finetuning
    del expected["epochs"]  # has no default
    assert parameters.keys() - expected.keys() == {"model", "dataset", "epochs"}
    for name, value in expected.items():
        assert parameters[name].default == value, name


def test_bad_options_are_refused(splits):
    with pytest.raises(ValueError, match="optimizer is 'lion'; allowed: sgd or adam"):
        train(splits, optimizer="lion")
    with pytest.raises(ValueError, match="schedule is 'cosine'; allowed: constant or"):
        train(splits, schedule="cosine")
    with pytest.raises(ValueError, match="number of images is 1; allowed: 2 or"):
        training.train(nn.Linear(1, 1), splits.train[:1], epochs=1)
    with pytest.raises(ValueError, match="the loss is nan; allowed: a smaller lr"):
        train(splits, lr=1e30)


def test_loss_and_accuracy_are_means_over_all_batches(splits):
    few = splits.train[:130]
    share = few.labels.double().mean().item()
    linear = nn.Linear(3 * 784, 2)
    nn.init.zeros_(linear.weight)
    linear.bias.data = torch.tensor([1.0, 0.0])  # always class 0
    network = nn.Sequential(nn.Flatten(), linear)
    history = training.train(network, few, epochs=2, lr=0.0)
    for epoch in history:
        assert epoch["accuracy"] == pytest.approx(1 - share)
        assert epoch["loss"] == pytest.approx(0.3132617 + share)  # log(1 + 1/e)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_momentum_and_weight_decay_are_always_the_same(name, splits, steps):
    train(splits, epochs=1, lr=0.002, optimizer=name.lower())
    step = steps[0]
    assert step["optimizer"] == name
    assert step["lr"] == 0.002
    assert step["weight_decay"] == 1e-4
    assert step.get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("is_quick", [True, False])
def test_bfloat16_is_for_hardware_that_multiplies_in_it(is_quick, monkeypatch):
    def on_gpu(including_emulation=True):
        return including_emulation or is_quick

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", on_gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_quick)
    for name in ("cpu", "cuda"):
        assert training.has_bfloat16(torch.device(name)) == is_quick
    assert not training.has_bfloat16(torch.device("mps"))


@pytest.fixture
def float16():
    """What autocast takes by default, as on a GPU."""
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)
    yield
    torch.set_autocast_dtype("cpu", default)


@pytest.mark.usefixtures("float16")
@pytest.mark.parametrize("is_quick", [True, False])
def test_a_network_computes_in_bfloat16_only_where_it_is_quick(
    is_quick, splits, monkeypatch
):
    monkeypatch.setattr(training, "has_bfloat16", lambda _device: is_quick)
    types = set()
    model = models.new_model(0)
    model.register_forward_hook(lambda *output: types.add(output[-1].dtype))
    few = splits.train[:20]
    training.train(model, few, epochs=1, batch_size=10)
    assert types == {torch.bfloat16 if is_quick else torch.float32}


def test_on_a_gpu_training_asks_for_deterministic_convolutions(splits, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    train(splits, epochs=1)
    assert torch.backends.cudnn.deterministic


def test_each_epoch_has_its_own_partners(splits, monkeypatch):
    epochs = []
    monkeypatch.setattr(
        type(splits.train),
        "in_epoch",
        lambda split, epoch: epochs.append(epoch) or split,
    )
    train(splits)
    assert epochs == [1, 2, 3]
