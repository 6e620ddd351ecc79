import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from tqdm import tqdm

from masktune_utils import masking, models, training
from masktune_utils.store import weights_sha256


def train(splits, *, seed=0, **options):
    """The weights' SHA-256, and the history."""
    model, options = models.new_model(seed), {"epochs": 3, "batch_size": 32} | options
    history = training.train(model, splits.train, seed=seed, **options)
    return weights_sha256(model.state_dict()), history


def test_same_seed_same_bits_whatever_the_global_generator(splits):
    first, history = train(splits)
    state = torch.manual_seed(99).get_state()
    again, same_history = train(splits)
    assert first == again != train(splits, seed=1)[0]
    assert torch.equal(state, torch.get_rng_state())
    for epoch in history + same_history:
        assert epoch.pop("seconds") > 0
    assert history == same_history


def test_training_lowers_the_loss(splits):
    _, history = train(splits)
    assert [epoch["epoch"] for epoch in history] == [1, 2, 3]
    assert history[-1]["loss"] < history[0]["loss"]
    assert history[-1]["accuracy"] > history[0]["accuracy"] > 0.5


def test_rate_is_decayed_by_steps(splits):
    _, history = train(splits, epochs=5, lr=0.1, lr_decay_epochs=2, lr_decay_factor=0.5)
    rates = [epoch["lr"] for epoch in history]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025])


def test_a_linear_schedule_ends_at_0_after_the_last_step(splits, monkeypatch):
    rates, step = [], torch.optim.SGD.step
    record = lambda self, *given: (
        rates.append(self.param_groups[0]["lr"]) or step(self, *given)
    )
    monkeypatch.setattr(torch.optim.SGD, "step", record)
    for batch_size, steps in {50: 4, 199: 1, 200: 1, 60: 4}.items():
        rates.clear()
        _, history = train(
            splits, epochs=2, lr=0.4, schedule="linear", batch_size=batch_size
        )
        assert rates == pytest.approx(
            [0.4 * (1 - k / steps / 2) for k in range(2 * steps)]
        )
        assert [epoch["lr"] for epoch in history] == pytest.approx([0.4, 0.2])


def test_each_option_of_the_optimizer_matters(splits):
    options = (
        {},
        {"optimizer": "adam"},
        {"schedule": "linear"},
        {"momentum": 0.0},
        {"weight_decay": 0.1},
        {"lr": 0.02},
    )
    assert len({train(splits, epochs=1, **one)[0] for one in options}) == len(options)


def test_a_last_batch_of_one_image_is_left_out(splits):
    _, history = train(splits, epochs=1, batch_size=199)
    assert 0 <= history[0]["accuracy"] <= 1


def test_history_counts_every_image(splits):
    """One step that changes next to nothing: the loss is that of the untrained model."""
    _, history = train(splits, epochs=1, batch_size=200, lr=1e-8)
    images, labels = splits.train.batch(slice(None))
    loss = torch.nn.functional.cross_entropy(
        models.new_model(0).train()(images), labels
    )
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
    masked = masking.mask_dataset(splits.train, torch.zeros(200, 8, 8), method, 0.1)
    with FakeTensorMode(
        allow_non_fake_inputs=True
    ):  # tensors without values: to wait fails
        model = models.SmallCNN()
        sgd = torch.optim.SGD(model.parameters(), 0.1, fused=True)
        scheduler = torch.optim.lr_scheduler.LinearLR(sgd, 1, 0, 2)
        batches = torch.arange(200).split(128)
        bar = tqdm(disable=True)
        assert training._train_epoch(
            model, masked, batches, scheduler, bar, None
        ).shape == (2,)
        bar = tqdm(total=200, mininterval=0, miniters=1)
        with pytest.raises(DataDependentOutputException):
            training._train_epoch(model, masked, batches, scheduler, bar, None)
