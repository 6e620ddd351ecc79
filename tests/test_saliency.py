"""Saliency maps and maps of mistakes, against their formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from masktune_utils import metrics, saliency
from masktune_utils.choice import exchange
from masktune_utils.data import Split


@pytest.fixture
def few(splits) -> Split:
    """Some images of both classes, with and without the square."""
    return splits.train[::8]


def test_maps_are_those_of_the_formula(model, few):
    """Fu et al., 2020, equation 8, with the gradients of autograd; of any labels."""
    images, labels = few.batch(slice(None))
    labels[::2] = 1 - labels[::2]
    features = model.backbone[:-2](images).detach()
    features.requires_grad_()
    pooled = model.backbone[-2:](features)
    scores = model.linear(pooled)
    loss = F.nll_loss(scores, labels, reduction="sum")  # minus the own scores
    loss.backward()
    weighted = -features.grad * features
    sizes = features.sum((2, 3))
    weights = weighted.sum((2, 3)) / sizes.clamp(min=1e-8)
    summed = torch.einsum("nc, nchw -> nhw", weights, features)
    expected = summed.relu()
    expected -= expected.amin((1, 2), keepdim=True)
    largest = expected.amax((1, 2), keepdim=True)
    expected /= largest + 1e-8
    maps = saliency.saliency_maps(model, few.images, labels)
    torch.testing.assert_close(maps, expected, atol=1e-4, rtol=1e-4)
    of_floats = saliency.saliency_maps(model, images, labels)
    assert torch.equal(of_floats, maps)


def test_the_model_is_left_as_it_is(model, few):
    model.train()
    saliency.saliency_maps(model, few.images, few.labels)
    assert model.training
    layer = model.backbone[2]
    model.get_grad_cam_target_layer = lambda: layer  # which the copy does not have
    with pytest.raises(ValueError, match="unable to locate module"):
        saliency.saliency_maps(model, few.images, few.labels)
    for module in model.modules():
        assert not module._forward_hooks  # torch has no public name for them
    for weights in model.parameters():
        assert weights.requires_grad
        assert weights.grad is None


def test_a_layer_is_explained_whose_output_is_changed_in_place():
    """Its map is not that of the ReLU after it."""
    images = torch.rand(4, 3, 28, 28)
    labels = torch.tensor([0, 1, 0, 1])
    layers = [nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, 2)]
    maps = []
    for in_place in (False, True):
        network = nn.Sequential(layers[0], nn.ReLU(in_place), *layers[1:])
        maps.append(saliency.saliency_maps(network, images, labels, layer="0"))
    assert torch.equal(*maps)


PIXEL = (..., 5, 9)


class PixelReader(nn.Module):
    """Sees nothing but one pixel: its channels are the logits."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(4.0))
        self.dropout = nn.Dropout(0.9)

    def forward(self, images):
        return self.dropout(self.scale * images[PIXEL])


@pytest.fixture
def misleading() -> Split:
    """Images of 14×42, of three classes; the pixel misleads in twelve of them.

    In four of class 0 it speaks for class 1, in two for class 2, and in six of class 1
    for class 0.
    """
    labels = torch.arange(3).repeat_interleave(20)
    told = labels.clone()
    told[:4] = 1
    told[4:6] = 2
    told[20:26] = 0
    random = torch.Generator().manual_seed(0)
    shape = (60, 3, 14, 42)
    images = torch.randint(256, shape, generator=random)
    strengths = images[PIXEL].clamp(min=127)
    of_class = F.one_hot(told, 3)
    images[PIXEL] = strengths * of_class
    return Split(images.byte(), labels)


def mistake_map(split):
    """By what the network predicts that sees the pixel alone."""
    network = PixelReader()
    logits = metrics.predict(network, split)
    predicted = logits.argmax(1)
    return exchange.exchange_map(network, split, predicted, seed=3)


@pytest.mark.parametrize("side", [1, 28, 96])
def test_windows_reach_from_edge_to_edge(side):
    seen = torch.zeros(side)
    for window in exchange._windows(side):
        seen[window] += 1
    assert seen.all()


@pytest.mark.parametrize("copies", [1, 8])
def test_a_window_is_worth_by_how_much_it_lowers_the_loss_each_kind_the_same(
    misleading, copies
):
    """By the formula, for the only pixel that is seen; of 8 copies, 96 mistakes."""
    index = torch.arange(60).repeat(copies)
    split = misleading[index]
    generator = torch.Generator().manual_seed(3)
    partners = exchange.class_partners(split.labels, generator)
    logits = metrics.predict(PixelReader(), split)
    losses = F.cross_entropy(logits, split.labels, reduction="none")
    falls = (losses - losses[partners]).view(copies, 60)
    kinds = [
        falls[:, :4],
        falls[:, 4:6],
        falls[:, 20:26],
    ]
    expected = sum(kind.mean() for kind in kinds) / 3
    mistakes = torch.zeros(13, 13)
    mistakes[4:6, 2:4] = expected  # windows of 2×6; each overlaps by half with the next
    torch.testing.assert_close(mistake_map(split), mistakes)


def test_of_many_mistakes_some_are_exchanged_at_random(misleading, monkeypatch):
    monkeypatch.setattr(exchange, "MOST_IMAGES", 5)
    batches = []

    def network(images):
        batches.append(images)
        return images[PIXEL]

    exchange.exchange_map(network, misleading, 1 - misleading.labels)
    sizes = {len(images) for images in batches}
    assert sizes == {5}
    first_five, _ = misleading.batch(slice(5))
    assert not torch.equal(batches[0], first_five)


def test_without_a_mistake_the_map_of_mistakes_is_zero(misleading):
    told = misleading.images[PIXEL].argmax(1)
    right = Split(misleading.images, told)
    mistakes = mistake_map(right)
    assert torch.equal(mistakes, torch.zeros(13, 13))


def test_a_window_is_relied_on_by_how_far_it_moves_the_log_odds(
    misleading, monkeypatch
):
    """By the formula, image by image, of fifty out of sixty."""
    monkeypatch.setattr(exchange, "MOST_IMAGES", 50)
    network = PixelReader()
    logits = metrics.predict(network, misleading)
    predicted = logits.argmax(1)
    random = torch.Generator().manual_seed(3)
    sample = torch.randperm(60, generator=random)[:50]
    falls = []
    for label in range(3):
        members = sample[predicted[sample] == label]
        others = (predicted != label).nonzero()[:, 0]
        drawn = torch.randint(len(others), (len(members),), generator=random)
        for image, partner in zip(members, others[drawn], strict=True):
            odds = logits[:, label] - logits[:, predicted[partner]]
            falls.append(odds[image] - odds[partner])
    expected = torch.zeros(13, 13)
    expected[4:6, 2:4] = torch.stack(falls).mean()
    found = exchange.reliance_map(network, misleading, predicted, seed=3)
    torch.testing.assert_close(found, expected)


def test_a_partner_is_another_image_of_the_class_unless_there_is_none():
    labels = torch.tensor([0, 1, 0, 1, 2])
    generator = torch.Generator()
    partners = exchange.class_partners(labels, generator)
    assert partners.tolist() == [2, 3, 0, 1, 4]
