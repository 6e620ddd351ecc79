"""Twelve other methods, and ours, on the same images; notebook 10 says what each is.

    OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 python studies/methods.py

makes the runs that are missing in `results/reference_10_methods.csv`, two at a time,
half an hour of one core each. To repeat a run, delete its rows.

The network is the same for each method. One that trains it whole does so as ERM is
trained, with a loss of its own; then by the schedule of our fine-tuning. Both are
judged. Referees on held-out images, which have the bias of training, pick among what
was tried; they do not pick the mask of ours. Rows are of two machines, on which
training differs by rounding; with seed 2 (JTT, uLA: 89.2, 49.6%) the other one has
80.4, 86.0%.

With seed 2, GroupDRO was also tried with a weight decay of 0.01 and 0.1, as its paper
asks for a strong one, D-BAT with α = 0.001 and 0.01, and LfF with networks that start
apart: no referee picks one that is better in the worst group.

Below, `task` is a `Task`. A method yields one network after the other, and before each,
in words, how it was made.
"""

import itertools
from collections.abc import Callable, Iterator
from copy import deepcopy
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from resume import resume
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Generator, Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LinearLR, StepLR
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
from masktune_utils.settings import Settings

KEY = ["conflicting_share", "seed"]
PLAN = [
    (0.01, 0),
    (0.01, 2),
    (0.01, 3),
    (0.01, 4),
    (0.0, 2),
]
NEEDS = {  # method → what it must know; the others: classes
    "GroupDRO": "groups",
    "DFR": "groups, held out",
    "D-BAT": "shifted images, unlabelled",
}

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
        rows: what has been judged.
    """

    settings: Settings
    sets: BiasedSets
    train: Split
    held_out: Split
    trained: Trained
    base: nn.Module
    rows: list[dict]

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


def fit(
    task: Task,
    network: nn.Module,
    loss_of: Callable,
    epochs: int | None = None,
    weights: Tensor | None = None,
) -> Networks:
    """Yield the network, trained as ERM is; go on by our schedule; yield it again.

    Args:
        task: of which are the images, and the epochs if no others are given.
        network: all of its weights are trained.
        loss_of: (images, labels, their index) → the loss of a batch.
        epochs: of the first schedule.
        weights: if there are any, images are drawn by these, with replacement.
    """
    train = task.train
    settings = task.settings
    is_supported = training.has_bfloat16(torch.device("cpu"))
    count = len(train)
    shares = torch.ones(count) if weights is None else weights

    def run(epochs, batch_size, lr, schedule):
        rng = task.rng
        batches = []
        for _ in range(epochs):
            order = torch.multinomial(shares, count, weights is not None, generator=rng)
            # Batch normalisation needs more than one image.
            batches += [index for index in order.split(batch_size) if len(index) > 1]
        sgd = SGD(network.parameters(), lr, momentum=0.9, weight_decay=1e-4)
        steps = len(batches)
        if schedule == "linear":
            scheduler = LinearLR(sgd, 1, 0, steps)
        else:
            scheduler = StepLR(sgd, settings.lr_decay_epochs * steps // epochs, 0.5)
        for index in batches:
            batch, labels = train.batch(index)
            with torch.autocast("cpu", torch.bfloat16, enabled=is_supported):
                loss = loss_of(batch, labels, index)
            descend(sgd, loss)
            scheduler.step()

    run(epochs or settings.epochs, settings.batch_size, settings.lr, "constant")
    yield "ERM's schedule", network
    run(chosen.default_epochs(count), chosen.BATCH_SIZE, chosen.LR, "linear")
    yield "then ours", network


def fit_plainly(task: Task, epochs: int | None = None) -> nn.Module:
    """ERM, or for fewer epochs."""
    network = new_network(task)

    def loss_of(batch, labels, _index):
        return F.cross_entropy(network(batch), labels)

    next(fit(task, network, loss_of, epochs))
    return network


def judge(
    task: Task,
    method: str,
    networks: Networks,
    tried: str = "",
    earlier: float = 0,
) -> None:
    """Add a row for each network of a method, with what each referee says of it.

    Args:
        task: to whose rows they are added.
        method: its name.
        networks: what it makes, when it is asked for the next.
        tried: hyperparameters of all of these.
        earlier: seconds that went before.
    """
    held_out = task.held_out
    labels = held_out.labels
    started = perf_counter()
    for how, network in networks:
        earlier += perf_counter() - started
        accuracies = pd.Series(results.evaluate(network, task.sets))
        right = is_right(network, held_out)
        row = {
            "method": method,
            "needs": NEEDS.get(method, "classes"),
            "tried": f"{tried}, {how}".strip(", "),
            "seconds": earlier,
            **accuracies[results.ACCURACIES],
            "held-out groups": worst(right, 2 * labels + held_out.has_shortcut),
            "ERM's mistakes": worst(right, is_right(task.base, held_out)),
            "worst class": worst(right, labels),
        }
        task.rows.append(row)
        started = perf_counter()


# Without groups.


def random_erasing(task: Task) -> Networks:
    """A black rectangle at a random place of every other image."""
    network = new_network(task)
    erase = RandomErasing()
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


def jtt(
    task: Task,
    epochs: int,
    factor: float,
) -> Networks:
    """What a network of few epochs gets wrong counts more for a second one."""
    wrong = ~is_right(fit_plainly(task, epochs), task.train)
    yield from train_weighted(task, wrong, factor)


def lff(task: Task) -> Networks:
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
        # Generalized cross-entropy; times q = 0.7, as in the authors' code.
        share = probability(outputs[0], labels).detach()
        of_biased = 0.7 * share**0.7 * losses[0]
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


def dac(
    task: Task,
    parts: Tensor,
    alpha: float,
) -> Networks:
    """A new last layer, fitted to images, parts and compositions.

    A composition is a part over the rest of an image of another class, if there is any.
    """
    train = task.train
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
    yield f"α = {alpha}", network


def self_finetuned(
    task: Task,
    late: Split,
    epochs: int,
) -> Networks:
    """ERM's last layer, trained on where it disagrees most with an earlier network."""
    base = task.base
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


