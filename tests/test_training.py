import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tqdm import tqdm

from masktune_utils import data, masking, models, training
from masktune_utils.experiment import weights_sha256


def train(splits, *, seed=0, **kwargs):
    model = models.new_model(seed)
    history = training.train(model, splits.train, **{"epochs": 3, "batch_size": 32, "seed": seed, **kwargs})
    return model, history


def test_model_is_the_authors_network_key_for_key():
    numbers = {"weight": (0, 3, 7, 10), "running_mean": (1, 4, 8, 11)}
    keys = models.SmallCNN().state_dict().keys()
    assert {key for key in keys if key.startswith("backbone") and key.endswith("running_mean")} == {
        f"backbone.{number}.running_mean" for number in numbers["running_mean"]
    }
    assert {f"backbone.{number}.weight" for number in numbers["weight"]} <= keys
    assert {"linear.0.weight", "linear.1.running_var", "linear.3.bias"} <= keys


def test_grad_cam_target_layer_gives_32_maps_of_8_by_8(model):
    shapes = []
    model.get_grad_cam_target_layer().register_forward_hook(lambda _m, _i, output: shapes.append(tuple(output.shape)))
    assert model(torch.zeros(2, 3, 28, 28)).shape == (2, 2)
    assert shapes == [(2, 32, 8, 8)]


def test_training_lowers_the_loss(splits):
    _, history = train(splits)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > history[0]["accuracy"] > 0.5


def test_same_seed_same_bits_and_another_seed_other_ones(splits):
    first, history = train(splits)
    again, same_history = train(splits)
    other, _ = train(splits, seed=1)
    assert (
        weights_sha256(first.state_dict()) == weights_sha256(again.state_dict()) != weights_sha256(other.state_dict())
    )
    assert [{**epoch, "seconds": 0} for epoch in history] == [{**epoch, "seconds": 0} for epoch in same_history]
    assert all(epoch["seconds"] > 0 for epoch in history)


def test_global_random_state_is_neither_read_nor_changed(splits):
    first, _ = train(splits, epochs=1)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second, _ = train(splits, epochs=1)
    assert torch.equal(state, torch.get_rng_state())
    assert weights_sha256(first.state_dict()) == weights_sha256(second.state_dict())


def test_rate_is_decayed_by_steps(splits):
    _, history = train(splits, epochs=5, lr=0.1, lr_decay_epochs=2, lr_decay_factor=0.5)
    assert [epoch["lr"] for epoch in history] == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_adam_differs_from_sgd(splits):
    sgd, _ = train(splits, epochs=1)
    adam, _ = train(splits, epochs=1, optimizer="adam", lr=1e-3)
    assert weights_sha256(sgd.state_dict()) != weights_sha256(adam.state_dict())


def test_a_last_batch_of_one_image_is_left_out(splits):
    _, history = train(splits, epochs=1, batch_size=199)
    assert 0 <= history[0]["accuracy"] <= 1


def test_history_counts_every_image(splits):
    """One step with a rate of nearly nothing: the history must be the loss of the untrained model in training mode."""
    _, history = train(splits, epochs=1, batch_size=200, lr=1e-8)
    images, labels = splits.train.batch(slice(None))
    logits = models.new_model(0).train()(images)
    assert history[0]["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=0.02)


def test_unknown_names_are_refused(splits):
    with pytest.raises(ValueError, match="optimizer is 'lion'; allowed: 'sgd', 'adam'"):
        train(splits, optimizer="lion")
    with pytest.raises(ValueError, match="device is 'abacus'"):
        training.resolve_device("abacus")
    assert training.resolve_device("cpu") == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_device_that_is_not_here_is_refused():
    with pytest.raises(ValueError, match="device is 'cuda'"):
        training.resolve_device("cuda")


OLD = pytest.mark.skipif(torch.__version__ < "2.10", reason="PyTorch 2.9 has no quantile of tensors without values")


@pytest.mark.parametrize("method", ["mean", pytest.param("top_k", marks=OLD)])
@pytest.mark.parametrize("drawn", [False, True])
def test_epoch_reads_no_value_from_the_device_unless_the_progress_bar_is_drawn(method, drawn, monkeypatch):
    monkeypatch.setattr(data, "check_images", lambda images, labels: None)  # once, before an epoch
    with FakeTensorMode():  # tensors without values: whatever would wait for a GPU fails
        count = torch.zeros(300, dtype=torch.long)
        split = data.Split(torch.zeros(300, 3, 28, 28, dtype=torch.uint8), count, count, count.bool())
        masked = masking.mask_dataset(split, torch.zeros(300, 8, 8), method, 0.1)
        model = models.SmallCNN()
        batches = torch.arange(300).split(128)
        sgd = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        bar = tqdm(total=300, disable=not drawn, mininterval=0, miniters=1)
        if drawn:
            with pytest.raises(DataDependentOutputException):
                training._train_epoch(model, masked, batches, sgd, 1, bar, "1/1")
        else:
            assert training._train_epoch(model, masked, batches, sgd, 1, bar, "1/1").shape == (2,)
