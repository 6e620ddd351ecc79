"""What models predict for images that they have not seen, recomputed by plain code."""

import copy
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import joblib
import numpy as np
import pytest
import torch
from conftest import TINY
from torch import nn

from masktune_utils import data, datasets, models, training
from masktune_utils.choice import (
    ERM,
    NULL,
    choose,
    chosen,
    exchange,
    held_out,
    load_or_choose,
)
from masktune_utils.choice.exchange import SWAPS, class_partners, exchange_map
from masktune_utils.choice.held_out import HeldOut
from masktune_utils.choice.score import Verdict
from masktune_utils.data import Split
from masktune_utils.masking import NOTHING, MaskedDataset, Rule
from masktune_utils.models import NoMapsError
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings
from masktune_utils.store import CheckpointError

BY_EXCHANGE = Rule(param=1.0, shared=True, fill="resample", exchange=True)
OWN = Rule(param=4.0, dilation=3, fill="resample")
SHARED = Rule(param=2.0, dilation=1, shared=True, fill="resample")
RULES = (
    OWN,
    SHARED,
    BY_EXCHANGE,
    replace(OWN, rounds=2),
    replace(BY_EXCHANGE, rounds=2),
)
NAMES = [  # in the order in which they are tried
    "mean_std 4 dilated by 3, resampled",
    "mean_std 2 dilated by 1, shared, resampled",
    "mean_std 1, shared, by exchange, resampled",
    "mean_std 4 dilated by 3, resampled, 2 rounds",
    "mean_std 1, shared, by exchange, resampled, 2 rounds",
]
ALL = slice(None)
SEED = 3
SAMPLE = 80  # of the 100 images of each fold


@pytest.fixture(scope="module")
def train(few_windows) -> Split:
    """Two hundred digits, a tenth of which conflict with the square."""
    settings = Settings(**TINY, conflicting_share=0.1)
    return datasets.load(settings).train


@pytest.fixture(scope="module")
def few(train) -> Split:
    """A quarter of them."""
    return train[::4]


def fit(fold, _share=1.0):
    network = models.new_model(0)
    training.train(network, fold, epochs=6, batch_size=10)
    return network


FINETUNE = partial(chosen.fine_tune, epochs=2)


def unchanged(network, _masked):
    return network


def try_all(train, fit=fit, finetune=unchanged, rules=RULES, **options) -> HeldOut:
    """What is known once all masks were tried."""
    *_, known = held_out.try_masks(train, fit, finetune, rules, **options)
    return known


