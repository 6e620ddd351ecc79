"""Training: reproducible, as its options say, and without waiting for the device."""

import inspect

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_pre_hook
from tqdm import tqdm

from masktune_utils import masking, models, training
from masktune_utils.settings import Settings
from masktune_utils.store import sha256


def train(splits, *, seed=0, **options) -> tuple[str, list[dict]]:
    """SHA-256 of the weights, and the history."""
    model = nn.Sequential(nn.Dropout(0.1), models.new_model(seed))
    options = {"epochs": 3, "batch_size": 32} | options
    history = training.train(model, splits.train, seed=seed, **options)
    return sha256(model.state_dict()), history


def test_same_seed_same_bits_whatever_the_global_generator(splits):
    first, first_history = train(splits)
    state = torch.manual_seed(99).get_state()
    second, second_history = train(splits)
    assert torch.equal(state, torch.get_rng_state())
    assert first == second
    for epoch in first_history + second_history:
        del epoch["seconds"]
    assert first_history == second_history
    of_another_seed, _ = train(splits, seed=1)
    assert of_another_seed != first


def test_training_lowers_the_loss(splits):
    _, history = train(splits)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > history[0]["accuracy"] > 0.5
    assert 0 < history[0]["seconds"] < 60


def test_rate_is_decayed_by_steps(splits):
    _, history = train(splits, epochs=5, lr=0.1, lr_decay_epochs=2)
    rates = [epoch["lr"] for epoch in history]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


@pytest.fixture
def steps():
    """The optimizer and its options, in each step."""
    noted = []

    def note(optimizer, *_arguments):
        noted.append({"optimizer": type(optimizer), **optimizer.param_groups[0]})

    with register_optimizer_step_pre_hook(note):
        yield noted


@pytest.mark.parametrize(("batch_size", "count"), [(199, 1), (198, 2), (200, 1)])
def test_a_linear_schedule_ends_at_0_after_the_last_step(
    batch_size, count, splits, steps
):
    """A last batch of one image is left out."""
    options = {"epochs": 2, "lr": 0.4, "schedule": "linear", "batch_size": batch_size}
    _, history = train(splits, **options)
    expected = [0.4 * (1 - k / (2 * count)) for k in range(2 * count)]
    assert [step["lr"] for step in steps] == pytest.approx(expected)
    assert [epoch["lr"] for epoch in history] == pytest.approx([0.4, 0.2])


def test_the_defaults_are_those_of_the_settings():
    parameters = inspect.signature(training.train).parameters
    expected = Settings().training
    del expected["epochs"]  # has no default
    for name, value in expected.items():
        assert parameters[name].default == value, name


def test_bad_options_are_refused(splits):
    with pytest.raises(ValueError, match="optimizer is 'lion'; allowed: sgd or adam"):
        train(splits, epochs=1, optimizer="lion")
    with pytest.raises(ValueError, match="schedule is 'cosine'; allowed: constant or"):
        train(splits, epochs=1, schedule="cosine")
    with pytest.raises(ValueError, match="batch_size is 1; allowed: 2 or more"):
        train(splits, epochs=1, batch_size=1)


def test_an_epoch_never_waits_for_the_device(splits):
    """By tensors without values, of which none can be waited for."""
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8))
    batches = torch.arange(200).split(128)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = models.SmallCNN()
        sgd = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LinearLR(sgd, 1, 0, 2)
        drawn = tqdm()
        means = training._train_epoch(model, masked, batches, scheduler, drawn)
        assert drawn.n == 200
        with pytest.raises(DataDependentOutputException):
            means.tolist()


def test_loss_and_accuracy_are_means_over_all_batches(splits):
    few = splits.train[:130]
    share = few.labels.double().mean().item()
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 784, 2))
    nn.init.zeros_(network[1].weight)
    network[1].bias = nn.Parameter(torch.tensor([1.0, 0.0]))  # always class 0
    for epoch in training.train(network, few, epochs=2, batch_size=32, lr=0.0):
        assert epoch["accuracy"] == pytest.approx(1 - share)
        assert epoch["loss"] == pytest.approx(0.3132617 + share)  # log(1 + 1/e)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_momentum_and_weight_decay_are_always_the_same(kind, splits, steps):
    _, history = train(splits, epochs=1, lr=0.002, optimizer=kind.__name__.lower())
    assert steps[0]["optimizer"] is kind
    assert history[0]["lr"] == steps[0]["lr"] == 0.002
    assert steps[0]["weight_decay"] == 1e-4
    assert steps[0].get("momentum", 0.9) == 0.9


@pytest.mark.parametrize("on_cpu", [True, False])
def test_bfloat16_is_for_hardware_that_multiplies_in_it(on_cpu, monkeypatch):
    def on_gpu(*, including_emulation=True):
        return including_emulation or not on_cpu

    capabilities = {"avx512_bf16": on_cpu}
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", on_gpu)
    monkeypatch.setattr(
        torch.cpu, "get_capabilities", lambda: capabilities, raising=False
    )
    assert training.has_bfloat16(torch.device("cpu")) is on_cpu
    assert training.has_bfloat16(torch.device("cuda")) is not on_cpu
    assert training.has_bfloat16(torch.device("mps")) is False


@pytest.mark.parametrize(
    ("is_supported", "expected"), [(True, torch.bfloat16), (False, torch.float32)]
)
def test_a_network_computes_in_bfloat16_only_where_it_is_quick(
    is_supported, expected, splits, monkeypatch
):
    monkeypatch.setattr(training, "has_bfloat16", lambda _device: is_supported)
    default = torch.get_autocast_dtype("cpu")
    torch.set_autocast_dtype("cpu", torch.float16)  # as it is on a GPU
    types = set()
    model = models.new_model(0)
    model.register_forward_hook(lambda *arguments: types.add(arguments[-1].dtype))
    try:
        training.train(model, splits.train[:20], epochs=1, batch_size=10)
    finally:
        torch.set_autocast_dtype("cpu", default)
    assert types == {expected}


def test_on_a_gpu_training_asks_for_deterministic_convolutions(splits, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    train(splits, epochs=1)
    assert torch.backends.cudnn.deterministic


def test_the_order_of_the_images_depends_on_no_dropout(splits):
    seen = []
    for layer in (nn.Identity(), nn.Dropout()):
        network = nn.Sequential(models.new_model(0), layer)
        network.register_forward_pre_hook(lambda _, inputs: seen.append(*inputs))
        training.train(network, splits.train[::5], epochs=2, batch_size=20)
    without, with_dropout = torch.stack(seen).chunk(2)
    assert torch.equal(with_dropout, without)


def test_a_model_in_evaluation_mode_is_trained_in_training_mode(model, splits):
    modes = []
    model.register_forward_hook(lambda network, *_: modes.append(network.training))
    training.train(model, splits.train[:20], epochs=1, batch_size=10)
    assert modes == [True, True]
