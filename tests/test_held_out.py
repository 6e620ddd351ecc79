"""What models predict for images that they have not seen, recomputed by plain code."""

import copy
import re
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from torch import nn

from masktune_utils import data, datasets, models, training
from masktune_utils.choice import ERM, NULL, HeldOut, choose, exchange, held_out, score
from masktune_utils.choice.exchange import SWAPS, class_partners, exchange_map
from masktune_utils.choice.held_out import Folds
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset, Rule, masktune
from masktune_utils.models import NoMapsError
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings

BY_EXCHANGE = Rule(param=1.0, shared=True, fill="resample", exchange=True)
RULES = (
    Rule(param=4.0, dilation=3, fill="resample", rounds=2),
    Rule(param=2.0, dilation=1, shared=True, fill="resample"),
)
NAMES = [  # in the order in which they are tried
    "mean_std 4 dilated by 3, resampled",
    "mean_std 2 dilated by 1, shared, resampled",
    "mean_std 4 dilated by 3, resampled, 2 rounds",
]
SEED = 3
SAMPLE = 80  # of the 100 images of each fold


@pytest.fixture(scope="module")
def train() -> Split:
    """Two hundred digits, a tenth of which conflict with the square."""
    settings = Settings(dataset="mnist5k", limit=200, conflicting_share=0.1)
    return datasets.load(settings).train


@pytest.fixture(scope="module")
def few(train) -> Split:
    """A quarter of them."""
    return train[::4]


def fit(fold):
    network = models.new_model(0)
    training.train(network, fold, epochs=6, batch_size=10)
    return network


FINETUNE = partial(score.fine_tune, epochs=2)


def unchanged(network, _masked):
    return network


def all_of(folds, rules=RULES):
    """What is known once all masks were tried."""
    *_, known = folds.try_masks(rules)
    return known


@pytest.fixture(scope="module")
def tried(train) -> Folds:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "SAMPLE", SAMPLE)
        patch.setattr(held_out, "FEW", 1000)  # so that all models predict all
        folds = Folds(train, fit, FINETUNE, seed=SEED)
        all_of(folds)
    return folds


def make_fold(train, index):
    """A fold of the training images, and all models that are trained on it, one by one.

    Attributes:
        index: of the images in the training set.
        images: in [0, 1].
        labels: N.
        networks: model → network.
        masks: mask → of the images of this fold.
    """
    fold = train[index]
    base = fit(fold)
    nothing = torch.zeros(100, 28, 28)
    as_they_are = MaskedDataset(fold, nothing, seed=SEED)
    networks = {
        ERM: base,
        NULL: FINETUNE(copy.deepcopy(base), as_they_are),
    }
    masks = {}
    maps = saliency_maps(base, fold.images, fold.labels)
    for rule in RULES:
        for tuned, masked in masktune(base, fold, rule, FINETUNE, maps, seed=SEED):
            name = f"{masked.rule}"
            networks[name] = tuned
            masks[name] = masked.own_masks
    images, labels = fold.batch(slice(None))
    return SimpleNamespace(
        index=index,
        images=images,
        labels=labels,
        networks=networks,
        masks=masks,
    )


@pytest.fixture(scope="module")
def pairs(train) -> list[tuple]:
    """Each fold, and the one whose models have not seen it."""
    parts = data.folds(train.labels, SEED)
    first, second = [make_fold(train, index) for index in parts]
    return [(first, second), (second, first)]