@pytest.fixture(scope="module")
def known(train) -> HeldOut:
    """As if there were few mistakes, so that all models predict all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "SAMPLE", SAMPLE)
        patch.setattr(held_out, "FEW", 1000)
        return try_all(train, finetune=FINETUNE, seed=SEED)


# The same by plain code.


@pytest.fixture(scope="module")
def pairs(train) -> list[tuple]:
    """Each fold, and the one whose models have not seen it.

    A fold has `index`, of its images; by model, `networks`, and the `images` that these
    were trained on.
    """
    folds = []
    for index in data.folds(train.labels, SEED):
        half = train[index]
        fold = SimpleNamespace(index=index, images={ERM: half})
        fold.networks = {ERM: fit(half)}
        folds.append(fold)
    nothing = torch.zeros(200, 1, 1)
    tune(folds, NOTHING.mask(train, nothing))
    masked = {ERM: None}
    for rule in RULES:
        before = f"{replace(rule, rounds=1)}" if rule.rounds > 1 else ERM
        if rule.exchange:
            mean = mean_exchange_map(folds, before)
            maps = mean.clamp(min=0).expand(200, -1, -1)
        else:
            maps = saliency_of(folds, before)
        masked[f"{rule}"] = rule.mask(train, maps, masked[before], SEED)
        tune(folds, masked[f"{rule}"])
    return [folds, folds[::-1]]


def tune(folds, masked):
    """Add the networks that are fine-tuned on their halves of masked images."""
    model = f"{masked.rule}"
    for fold in folds:
        masks = masked.own_masks[fold.index]
        half = MaskedDataset(fold.images[ERM], masks, masked.fill, SEED)
        network = copy.deepcopy(fold.networks[ERM])
        fold.images[model] = half
        fold.networks[model] = FINETUNE(network, half)


def saliency_of(folds, model):
    """Maps of all images, each by the network that has seen it."""
    maps = torch.zeros(200, 8, 8)
    for fold in folds:
        half = fold.images[model]
        network = fold.networks[model]
        maps[fold.index] = saliency_maps(network, half.images, half.labels)
    return maps


def mean_exchange_map(folds, model):
    """Where the mistakes of both networks on the other half come from."""
    mean = 0
    for fold, other in (folds, folds[::-1]):
        half = fold.images[model]
        network = other.networks[model]
        predicted = predict(network, half.images / 255)
        mean = mean + exchange_map(network, half, predicted, SEED) / 2
    return mean


def predict(network, images):
    with torch.no_grad():
        return network.eval()(images).argmax(1)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def swapped(images, masks, partners):
    """What the mask of either image hides: from the partner, and pasted into it."""
    hidden = masks | masks[partners]
    others = images[partners]
    cut_out = torch.where(hidden[:, None], others, images)
    pasted = torch.where(hidden[:, None], images, others)
    return cut_out, pasted


def test_each_image_is_predicted_by_the_models_that_have_not_seen_it(
    known, pairs, train
):
    assert [*known.predictions] == [ERM, NULL, *NAMES]
    assert torch.equal(known.labels, train.labels)
    for fold, other in pairs:
        images, _ = fold.images[ERM].batch(ALL)
        for model, network in other.networks.items():
            predicted = known.predictions[model][fold.index]
            assert torch.equal(predicted, predict(network, images))


def test_masks_are_made_for_all_images_by_the_maps_of_both_halves(known, pairs):
    """Later rounds on the images of the round before, by exchange, too."""
    assert [*known.masked] == [NULL, *NAMES]
    assert not known.masked[NULL].own_masks.any()
    for name in NAMES:
        own_masks = known.masked[name].own_masks
        assert own_masks.any()
        for fold, _ in pairs:
            expected = fold.images[name].own_masks
            assert torch.equal(own_masks[fold.index], expected)
        mean_mask = known.mean_masks[name]
        torch.testing.assert_close(mean_mask, own_masks.float().mean(0))
    mean = mean_exchange_map(pairs[0], ERM)
    torch.testing.assert_close(known.mistake_map, mean)


def test_accuracy_where_the_hidden_part_comes_from_another_image(known, pairs):
    order = torch.randperm(100, generator=generator(SEED))
    sample = order[:SAMPLE]
    # of an epoch that is the first
    partners = torch.randperm(SAMPLE, generator=generator(SEED + 1))
    for mask in NAMES:
        assert [*known.resampled[mask]] == [ERM, NULL, *NAMES]
        for model, accuracy in known.resampled[mask].items():
            right = 0
            for fold, other in pairs:
                half = fold.images[mask]
                pixels = half.split.images[sample] / 255
                images, _ = swapped(pixels, half.own_masks[sample], partners)
                predicted = predict(other.networks[model], images)
                right += (predicted == half.labels[sample]).sum().item()
            assert accuracy == pytest.approx(right / (2 * SAMPLE))


def test_a_mistake_is_explained_by_the_share_of_swaps_with_which_it_moves(known, pairs):
    assert known.explained[NAMES[0]].any()
    for fold, other in pairs:
        erm = other.networks[ERM]
        images, labels = fold.images[ERM].batch(ALL)
        predicted = predict(erm, images)
        for name in NAMES:
            masks = fold.images[name].own_masks
            moves = torch.zeros(100)
            random = generator(SEED)
            for _ in range(SWAPS):
                partners = class_partners(labels, random)
                cut_out, pasted = swapped(images, masks, partners)
                is_right = predict(erm, cut_out) == labels
                moves += is_right & (predict(erm, pasted) == predicted)
            shares = known.explained[name][fold.index]
            is_mistake = predicted != labels
            assert torch.equal(shares, is_mistake * moves / SWAPS)


def test_all_is_known_after_each_mask_or_once_of_few_mistakes(few, monkeypatch):
    rules = [OWN, SHARED, BY_EXCHANGE]
    mistakes = try_all(few, rules=rules).is_mistake.sum().item()
    for fewest, counts in ((mistakes, [1, 2, 3]), (mistakes + 1, [3])):
        monkeypatch.setattr(held_out, "FEW", fewest)
        grown = []
        for known in held_out.try_masks(few, fit, unchanged, rules):
            grown.append(len(known.tried))
        assert grown == counts
        assert bool(known.resampled) == (fewest > mistakes)


def test_masks_are_tried_until_one_is_clear(few, monkeypatch):
    tuned = []

    def finetune(network, masked):
        tuned.append(f"{masked.rule}")
        return network

    def decide(known):
        return Verdict(ERM, NAMES[0], "", is_final=len(known.tried) == 1)

    monkeypatch.setattr(chosen, "decide", decide)
    choice = choose(few, fit, finetune, RULES, SEED, early=0)
    assert tuned == [NULL, NULL, NAMES[0], NAMES[0]]
    assert [*choice.held_out.masked] == [NULL, NAMES[0]]
    assert choice.masked.seed == SEED


def without_masks(known):
    """What can be compared by its values."""
    return {name: value for name, value in vars(known).items() if name != "masked"}


@pytest.mark.slow
def test_two_processes_find_what_one_finds_also_for_a_class_of_a_notebook(
    few, few_windows, monkeypatch
):
    monkeypatch.setattr(exchange, "_windows", few_windows)  # as in other processes

    class Own(nn.Sequential):  # cannot be pickled by name
        pass

    def fit_it(fold, _share):
        return Own(fit(fold))

    found = without_masks(try_all(few, fit_it, FINETUNE, [SHARED]))
    with joblib.parallel_config("loky", n_jobs=2):
        again = without_masks(try_all(few, fit_it, FINETUNE, [SHARED]))
    torch.testing.assert_close(again, found, rtol=0, atol=0)


@pytest.fixture
def no_maps(monkeypatch):
    def refuse(*_):
        raise NoMapsError("tokens")

    monkeypatch.setattr(held_out, "saliency_maps", refuse)


@pytest.mark.usefixtures("no_maps")
def test_maps_are_computed_only_if_a_rule_needs_them(few):
    first = next(held_out.try_masks(few, fit, unchanged, [BY_EXCHANGE, OWN]))
    assert first.tried == [NAMES[2]]
    assert first.has_maps


@pytest.mark.usefixtures("no_maps")
def test_a_network_without_maps_is_masked_by_exchange_alone(few):
    known = try_all(few)
    assert known.tried[0] == NAMES[2]
    assert {*known.tried} <= {NAMES[2], NAMES[4]}
    assert not known.has_maps
    with pytest.raises(NoMapsError, match="tokens"):
        try_all(few, rules=[OWN, SHARED])


def test_a_round_that_hides_nothing_more_is_not_tried(few):
    weak = Rule(param=28.0)  # hides nothing
    rounds = [replace(SHARED, rounds=2), replace(weak, rounds=2)]
    known = try_all(few, rules=[weak, *rounds])
    assert known.tried == []


def assigned(network):
    """A new network with new parameters, in the same memory."""
    other = models.new_model(1)
    other.load_state_dict(network.state_dict(), assign=True)
    return other


@pytest.mark.parametrize("again", [nn.Sequential, assigned])
def test_one_network_for_both_folds_is_refused(few, again):
    network = models.new_model(0)
    message = "fit returned two networks that share weights; allowed: a new one"
    with pytest.raises(ValueError, match=message):
        try_all(few, lambda *_: again(network))
    with pytest.raises(ValueError, match=message.replace("fit", "finetune")):
        try_all(few, finetune=lambda *_: again(network))


def test_a_network_without_a_number_for_each_class_is_refused(few):
    network = nn.Sequential(nn.Conv2d(3, 1, 28), nn.Flatten())
    message = r"predicts \[.*\] for two images; allowed: a number for each of 2"
    with pytest.raises(ValueError, match=message):
        try_all(few, lambda *_: network)


def test_a_network_may_predict_more_classes_than_there_are(few):
    known = try_all(few, lambda *_: models.new_model(0, num_classes=3), rules=[SHARED])
    assert len(known.predictions[ERM]) == len(few)


def test_what_is_predicted_must_be_finite_with_every_mask(few):
    def ruin(network, masked):
        if masked.rule == SHARED:
            network.linear[3].bias.data[1] = torch.nan
        return network

    with pytest.raises(ValueError, match="predicts numbers that are not finite"):
        try_all(few, finetune=ruin)


OF_TUPLES = nn.Sequential(nn.Flatten(), nn.LSTM(3 * 28 * 28, 2))
BAD_NETWORKS = {
    "fit returned None; allowed: the network": None,
    "the network returns <class 'tuple'>; allowed: logits": OF_TUPLES,
    r"returns torch.Size\(\[2, 2, 1, 1\]\); allowed": nn.Conv2d(3, 2, 28),
    "torch.bfloat16.*; allowed: torch.float32": models.new_model(0).bfloat16(),
}


def test_a_network_that_we_cannot_work_with_is_refused(few):
    for message, network in BAD_NETWORKS.items():
        with pytest.raises(TypeError, match=message):
            try_all(few, lambda *_, network=network: network)
    with pytest.raises(TypeError, match="finetune returned None; allowed"):
        try_all(few, finetune=lambda *_: None)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch itself
def test_a_compiled_network_is_worked_with_as_it_was(few):
    def compiled(fold, _share):
        return torch.compile(fit(fold))

    def finetune(network, _masked):
        assert isinstance(network, models.SmallCNN)
        return network

    try_all(few, compiled, finetune, [SHARED])


def test_a_choice_is_kept_in_a_file_and_judged_anew(few, tmp_path):
    """With hard masks and soft ones."""
    arguments = {
        "train": few,
        "candidates": [SHARED, Rule("top_k", 0.2)],
        "seed": SEED,
        "made_with": {"size": 28},
    }
    keep = partial(load_or_choose, tmp_path / "choice.pth", finetune=unchanged)
    first = keep(**arguments, fit=fit)
    arguments["candidates"] = tuple(arguments["candidates"])  # in place of a list
    kept = keep(**arguments, fit=None)
    assert kept.verdict == first.verdict
    assert kept.schedule == unchanged
    known = without_masks(first.held_out)
    torch.testing.assert_close(without_masks(kept.held_out), known, rtol=0, atol=0)
    with pytest.raises(TypeError, match="int64 is not JSON"):  # before any training
        load_or_choose(tmp_path / "new.pth", few, None, {"size": np.int64(28)})
    for name, masked in kept.held_out.masked.items():
        made = first.held_out.masked[name]
        torch.testing.assert_close(masked.own_masks, made.own_masks, rtol=0, atol=0)
        assert masked.rule == made.rule
        assert masked.fill == made.fill
        assert masked.seed == SEED
    others = [
        ("train", replace(few, images=255 - few.images)),
        ("train", replace(few, labels=1 - few.labels)),
        ("candidates", [SHARED]),
        ("seed", 1),
        ("early", 0.5),
        ("made_with", {"size": 96}),
    ]
    for name, value in others:
        named = "size" if name == "made_with" else name
        with pytest.raises(CheckpointError, match=f"choice.pth was made with {named}"):
            keep(**arguments | {name: value}, fit=None)


def test_short_trainings_are_asked_first_and_whole_ones_if_they_choose_no_mask(
    few, monkeypatch
):
    shares = []

    def fit_share(fold, share):
        shares.append(share)
        return fit(fold)

    def keep_erm(known):
        return Verdict(ERM, known.tried[0], f"after {known.share}")

    def take_first(known):
        return Verdict(known.tried[0], known.tried[0], f"after {known.share}")

    monkeypatch.setattr(chosen, "decide", take_first)
    taken = choose(few, fit_share, unchanged, [SHARED], early=0.1)
    assert shares == [0.1, 0.1]
    assert taken.reason.startswith("after 0.1\n")
    shares.clear()
    monkeypatch.setattr(chosen, "decide", keep_erm)
    kept = choose(few, fit_share, unchanged, [SHARED], early=0.1)
    assert shares == [0.1, 0.1, 1.0, 1.0]
    assert kept.reason.startswith("after 1.0\n")
    shares.clear()
    choose(few, fit_share, unchanged, [SHARED], early=0)
    assert shares == [1.0, 1.0]
    for bad in ({"early": 1}, {"early": -0.1}, {"seed": -1}):
        with pytest.raises(ValueError, match="allowed: from 0 to below 1; 0 or more"):
            choose(few, fit, **bad)


def test_threads_do_not_share_random_numbers(few):
    """One after the other, in the thread that calls."""
    threads = set()

    def fit_here(fold, _share):
        threads.add(threading.current_thread())
        return fit(fold)

    with joblib.parallel_config("threading", n_jobs=2):
        try_all(few, fit_here, rules=[SHARED])
    assert threads == {threading.current_thread()}
