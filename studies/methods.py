"""Twelve other methods, and ours, on the same images; notebook 10 says what each is.

    OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 python studies/methods.py tune
    OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 python studies/methods.py

The first command tries settings of each method on one development seed, and writes
them to `results/reference_10_tuning.csv`: two hours of one core. The second one trains
each method with the best of its settings on other seeds, ten for the square and five
for others, and writes `results/reference_10_methods.csv`: three hours of one core. Runs
that are in a table are skipped; to repeat one, delete its rows.

The network is the same for each method. One that trains it whole does so as ERM is
trained, with a loss, a rate and a weight decay of its own; then by the schedule of our
fine-tuning. It is judged after 10, 20 and 50 epochs, and after ours. The referee of
methods that know groups is the worst group of 800 held-out images; that of the others
is the lower accuracy on those of them that are mistakes of ERM, and on the rest.
MaskTune is not tuned.

Below, `task` is a `Task`. A method yields one network after the other, and before each,
in words, how it was made.
"""

import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from places import box
from resume import resume
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import ParameterGrid
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR, LRScheduler, StepLR
from torchvision.transforms.v2 import RandomErasing

from masktune_utils import (
    data,
    datasets,
    experiment,
    masking,
    models,
    results,
    training,
)
from masktune_utils.choice import chosen
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.experiment import Trained
from masktune_utils.metrics import predict
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import REPOSITORY, Settings

FRESH = range(20, 25)  # seeds that nothing was developed on
SEEDS = {"square": [*range(5), *FRESH], "digit_color": FRESH, "square_anywhere": FRESH}
BFLOAT16 = training.has_bfloat16(torch.device("cpu"))
DEVELOPMENT = 30  # the seed of the settings
RATE = 0.01  # of ERM
DECAY = 1e-4
STOPS = (10, 20, 50)  # epochs after which a network is judged
BY_HAND = "MaskTune, a place by hand"
TUNING = REPOSITORY / "results" / "reference_10_tuning.csv"
FOLDER = TemporaryDirectory()  # models are not kept

Networks = Iterator[tuple[str, nn.Module]]  # how each was made, and the network


class Task(NamedTuple):
    """What all methods start from.

    Attributes:
        settings: the experiment.
        sets: its images.
        train: the training images.
        held_out: on which referees judge.
        trained: ERM.
        base: its network.
        rate: of networks that are trained whole.
        decay: their weight decay.
    """

    settings: Settings
    sets: BiasedSets
    train: Split
    held_out: Split
    trained: Trained
    base: nn.Module
    rate: float = RATE
    decay: float = DECAY

    @property
    def rng(self) -> Generator:
        """A new source of random choices."""
        return Generator().manual_seed(self.settings.seed)


# The common parts.


def new_network(task: Task, other: int = 0) -> nn.Module:
    """As ERM starts, or with another seed."""
    return models.new_model(task.settings.seed + other)


def features(network: nn.Module, images: Split) -> Tensor:
    """The inputs of the last layer."""
    body = nn.Sequential(network.backbone, network.linear[:-1])
    return predict(body, images)


def each_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image."""
    return F.cross_entropy(logits, labels, reduction="none")


def probability(logits: Tensor, labels: Tensor) -> Tensor:
    """Of the label of each image."""
    return logits.softmax(1).gather(1, labels[:, None])[:, 0]


def is_right(network: nn.Module, images: Split) -> Tensor:
    """Which images have the prediction of their class."""
    return predict(network, images).argmax(1) == images.labels


def worst(right: Tensor, groups: Tensor) -> float:
    """The lowest accuracy of a group, by the number of each image's group."""
    return pd.Series(right).groupby(groups.numpy()).mean().min()


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def made(how: str, networks: Networks) -> nn.Module:
    """The network that was made so; those after it are not trained."""
    return next(network for words, network in networks if words == how)