def predict(network, images):
    with torch.no_grad():
        return network.eval()(images).argmax(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def exchanged(images, masks, partners):
    """What the mask of either image hides comes from the partner."""
    hidden = masks | masks[partners]
    return torch.where(hidden[:, None], images[partners], images)


def test_each_image_is_predicted_by_the_models_that_have_not_seen_it(
    tried, pairs, train
):
    known = tried.held_out
    assert [*known.predictions] == [ERM, NULL, *NAMES]
    assert known.tried == [*known.mean_masks] == NAMES
    assert torch.equal(known.labels, train.labels)
    for fold, other in pairs:
        for name, network in other.networks.items():
            predicted = known.predictions[name][fold.index]
            assert torch.equal(predicted, predict(network, fold.images))


def test_the_masks_of_an_image_are_those_of_the_models_that_have_seen_it(tried, pairs):
    assert [*tried.images] == [NULL, *NAMES]
    assert not tried.images[NULL].own_masks.any()
    for name in NAMES:
        masked = tried.images[name]
        own_masks = masked.own_masks
        assert masked.fill == "resample"
        assert masked.seed == SEED
        assert f"{masked.rule}" == name
        for fold, _ in pairs:
            assert torch.equal(own_masks[fold.index], fold.masks[name])
        mean_mask = tried.held_out.mean_masks[name]
        torch.testing.assert_close(mean_mask, own_masks.float().mean(0))


def test_accuracy_where_the_hidden_part_comes_from_another_image(tried, pairs):
    resampled = tried.held_out.resampled
    order = torch.randperm(100, generator=generator(SEED))
    sample = order[:SAMPLE]
    # of an epoch that is the first
    partners = torch.randperm(SAMPLE, generator=generator(SEED + 1))
    for mask in NAMES:
        assert [*resampled[mask]] == [ERM, NULL, *NAMES]
        for name, accuracy in resampled[mask].items():
            right = 0
            for fold, other in pairs:
                masks = fold.masks[mask][sample]
                images = exchanged(fold.images[sample], masks, partners)
                predicted = predict(other.networks[name], images)
                right += (predicted == fold.labels[sample]).sum().item()
            assert accuracy == pytest.approx(right / (2 * SAMPLE))


def test_a_mistake_is_explained_by_the_share_of_swaps_with_which_it_moves(tried, pairs):
    explained = tried.held_out.explained
    assert explained[NAMES[0]].any()
    for fold, other in pairs:
        erm = other.networks[ERM]
        labels = fold.labels
        predicted = predict(erm, fold.images)
        for name in NAMES:
            moves = torch.zeros(100)
            random = generator(SEED)
            for _ in range(SWAPS):
                partners = class_partners(labels, random)
                for index in (predicted != labels).nonzero()[:, 0]:
                    pair = torch.stack([index, partners[index]])
                    masks = fold.masks[name][pair]
                    swapped = exchanged(fold.images[pair], masks, [1, 0])
                    cut_out, pasted = predict(erm, swapped)
                    is_right = cut_out == labels[index]
                    moves[index] += is_right & (pasted == predicted[index])
            shares = explained[name][fold.index]
            assert torch.equal(shares, moves / SWAPS)


def test_mistakes_are_exchanged_in_batches(train):
    network = models.new_model(0)
    masked = BY_EXCHANGE.mask(train, torch.ones(200, 1, 1))
    as_it_is = MaskedDataset.batch
    with patch.object(MaskedDataset, "batch", autospec=True) as batch:
        batch.side_effect = as_it_is
        exchange.explained(network, masked, 1 - train.labels)
    sizes = [len(call.args[1]) for call in batch.call_args_list]
    assert sizes == [100] * (2 * 2 * SWAPS)


def test_before_any_fine_tuning_the_masks_of_first_rounds_are_known(few):
    def forbidden(*_):
        raise AssertionError

    folds = Folds(few, fit, forbidden)
    known = next(folds.try_masks([*RULES, BY_EXCHANGE]))
    assert [*known.explained] == [*NAMES[:2], f"{BY_EXCHANGE}"]
    assert [*known.predictions] == [ERM]
    assert [*known.resampled[NAMES[0]]] == [ERM]


def test_masks_are_tried_until_one_is_clear(few, monkeypatch):
    tuned = []

    def finetune(network, masked):
        tuned.append(f"{masked.rule}")
        return network

    def judge(known):
        return score.Verdict(ERM, NAMES[0], "", is_final=len(known.tried) == 1)

    monkeypatch.setattr(score, "judge", judge)
    choice = choose(few, fit, finetune, RULES)
    assert tuned == [NULL, NULL, NAMES[0], NAMES[0]]
    assert [*choice.candidates] == [NULL, *NAMES[:2]]


@pytest.fixture(scope="module")
def found_in_few(few) -> HeldOut:
    """Of a quarter of the images, in one process, without a stop."""
    return all_of(Folds(few, fit, FINETUNE))


def assert_same(first, second):
    torch.testing.assert_close(vars(first), vars(second), rtol=0, atol=0)


def test_two_processes_find_what_one_finds_also_for_a_class_of_a_notebook(
    few, found_in_few, tmp_path
):
    class Own(nn.Sequential):  # cannot be pickled by name
        pass

    def fit_it(fold):
        return Own(fit(fold))

    for jobs in (2, 1):
        folds = Folds(few, fit_it, FINETUNE, jobs=jobs, folder=tmp_path)
        assert_same(all_of(folds), found_in_few)


def test_masks_by_exchange_hide_where_mistakes_on_the_fold_come_from(train):
    folds = Folds(train, fit, unchanged, explain=None, seed=SEED)  # no gradients
    known = all_of(folds, [BY_EXCHANGE])
    own_masks = folds.images[f"{BY_EXCHANGE}"].own_masks
    parts = data.folds(train.labels, SEED)
    maps = []
    for index, others in (parts, parts[::-1]):
        fold = train[index]
        judge = fit(train[others])
        predicted = predict(judge, fold.images / 255)
        falls = exchange_map(judge, fold, predicted, SEED)
        misleading = falls.clamp(min=0).expand(100, -1, -1)
        expected = BY_EXCHANGE.mask(fold, misleading).own_masks
        assert expected.any()
        assert torch.equal(own_masks[index], expected)
        maps.append(falls)
    torch.testing.assert_close(known.mistake_map, sum(maps) / 2)


def no_maps(*_):
    raise NoMapsError("tokens")


def test_a_network_without_maps_is_masked_by_exchange_alone(train):
    known = all_of(Folds(train, fit, unchanged, no_maps), [*RULES, BY_EXCHANGE])
    assert [*known.explained] == [f"{BY_EXCHANGE}"]
    assert not known.has_maps
    with pytest.raises(NoMapsError, match="tokens"):
        all_of(Folds(train, fit, unchanged, no_maps), RULES)


def test_what_was_stopped_goes_on_with_the_networks_that_are_saved(
    few, found_in_few, tmp_path
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

    def again(seed=0):
        folds = Folds(few, counted_fit, stopped_once, folder=tmp_path, seed=seed)
        return all_of(folds)

    with pytest.raises(KeyboardInterrupt):
        again()
    assert_same(again(), found_in_few)
    assert calls.count("fit") == 2
    assert calls.count("finetune") == 9  # four for each fold, and the one stopped
    again(seed=1)  # of other folds
    assert calls.count("fit") == 4


def test_other_maps_and_models_make_other_networks_in_the_same_folder(few, tmp_path):
    def rows(_network, images, _labels):
        maps = torch.zeros(len(images), 28, 28)
        maps[:, :3] = 1
        return maps

    def other_fit(_fold):
        return models.new_model(1)

    def found(fit=fit, explain=saliency_maps, folder=None):
        folds = Folds(few, fit, FINETUNE, explain, folder=folder)
        return all_of(folds, RULES[1:])

    found(folder=tmp_path)
    assert_same(found(fit, rows, tmp_path), found(fit, rows))
    for path in tmp_path.glob("ERM*"):
        path.unlink()
    assert_same(found(other_fit, folder=tmp_path), found(other_fit))


def test_a_folder_that_cannot_be_is_refused_at_once(few, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        Folds(few, None, FINETUNE, folder=tmp_path / "file")


def test_a_damaged_network_is_refused_by_the_name_of_its_file(few, tmp_path):
    Folds(few, fit, FINETUNE, folder=tmp_path)
    (path,) = tmp_path.glob("ERM*.pt")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(path.name)):
        Folds(few, fit, FINETUNE, folder=tmp_path)


def test_a_round_that_hides_nothing_more_is_not_tried(few):
    weak = Rule(param=28.0, rounds=3)  # hides nothing
    folds = Folds(few, fit, unchanged)
    assert all_of(folds, [weak]).tried == ["mean_std 28"]
    assert [*folds.images] == [NULL, "mean_std 28"]


@pytest.mark.parametrize("is_frozen", [False, True])
def test_one_network_for_both_folds_is_refused_each_time(few, is_frozen, tmp_path):
    network = models.new_model(0).requires_grad_(not is_frozen)

    def wrap_it(_fold):
        return nn.Sequential(network)

    for _ in range(2):
        with pytest.raises(ValueError, match="fit returned two networks that share"):
            Folds(few, wrap_it, unchanged, folder=tmp_path)


class Tuple(nn.Linear):
    def forward(self, images):
        return (super().forward(images.flatten(1)),)


def test_a_network_without_a_row_for_each_image_is_refused(few):
    pooled = nn.Sequential(nn.Conv2d(3, 2, 3), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="allowed: a finite number for each of 2"):
        Folds(few, lambda _: pooled, unchanged)


BAD_NETWORKS = {
    "fit returned None; allowed: the network": None,
    "the network returns a tuple; allowed: logits": Tuple(3 * 28 * 28, 2),
    "torch.bfloat16.*; allowed: torch.float32": models.new_model(0).bfloat16(),
}


@pytest.mark.parametrize("message", BAD_NETWORKS)
def test_a_network_that_we_cannot_work_with_is_refused(few, message):
    with pytest.raises(TypeError, match=message):
        Folds(few, lambda _: BAD_NETWORKS[message], unchanged)


def test_a_finetune_that_returns_no_network_is_refused(few):
    with pytest.raises(TypeError, match="finetune returned None; allowed"):
        all_of(Folds(few, fit, lambda *_: None))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_a_compiled_network_is_worked_with_as_it_was(few):
    def compiled(fold):
        return torch.compile(fit(fold))

    folds = Folds(few, compiled, unchanged)
    assert isinstance(folds.networks[0], models.SmallCNN)


@pytest.mark.parametrize(("labels", "counts"), [([0, 0, 0], [3]), ([0, 1, 1], [1, 2])])
def test_a_class_without_two_images_is_refused(labels, counts, train):
    split = Split(train.images[:3], torch.tensor(labels))
    message = re.escape(f"have {counts} images; allowed: 2 classes or more, of 2")
    with pytest.raises(ValueError, match=message):
        choose(split, fit)