def evals(task: Task, late: Split) -> Networks:
    """A last layer fitted to extreme losses, the best by environments that it finds."""
    others = task.held_out
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
                tried = f"k = {count}, λ = {strength}"
                network.linear[-1].load_state_dict(layer.state_dict())
    yield tried, network


# With groups, or with images of another kind.


def group_dro(
    task: Task,
    members: Tensor,
    shares: Tensor | None,
) -> Networks:
    """The weight of a group grows with its loss; `shares` are those of the images."""
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
    yield f"C = {best}", network


def dbat(
    task: Task,
    shifted: Split,
    alpha: float,
) -> Networks:
    """A second network disagrees with ERM on shifted images."""
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


def xrm(task: Task) -> Tensor:
    """Which training images one of the two networks gets wrong."""
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

    next(fit(task, twins, loss_of))
    return ~(is_right(twins[0], train) & is_right(twins[1], train))


# All of them.


def by_paper(task: Task) -> Networks:
    """MaskTune by the paper's rule."""
    paper = task.settings.replace(method="mean_std", param=2.0, finetune_lr=0.01)
    yield "", experiment.masktune(paper, task.trained).model


def by_choice(task: Task) -> Networks:
    """Ours: a mask that is chosen."""
    choice = experiment.choose_mask(task.trained)
    trained = experiment.chosen_model(choice, task.trained)
    yield choice.verdict.chosen, trained.model


def judge_groups(
    task: Task,
    method: str,
    is_known: Tensor,
    earlier: float = 0,
) -> None:
    """GroupDRO with groups of class × what is known of each image."""
    members = 2 * task.train.labels + is_known
    shares = 1 / members.bincount()[members].double()
    judge(task, method, group_dro(task, members, shares), "balanced", earlier)
    judge(task, method, group_dro(task, members, None), "as they come", earlier)