def fit(
    task: Task,
    network: nn.Module,
    loss_of: Callable,
    epochs: int = STOPS[-1],
    weights: Tensor | None = None,
) -> Networks:
    """Yield the network, trained as ERM is, after `STOPS`; then after our schedule.

    Args:
        task: of which are the images, the rate and the weight decay.
        network: all of its weights are trained.
        loss_of: (images, labels, their index) → the loss of a batch.
        epochs: the last of the first schedule.
        weights: if there are any, images are drawn by these, with replacement.
    """
    train = task.train
    settings = task.settings
    count = len(train)
    shares = torch.ones(count) if weights is None else weights
    rng = task.rng

    def descend_for_an_epoch(sgd: SGD, batch_size: int, schedule: LRScheduler) -> None:
        order = torch.multinomial(shares, count, weights is not None, generator=rng)
        for index in order.split(batch_size):
            if len(index) == 1:  # batch normalisation needs more
                continue
            batch, labels = train.batch(index)
            with torch.autocast("cpu", torch.bfloat16, enabled=BFLOAT16):
                loss = loss_of(batch, labels, index)
            descend(sgd, loss)
            schedule.step()

    def optimizer(rate: float) -> SGD:
        weights = network.parameters()
        return SGD(weights, rate, momentum=0.9, weight_decay=task.decay)

    sgd = optimizer(task.rate)
    steps = math.ceil((count - 1) / settings.batch_size)
    schedule = StepLR(sgd, settings.lr_decay_epochs * steps, 0.5)
    for epoch in range(1, epochs + 1):
        descend_for_an_epoch(sgd, settings.batch_size, schedule)
        if epoch in (*STOPS, epochs):
            yield f"{epoch} epochs", network
    epochs = chosen.default_epochs(count)
    sgd = optimizer(chosen.LR)
    steps = epochs * math.ceil((count - 1) / chosen.BATCH_SIZE)
    schedule = LinearLR(sgd, 1, 0, steps)
    for _ in range(epochs):
        descend_for_an_epoch(sgd, chosen.BATCH_SIZE, schedule)
    yield "ours", network


def by_erm(task: Task, epochs: int = STOPS[-1]) -> Networks:
    """The cross-entropy of all images."""
    network = new_network(task)

    def loss_of(batch, labels, _index):
        return F.cross_entropy(network(batch), labels)

    return fit(task, network, loss_of, epochs)


def fit_plainly(task: Task, epochs: int = STOPS[-1]) -> nn.Module:
    """ERM as it is, or for fewer epochs."""
    plain = task._replace(rate=RATE, decay=DECAY)
    return made(f"{epochs} epochs", by_erm(plain, epochs))


# Without groups.


def random_erasing(task: Task, p: float) -> Networks:
    """A black rectangle at a random place of a share of the images."""
    network = new_network(task)
    erase = RandomErasing(p)
    torch.manual_seed(task.settings.seed)

    def loss_of(batch, labels, _index):
        erased = torch.stack([erase(image) for image in batch])
        return F.cross_entropy(network(erased), labels)

    return fit(task, network, loss_of)


def train_weighted(
    task: Task,
    wrong: Tensor,
    factor: float,
) -> Networks:
    """A new network; what was wrong counts that many times as much."""
    network = new_network(task)
    weights = 1 + (factor - 1) * wrong.float()

    def loss_of(batch, labels, index):
        return (weights[index] * each_loss(network(batch), labels)).mean()

    return fit(task, network, loss_of)


def jtt(task: Task, factor: float) -> Networks:
    """What a network of one epoch gets wrong counts more for a second one."""
    wrong = ~is_right(fit_plainly(task, 1), task.train)
    return train_weighted(task, wrong, factor)


def lff(task: Task, q: float) -> Networks:
    """Two networks side by side; what is hard for the first, biased one counts more."""
    train = task.train
    twins = nn.ModuleList([new_network(task), new_network(task)])
    averages = torch.zeros(2, len(train))  # of the losses, moving

    def loss_of(batch, labels, index):
        outputs = [network(batch).float() for network in twins]
        losses = torch.stack([each_loss(logits, labels) for logits in outputs])
        old = averages[:, index]
        new = 0.7 * old + 0.3 * losses.detach()
        averages[:, index] = torch.where(old == 0, losses.detach(), new)
        of_classes = [averages[:, train.labels == k].amax(1) for k in (0, 1)]
        largest = torch.stack(of_classes, 1)
        biased, other = averages[:, index] / largest[:, labels]
        difficulty = biased / (biased + other + 1e-8)
        # Generalized cross-entropy; times q, as in the authors' code.
        share = probability(outputs[0], labels).detach()
        of_biased = q * share**q * losses[0]
        return (of_biased + difficulty * losses[1]).mean()

    for how, (_, network) in fit(task, twins, loss_of):
        yield how, network


