"""What models predict for images that they have not seen, recomputed by plain code."""

import copy
import re
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from masktune_utils import (
    data,
    datasets,
    held_out,
    models,
    selection,
    training,
)
from masktune_utils.data import Split
from masktune_utils.held_out import ERM, NULL, HeldOut
from masktune_utils.masking import MaskedDataset, Rule, masktune
from masktune_utils.metrics import exchange_map
from masktune_utils.metrics import explained as explain
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings

RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)
NAMES = [
    "mean_std 4 dilated by 3, resampled",
    "mean_std 4 dilated by 3, resampled, 2 rounds",
    "mean_std 2 dilated by 1, shared, resampled",
]
SEED = 3


@pytest.fixture(scope="module")
def train() -> Split:
    """Two hundred digits, a tenth of which conflict with the square."""
    settings = Settings(dataset="mnist5k", limit=200, conflicting_share=0.1)
    return datasets.load(settings).train


def fit(fold: Split) -> nn.Module:
    network = models.new_model(0)
    training.train(network, fold, epochs=6, batch_size=10)
    return network


FINETUNE = partial(selection.fine_tune, epochs=2)
SAMPLE = 80


@pytest.fixture(scope="module")
def collected(train) -> tuple[HeldOut, dict[str, MaskedDataset]]:
    """With a sample of 80 of the 100 images of each fold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "SAMPLE", SAMPLE)
        patch.setattr(held_out, "LEAST", 10)
        return held_out.collect(train, fit, FINETUNE, RULES, seed=SEED)


@pytest.fixture
def found(collected) -> HeldOut:
    return collected[0]


class Fold(NamedTuple):
    """A fold of the training images, and what is trained on it.

    Attributes:
        index: of the images in the training set.
        images: in [0, 1].
        labels: N.
        networks: model → network.
        masks: candidate → masks of the images of this fold.
    """

    index: np.ndarray
    images: torch.Tensor
    labels: torch.Tensor
    networks: dict[str, nn.Module]
    masks: dict[str, torch.Tensor]


def make_fold(train: Split, index: torch.Tensor) -> Fold:
    """Train all models of a fold, one by one."""
    fold = train[index]
    base = fit(fold)
    as_they_are = MaskedDataset(fold, torch.zeros(100, 28, 28), seed=SEED)
    networks = {ERM: base, NULL: FINETUNE(copy.deepcopy(base), as_they_are)}
    masks = {}
    maps = saliency_maps(base, fold.images, fold.labels)
    for rule in RULES:
        for tuned, masked in masktune(base, fold, rule, FINETUNE, maps, seed=SEED):
            assert tuned is not base
            networks[f"{masked.rule}"] = tuned
            masks[f"{masked.rule}"] = masked.own_masks
    return Fold(index.numpy(), fold.images / 255, fold.labels, networks, masks)


@pytest.fixture(scope="module")
def folds(train) -> list[Fold]:
    return [make_fold(train, index) for index in data.folds(train.labels, SEED)]


def predict(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return network.eval()(images).argmax(1)


def pairs(folds: list[Fold]) -> list[tuple[Fold, Fold]]:
    """Each fold, and the one whose models have not seen it."""
    first, second = folds
    return [(first, second), (second, first)]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def exchange(
    images: torch.Tensor, masks: torch.Tensor, partners: torch.Tensor
) -> torch.Tensor:
    """What the mask of either image hides comes from the partner."""
    hidden = masks | masks[partners]
    return torch.where(hidden[:, None], images[partners], images)


def test_each_image_is_predicted_by_the_models_that_have_not_seen_it(
    found, folds, train
):
    predictions = found.predictions
    assert predictions.columns.tolist() == [ERM, NULL, *NAMES]
    assert found.labels.tolist() == train.labels.tolist()
    for fold, other in pairs(folds):
        for name, network in other.networks.items():
            expected = predict(network, fold.images)
            assert predictions[name][fold.index].tolist() == expected.tolist()


def test_the_masks_of_an_image_are_those_of_the_models_that_have_seen_it(
    collected, folds
):
    _, candidates = collected
    assert [*candidates] == [NULL, *NAMES]
    assert not candidates[NULL].own_masks.any()
    for name in NAMES:
        masked = candidates[name]
        assert masked.fill == "resample"
        assert masked.seed == SEED
        for fold in folds:
            assert torch.equal(masked.own_masks[fold.index], fold.masks[name])


def test_the_worst_class_of_the_images_that_masks_resample(found, folds):
    resampled = found.resampled
    assert resampled.columns.tolist() == [ERM, NULL, *NAMES]
    sample = torch.randperm(100, generator=generator(SEED))[:SAMPLE]
    # of an epoch that is the first
    partners = torch.randperm(SAMPLE, generator=generator(SEED + 1))
    labels = torch.cat([fold.labels[sample] for fold in folds])
    for mask in NAMES:
        for name in resampled:
            predicted = []
            for fold, other in pairs(folds):
                masks = fold.masks[mask][sample]
                images = exchange(fold.images[sample], masks, partners)
                predicted.append(predict(other.networks[name], images))
            right = torch.cat(predicted) == labels
            worst = min(right[labels == label].double().mean() for label in (0, 1))
            assert resampled.loc[mask, name] == pytest.approx(worst.item())
    assert found.smallest_class == labels.bincount().min()


def test_of_a_rare_class_as_many_images_are_resampled_as_count(train, monkeypatch):
    monkeypatch.setattr(held_out, "SAMPLE", 20)
    monkeypatch.setattr(held_out, "LEAST", 5)
    of_class = [(train.labels == label).nonzero()[:, 0] for label in (0, 1)]
    rare = train[torch.cat([of_class[0], of_class[1][:10]])]
    found, _ = held_out.collect(rare, fit, FINETUNE, RULES[:1], seed=SEED)
    assert found.smallest_class == 10


def test_a_mistake_is_explained_if_it_is_right_with_three_images_of_its_class(
    found, folds
):
    explained = found.explained
    assert explained.columns.tolist() == NAMES
    assert explained.any(axis=None)
    for fold, other in pairs(folds):
        erm = other.networks[ERM]
        is_mistake = predict(erm, fold.images) != fold.labels
        for name in NAMES:
            is_explained = is_mistake.clone()
            random = generator(SEED)
            for _ in range(3):
                partners = data.class_partners(fold.labels, random)
                images = exchange(fold.images, fold.masks[name], partners)
                is_explained &= predict(erm, images) == fold.labels
            assert explained[name][fold.index].tolist() == is_explained.tolist()
    split = Split(fold.images, fold.labels)
    assert not explain(erm, split, fold.masks[name], fold.labels).any()  # no mistake


def test_what_share_is_hidden_and_where_most(found, folds):
    for name in NAMES:
        masks = torch.cat([fold.masks[name] for fold in folds]).double()
        assert found.hidden[name] == pytest.approx(masks.mean().item())
        # the square is there
        assert found.place[name] == "top left"


@pytest.fixture(scope="module")
def found_in_few(train) -> dict[str, np.ndarray]:
    """Of a quarter of the images, in one process, without a stop."""
    found, _ = held_out.collect(train[::4], fit, FINETUNE, RULES)
    return found.to_arrays()


def test_two_processes_find_what_one_finds(train, found_in_few):
    found, _ = held_out.collect(train[::4], fit, FINETUNE, RULES, jobs=2)
    for name, array in found.to_arrays().items():
        np.testing.assert_array_equal(array, found_in_few[name])


def test_masks_by_exchange_hide_where_mistakes_on_the_other_fold_come_from(train):
    rule = Rule(param=1.0, shared=True, fill="resample", exchange=True)
    # nothing is explained by gradients
    found, masked = held_out.collect(
        train, fit, unchanged, [rule], explain=None, seed=SEED
    )
    parts = data.folds(train.labels, SEED)
    maps = []
    for index, others in (parts, parts[::-1]):
        fold, other = train[index], train[others]
        erm = fit(fold)
        predicted = predict(erm, other.images / 255)
        falls = exchange_map(erm, other, predicted, SEED)
        expected = rule.mask(fold, falls.clamp(min=0).expand(100, -1, -1))
        assert expected.own_masks.any()
        assert torch.equal(masked[f"{rule}"].own_masks[index], expected.own_masks)
        maps.append(falls.numpy())
    np.testing.assert_allclose(found.mistake_map, (maps[0] + maps[1]) / 2)


def test_what_was_stopped_goes_on_with_the_networks_that_are_saved(
    train, found_in_few, tmp_path
):
    calls = []

    def counted_fit(fold):
        calls.append("fit")
        return fit(fold)

    def stopped_once(network, masked):
        calls.append("finetune")
        if calls.count("finetune") == 3:
            raise KeyboardInterrupt
        return FINETUNE(network, masked)

    arguments = (train[::4], counted_fit, stopped_once, RULES)
    with pytest.raises(KeyboardInterrupt):
        held_out.collect(*arguments, folder=tmp_path)
    found, _ = held_out.collect(*arguments, folder=tmp_path)
    assert calls.count("fit") == 2
    assert calls.count("finetune") == 9  # four for each fold, and the one stopped
    for name, array in found.to_arrays().items():
        np.testing.assert_array_equal(array, found_in_few[name])
    assert not [*tmp_path.rglob("*.part")]
    held_out.collect(*arguments, folder=tmp_path, seed=1)  # of other folds
    assert calls.count("fit") == 4


def unchanged(network: nn.Module, _masked: MaskedDataset) -> nn.Module:
    return network


def test_a_round_that_hides_nothing_more_is_no_candidate(train):
    weak = Rule(param=28.0, fill="resample", rounds=3)  # hides nothing
    found, masked = held_out.collect(train, fit, unchanged, [weak])
    assert [*masked] == [NULL, "mean_std 28, resampled"]
    assert [*found.predictions] == [ERM, *masked]


def test_where_the_rounds_of_one_fold_end_its_last_masks_are_taken_again(train):
    """Only the second network looks at another row once it is fine-tuned."""
    rows = iter([0, 0, 0, 1])

    def explain(_network, images, _labels):
        maps = torch.zeros(len(images), 28, 28)
        maps[:, next(rows)] = 1
        return maps

    def untrained(_fold):
        return models.new_model(0)

    rule = Rule("threshold", 0.5, "nearest", fill="resample", rounds=2)
    found, masked = held_out.collect(
        train, untrained, unchanged, [rule], explain=explain
    )
    assert [*found.hidden] == pytest.approx([1 / 28, 1.5 / 28])
    first, second = data.folds(train.labels, 0)
    own_masks = masked[f"{rule}"].own_masks
    assert own_masks[first].sum((1, 2)).eq(28).all()
    assert own_masks[second].sum((1, 2)).eq(56).all()


def test_a_fit_or_a_finetune_that_returns_no_new_network_is_refused(train):
    few = train[::4]
    network = models.new_model(0)

    def wrap_it(_fold):
        return nn.Sequential(network, nn.Identity())

    def return_none(*_):
        return None

    with pytest.raises(ValueError, match="fit returned the same network twice"):
        held_out.collect(few, wrap_it, unchanged, RULES)
    with pytest.raises(TypeError, match="fit returned None; allowed: the trained"):
        held_out.collect(few, return_none, unchanged, RULES)
    with pytest.raises(TypeError, match="finetune returned None; allowed"):
        held_out.collect(few, fit, return_none, RULES)


@pytest.mark.parametrize("counts", [[100], [100, 1]])
def test_one_class_or_a_single_image_of_one_is_refused(counts, train):
    index = [
        (train.labels == label).nonzero()[:count, 0]
        for label, count in enumerate(counts)
    ]
    message = f"classes 0, 1, … have {counts} images; allowed: 2 classes or more"
    with pytest.raises(ValueError, match=re.escape(message)):
        held_out.collect(train[torch.cat(index)], fit, FINETUNE, RULES)