def judge_whole(task: Task) -> None:
    """Methods that train a whole network."""
    judge(task, "random erasing", random_erasing(task))
    for epochs, factor in itertools.product((1, 2), (20, 50, 100)):
        judge(
            task,
            "JTT",
            jtt(task, epochs, factor),
            f"T = {epochs}, λ = {factor}",
        )
    judge(task, "LfF", lff(task))
    for epochs in (1, 2):
        judge(task, "uLA", ula(task, epochs), f"T = {epochs}")
    judge_groups(task, "GroupDRO", task.train.has_shortcut)
    # The same images are held out, whatever the share.
    shifted = datasets.load(task.settings.replace(conflicting_share=0.5)).validation
    for alpha in (0.1, 1, 2):
        judge(
            task,
            "D-BAT",
            dbat(task, shifted, alpha),
            f"α = {alpha}",
            task.trained.seconds,
        )
    started = perf_counter()
    wrong = xrm(task)
    seconds = perf_counter() - started
    judge_groups(task, "XRM → GroupDRO", wrong, seconds)
    for factor in (20, 50, 100):
        judge(
            task,
            "XRM → JTT",
            train_weighted(task, wrong, factor),
            f"λ = {factor}",
            seconds,
        )


def judge_last_layers(task: Task) -> None:
    """Methods that fit the last layer alone."""
    judge(task, "AFR", afr(task))
    seconds = task.trained.seconds
    started = perf_counter()
    salient = salient_parts(task)
    earlier = seconds + perf_counter() - started
    for part, parts in {"looked at": salient, "the rest": ~salient}.items():
        for alpha in (1, 6, 10):
            judge(
                task,
                "DaC",
                dac(task, parts, alpha),
                f"{part} kept",
                earlier,
            )
    # Held-out images to fit, and others to judge.
    to_fit, to_judge = data.folds(task.held_out.labels, task.settings.seed)
    late = task.held_out[to_fit]
    halved = task._replace(held_out=task.held_out[to_judge])
    for share in (0.1, 0.2, 0.5):
        epochs = round(share * task.settings.epochs)
        judge(
            halved,
            "SELF",
            self_finetuned(task, late, epochs),
            f"T = {epochs}",
            seconds,
        )
    judge(halved, "EVaLS", evals(halved, late), earlier=seconds)
    judge(task, "DFR", dfr(task), earlier=seconds)


def compare(settings: Settings) -> pd.DataFrame:
    """The best of each method's rows by each referee."""
    sets = datasets.load(settings)
    erm = experiment.base_model(settings, sets.train)
    task = Task(
        settings=settings,
        sets=sets,
        train=sets.train,
        held_out=sets.validation,
        trained=erm,
        base=erm.model,
        rows=[],
    )
    judge(task, "ERM", iter([("", erm.model)]), earlier=erm.seconds)
    judge_whole(task)
    judge_last_layers(task)
    judge(
        task,
        "MaskTune, the paper's rule",
        by_paper(task),
        earlier=erm.seconds,
    )
    judge(task, "MaskTune, ours", by_choice(task), earlier=erm.seconds)
    tries = pd.DataFrame(task.rows)
    parts = []
    for referee in ("held-out groups", "ERM's mistakes", "worst class"):
        best = tries.groupby("method", sort=False)[referee].idxmax()
        parts.append(tries.loc[best].assign(referee=referee))
    return pd.concat(parts)


def run(conflicting_share: float, seed: int) -> list[dict]:
    """All rows of one experiment and seed; its models are not kept."""
    with TemporaryDirectory() as directory:
        settings = Settings(
            directory=directory,
            device="cpu",
            dataset="mnist5k",
            conflicting_share=conflicting_share,
            seed=seed,
            validation_share=0.2,
        )
        return compare(settings).to_dict("records")


if __name__ == "__main__":
    import methods  # its functions have this name in the other processes, too

    resume("reference_10_methods.csv", KEY, PLAN, methods.run)