def ula(task: Task, epochs: int) -> Networks:
    """What a biased network's prediction says of the class is added to the logits."""
    train = task.train
    logits = predict(fit_plainly(task, epochs), train)
    # Row k: the share of each label where the biased network predicts class k.
    joint = logits.softmax(1).double().T @ F.one_hot(train.labels).double()
    conditional = joint / joint.sum(1, keepdim=True)
    shifts = conditional.log()[logits.argmax(1)].float()
    network = new_network(task)

    def loss_of(batch, labels, index):
        return F.cross_entropy(network(batch) + shifts[index], labels)

    yield from fit(task, network, loss_of)


def afr(task: Task) -> Networks:
    """ERM on four fifths of the images; its last layer, reweighted, on the rest."""
    count = len(task.train)
    order = torch.randperm(count, generator=task.rng)
    early, late = [task.train[index] for index in order.split(count * 4 // 5)]
    first = fit_plainly(task._replace(train=early))
    labels = late.labels
    inputs = features(first, late)
    share = probability(first.linear[-1](inputs), labels).detach()
    for gamma in (1, 2, 4, 8, 16):
        weights = (-gamma * share).exp() / labels.bincount()[labels]
        weights /= weights.sum()
        network = deepcopy(first)
        layer = network.linear[-1]
        sgd = SGD(layer.parameters(), 0.01)
        for _ in range(500):
            loss = weights @ each_loss(layer(inputs), labels)
            sgd.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(layer.parameters(), 1)
            sgd.step()
        yield f"γ = {gamma}", network


def salient_parts(task: Task) -> Tensor:
    """N×H×W, True where ERM looks: the parts of DaC.

    Of the limits, an image has the one where the curve of its losses is furthest below
    the chord; or the last.
    """
    train = task.train
    predicted = predict(task.base, train).argmax(1)
    maps = saliency_maps(task.base, train.images, predicted)
    maps = masking.resize(maps, train.images.shape[-2:])
    quantiles = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    limits = maps.flatten(1).quantile(quantiles, dim=1)[:, :, None, None]
    losses = []
    for limit in limits:
        masked = masking.MaskedDataset(train, maps < limit)
        losses.append(each_loss(predict(task.base, masked), train.labels))
    curves = torch.stack(losses)
    lowest = curves.amin(0)
    scaled = (curves - lowest) / (curves.amax(0) - lowest).clamp(min=1e-8)
    below = torch.linspace(0, 1, len(limits))[:, None] - scaled
    furthest = torch.where(below.amax(0) > 0, below.argmax(0), len(limits) - 1)
    return maps >= limits[furthest, torch.arange(len(train))]


def new_last_layer(rng: Generator) -> nn.Linear:
    """One with random weights, for the 256 features of a SmallCNN."""
    layer = nn.Linear(256, 2)
    nn.init.xavier_uniform_(layer.weight, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def dac(task: Task, kept: str, alpha: float) -> Networks:
    """A new last layer, fitted to images, parts and compositions.

    What is `kept` as parts: what ERM looks at, or the rest.

    A composition is a part over the rest of an image of another class, if there is any.
    """
    train = task.train
    parts = salient_parts(task)
    if kept == "the rest":
        parts = ~parts
    network = deepcopy(task.base).eval().requires_grad_(False)
    losses = each_loss(predict(network, train), train.labels)
    is_sure = losses <= losses.quantile(0.8)
    rng = task.rng
    layer = new_last_layer(rng)
    network.linear[-1] = layer
    adam = Adam(layer.parameters(), 0.005)
    scheduler = StepLR(adam, 5, 0.5)
    for _ in range(20):
        for index in torch.randperm(len(train), generator=rng).split(64):
            originals, labels = train.batch(index)
            color = originals.mean((0, 2, 3), keepdim=True)
            sure = index[is_sure[index]]
            images, of_sure = train.batch(sure)
            part = parts[sure][:, None]
            alone = torch.where(part, images, color)
            rest = torch.where(part, color, images)
            is_other = of_sure[:, None] != of_sure
            partners = torch.multinomial(is_other + 1e-9, 1, generator=rng)[:, 0]
            together = torch.where(part, images, rest[partners])
            logits = network(torch.cat([originals, alone, together]))
            losses = each_loss(logits, torch.cat([labels, of_sure, of_sure]))
            weights = torch.full_like(losses, 1 / len(index))
            weights[len(index) :] = alpha / max(1, len(sure))
            descend(adam, weights @ losses)
        scheduler.step()
    yield "", network


def halves(held_out: Split, seed: int) -> list[Split]:
    """Held-out images to fit, and others to judge."""
    return [held_out[index] for index in data.folds(held_out.labels, seed)]


def self_finetuned(task: Task, epochs: int) -> Networks:
    """ERM's last layer, trained on where it disagrees most with an earlier network."""
    base = task.base
    late, _ = halves(task.held_out, task.settings.seed)
    early = predict(fit_plainly(task, epochs), late).softmax(1)
    final = predict(base, late).log_softmax(1)
    disagreement = F.kl_div(final, early, reduction="none").mean(1)
    order = disagreement.argsort(descending=True, stable=True)
    for count in (20, 100):
        images = late[order[:count]]
        labels = images.labels
        inputs = features(base, images)
        weights = 1 / labels.bincount()[labels]
        network = deepcopy(base)
        layer = network.linear[-1]
        rng = task.rng
        sgd = SGD(layer.parameters(), 0.01, weight_decay=1e-4)
        for _ in range(250):
            index = torch.multinomial(weights, 32, replacement=True, generator=rng)
            descend(sgd, F.cross_entropy(layer(inputs[index]), labels[index]))
        yield f"{count} images", network


def environments(
    logits: Tensor,
    labels: Tensor,
    rng: Generator,
) -> Tensor:
    """N: the number of each image's environment, as EIIL finds them."""
    errors = logits.softmax(1) - F.one_hot(labels)
    slopes = (errors * logits).sum(1)  # of the losses, by a scale of the logits
    split = torch.randn(len(labels), generator=rng).requires_grad_()
    adam = Adam([split], 0.01)
    for _ in range(20_000):
        share = split.sigmoid()
        penalties = (slopes * torch.stack([share, 1 - share])).mean(1)
        descend(adam, -penalties.square().mean())
    return 2 * labels + (split > 0)


def last_layers(
    task: Task,
    inputs: Tensor,
    labels: Tensor,
    strength: float,
) -> Iterator[nn.Linear]:
    """Yield a new last layer after each of 100 epochs."""
    rng = task.rng
    layer = new_last_layer(rng)
    adam = Adam(layer.parameters(), 0.001)
    scheduler = StepLR(adam, 85, 0.1)
    for _ in range(100):
        for index in torch.randperm(len(labels), generator=rng).split(32):
            loss = F.cross_entropy(layer(inputs[index]), labels[index])
            penalty = layer.weight.abs().sum() + layer.bias.abs().sum()
            descend(adam, loss + strength * penalty)
        scheduler.step()
        yield layer


def evals(task: Task) -> Networks:
    """A last layer fitted to extreme losses, the best by environments that it finds."""
    late, others = halves(task.held_out, task.settings.seed)
    network = deepcopy(task.base)
    groups = environments(predict(network, others), others.labels, task.rng)
    losses = each_loss(predict(network, late), late.labels)
    order = losses.argsort(descending=True, stable=True)
    low, high = [order[late.labels[order] == label] for label in (0, 1)]
    inputs = features(network, late)
    of_others = features(network, others)
    best = -1
    for count, strength in itertools.product((2, 3, 5, 10, 20, 50), (0, 0.01, 0.1)):
        parts = [low[:count], low[-count:], high[:count], high[-count:]]
        index = torch.cat(parts)
        for layer in last_layers(task, inputs[index], late.labels[index], strength):
            right = layer(of_others).argmax(1) == others.labels
            accuracy = worst(right, groups)
            if accuracy > best:
                best = accuracy
                network.linear[-1].load_state_dict(layer.state_dict())
    yield "", network


# With groups, or with images of another kind.


def groups_of(images: Split) -> Tensor:
    """N: the number of each image's class × shortcut."""
    return 2 * images.labels + images.has_shortcut


def group_dro(task: Task, *, is_balanced: bool) -> Networks:
    """The weight of a group grows with its loss."""
    return dro(task, groups_of(task.train), is_balanced)


def dro(task: Task, members: Tensor, is_balanced: bool) -> Networks:
    """The same by numbers of groups, of which equally many images are drawn, or not."""
    shares = 1 / members.bincount()[members].double() if is_balanced else None
    network = new_network(task)
    weights = torch.ones(4)

    def loss_of(batch, labels, index):
        groups = members[index]
        losses = each_loss(network(batch), labels)
        sums = torch.zeros(4).index_add(0, groups, losses)
        means = sums / groups.bincount(minlength=4).clamp(min=1)
        weights.mul_((0.01 * means.detach()).exp())
        weights.div_(weights.sum())
        return weights @ means

    return fit(task, network, loss_of, weights=shares)


def balanced(members: list[Tensor], rng: Generator) -> Tensor:
    """As many images of each group as the smallest has."""
    few = min(map(len, members))

    def draw(index):
        return index[torch.randperm(len(index), generator=rng)[:few]]

    return torch.cat([*map(draw, members)])


def dfr(task: Task) -> Networks:
    """ERM's last layer, fitted again on held-out images with balanced groups."""
    held_out = task.held_out
    network = deepcopy(task.base).requires_grad_(False)
    scaler = StandardScaler().fit(features(network, task.train))
    inputs = scaler.transform(features(network, held_out))
    labels = held_out.labels.numpy()
    rng = task.rng
    members = [*data.group_members(held_out).values()]
    large = [index for index in members if len(index) > 1]
    to_fit = balanced([index[::2] for index in large], rng)

    def regression(index, strength):
        fresh = LogisticRegression(
            C=strength,
            l1_ratio=1,  # L1 only from scikit-learn 1.8 on
            solver="liblinear",
            random_state=task.settings.seed,
        )
        return fresh.fit(inputs[index], labels[index])

    def worst_group(strength):
        right = regression(to_fit, strength).predict(inputs) == labels
        return min(right[index[1::2]].mean() for index in large)

    best = max((1, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01), key=worst_group)
    fits = [regression(balanced(members, rng), best) for _ in range(20)]
    weight = np.mean([fit.coef_[0] for fit in fits], axis=0) / scaler.scale_
    bias = np.mean([fit.intercept_[0] for fit in fits]) - weight @ scaler.mean_
    # A regression has one score: half of it for class 1, minus half of it for class 0.
    halves = np.array([-0.5, 0.5])
    layer = network.linear[-1]
    layer.weight.copy_(torch.tensor(np.outer(halves, weight)))
    layer.bias.copy_(torch.tensor(halves * bias))
    yield "", network


def dbat(task: Task, alpha: float) -> Networks:
    """A second network disagrees with ERM on shifted images."""
    # The same images are held out, whatever the share.
    shifted = datasets.load(task.settings.replace(conflicting_share=0.5)).validation
    shares, predicted = predict(task.base, shifted).softmax(1).max(1)
    network = new_network(task, 1)
    rng = task.rng

    def loss_of(batch, labels, _index):
        drawn = torch.randint(len(shifted), (len(batch),), generator=rng)
        unlabelled, _ = shifted.batch(drawn)
        share = shares[drawn]
        other = probability(network(unlabelled).float(), predicted[drawn])
        # Little where the second network denies what the first one says.
        denial = -(share * (1 - other) + other * (1 - share) + 1e-7).log()
        return F.cross_entropy(network(batch), labels) + alpha * denial.mean()

    return fit(task, network, loss_of)


# Groups that are found.


@functools.cache
def wrong_by_xrm(shortcut: str, seed: int) -> Tensor:
    """Which training images one of two networks gets wrong, that flip their labels."""
    task = start(shortcut, seed)
    train = task.train
    twins = nn.ModuleList([new_network(task), new_network(task, 1)])
    rng = task.rng
    is_first = torch.rand(len(train), 1, generator=rng) < 0.5
    targets = train.labels.clone()  # some are changed to what a twin predicts

    def loss_of(batch, _labels, index):
        first, second = [network(batch).float() for network in twins]
        seen = torch.where(is_first[index], first, second)
        unseen = torch.where(is_first[index], second, first)
        old = targets[index]
        losses = each_loss(seen, old)
        share, predicted = unseen.detach().softmax(1).max(1)
        chance = (2 * share - 1).clamp(0, 1)
        is_flipped = torch.bernoulli(chance, generator=rng).bool()
        targets[index] = torch.where(is_flipped, predicted, old)
        return sum(losses[old == label].mean() for label in old.unique())

    twins = made(f"{STOPS[-1]} epochs", fit(task, twins, loss_of))
    return ~(is_right(twins[0], train) & is_right(twins[1], train))


def xrm(task: Task) -> Tensor:
    """The same for a task."""
    return wrong_by_xrm(task.settings.shortcut, task.settings.seed)


def xrm_dro(task: Task, *, is_balanced: bool) -> Networks:
    """GroupDRO, with groups of class × what XRM gets wrong."""
    return dro(task, 2 * task.train.labels + xrm(task), is_balanced)


def xrm_jtt(task: Task, factor: float) -> Networks:
    """What XRM gets wrong counts more."""
    return train_weighted(task, xrm(task), factor)


# ERM as it is, and MaskTune.


def by_nothing(task: Task) -> Networks:
    """ERM that the last layers and MaskTune start from."""
    yield "", task.base


def by_paper(task: Task) -> Networks:
    """MaskTune by the paper's rule."""
    paper = task.settings.replace(method="mean_std", param=2.0, finetune_lr=0.01)
    yield "", experiment.masktune(paper, task.trained).model


def by_choice(task: Task) -> Networks:
    """Ours: a mask that is chosen."""
    choice = experiment.choose_mask(task.trained)
    yield "", experiment.chosen_model(choice, task.trained).model


def by_hand(task: Task) -> Networks:
    """Ours: a person points at the box of the shortcut."""
    place = box(task.train.shortcut.any(0))
    choice = chosen.hide(task.train, place, seed=task.settings.seed)
    yield "", choice.finetune(task.base)


# All of them.


class Method(NamedTuple):
    """One of the methods.

    Attributes:
        make: (task, **a setting) → networks.
        grid: of scikit-learn's `ParameterGrid`: settings that are tried.
        needs: what it must know.
    """

    make: Callable[..., Networks]
    grid: dict[str, list] | list[dict[str, list]]
    needs: str = "classes"


WHOLE = {"rate": [RATE, 0.003], "decay": [DECAY, 1e-2]}  # of a network trained whole


def four(name: str, first: Any, second: Any) -> list[dict[str, list]]:
    """Four of eight settings of three values: any two values occur once together."""
    rate, low_rate = WHOLE["rate"]
    decay, high_decay = WHOLE["decay"]
    values = [
        (rate, decay, first),
        (rate, high_decay, second),
        (low_rate, decay, second),
        (low_rate, high_decay, first),
    ]
    return [{"rate": [r], "decay": [d], name: [value]} for r, d, value in values]


METHODS = {
    "ERM": Method(by_nothing, {}),
    "ERM, tuned": Method(by_erm, WHOLE),
    "random erasing": Method(random_erasing, four("p", 0.5, 0.9)),
    "JTT": Method(jtt, four("factor", 100, 20)),
    "LfF": Method(lff, four("q", 0.7, 0.5)),
    "uLA": Method(ula, four("epochs", 1, 2)),
    "XRM → GroupDRO": Method(xrm_dro, four("is_balanced", True, False)),
    "XRM → JTT": Method(xrm_jtt, four("factor", 100, 20)),
    "AFR": Method(afr, {}),
    "DaC": Method(dac, {"kept": ["looked at", "the rest"], "alpha": [1, 6]}),
    "SELF": Method(self_finetuned, {"epochs": [5, 10, 25]}),
    "EVaLS": Method(evals, {}),
    "GroupDRO": Method(group_dro, four("is_balanced", True, False), "groups"),
    "DFR": Method(dfr, {}, "groups, held out"),
    "D-BAT": Method(dbat, four("alpha", 1, 0.1), "shifted images, unlabelled"),
    "MaskTune, the paper's rule": Method(by_paper, {}),
    "MaskTune, ours": Method(by_choice, {}),
    BY_HAND: Method(by_hand, {}, "a person who points"),
}


@functools.cache
def start(shortcut: str, seed: int) -> Task:
    """What all methods start from."""
    settings = Settings(
        directory=FOLDER.name,
        device="cpu",
        dataset="mnist5k",
        shortcut=shortcut,
        seed=seed,
        validation_share=0.2,
    )
    sets = datasets.load(settings)
    trained = experiment.base_model(settings, sets.train)
    return Task(settings, sets, sets.train, sets.validation, trained, trained.model)


def make(task: Task, method: Method, setting: dict) -> Networks:
    """A method's networks; rate and weight decay are those of the task."""
    own = dict(setting)
    rates = {name: own.pop(name) for name in WHOLE if name in own}
    return method.make(task._replace(**rates), **own)


def referee(task: Task, name: str, network: nn.Module) -> dict[str, float]:
    """What decides on a network, and its accuracy on all held-out images."""
    held_out = task.held_out
    if name == "SELF":  # which fits the others
        _, held_out = halves(held_out, task.settings.seed)
    right = is_right(network, held_out)
    parts = is_right(task.base, held_out)
    if METHODS[name].needs.startswith("groups"):
        parts = groups_of(held_out)
    return {"referee": worst(right, parts), "accuracy": right.double().mean().item()}


def tune(shortcut: str, name: str) -> list[dict]:
    """Rows of all settings of a method."""
    task = start(shortcut, DEVELOPMENT)
    method = METHODS[name]
    rows = []
    for setting in ParameterGrid(method.grid):
        for how, network in make(task, method, setting):
            row = {"setting": json.dumps(setting), "how": how}
            worst_group = results.evaluate(network, task.sets)["worst_group"]
            row |= {**referee(task, name, network), "worst_group": worst_group}
            rows.append(row)
    return rows


def compare(shortcut: str, seed: int) -> list[dict]:
    """A row for each method, by the best of its settings."""
    tried = pd.read_csv(TUNING, keep_default_na=False)
    tried = tried[tried["shortcut"] == shortcut]
    ordered = tried.sort_values(["referee", "accuracy"], kind="stable")
    best = ordered.groupby("method").last()
    task = start(shortcut, seed)
    rows = []
    for name, row in best.reindex([*METHODS]).dropna().iterrows():
        method = METHODS[name]
        setting = json.loads(row["setting"])
        network = made(row["how"], make(task, method, setting))
        accuracies = pd.Series(results.evaluate(network, task.sets))
        rows.append(
            {
                "method": name,
                "needs": method.needs,
                "setting": row["setting"],
                "how": row["how"],
                **accuracies[results.ACCURACIES],
            }
        )
    start.cache_clear()
    return rows


if __name__ == "__main__":
    import methods  # its functions have this name in the other processes, too

    if sys.argv[1:] == ["tune"]:
        plan = [*itertools.product(SEEDS, METHODS)]
        plan.remove(("digit_color", BY_HAND))  # which have no place
        plan.remove(("square_anywhere", BY_HAND))
        resume(TUNING, ["shortcut", "method"], plan, methods.tune)
    else:
        plan = [(shortcut, seed) for shortcut in SEEDS for seed in SEEDS[shortcut]]
        resume("reference_10_methods.csv", ["shortcut", "seed"], plan, methods.compare)
