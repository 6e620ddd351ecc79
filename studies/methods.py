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

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pandas as pd
import torch
import torch.nn.functional as F
from resume import resume
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import LinearLR, LRScheduler, StepLR
from torchvision.transforms.v2 import RandomErasing

from masktune_utils import (
    data,
    datasets,
    experiment,
    masking,
    metrics,
    models,
    results,
    saliency,
    shortcuts,
    training,
)
from masktune_utils.data import Split
from masktune_utils.datasets import BiasedSets
from masktune_utils.experiment import Trained
from masktune_utils.settings import REPOSITORY, Settings

FILE = REPOSITORY / "results" / "reference_10_methods.csv"
KEY = ["conflicting_share", "seed"]
PLAN = [(0.01, 0), (0.01, 2), (0.01, 3), (0.01, 4), (0.0, 2)]

Networks = Iterator[tuple[str, nn.Module]]  # how each was made, and the network
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of images, labels and their index


class Task(NamedTuple):
    """What all methods start from.

    Attributes:
        settings: the experiment.
        sets: its images.
        base: the ERM network.
        seconds: that its training took.
        is_mistake: which held-out images it gets wrong.
        rows: what has been judged.
    """

    settings: Settings
    sets: BiasedSets
    base: nn.Module
    seconds: float
    is_mistake: Tensor
    rows: list[dict]

    @property
    def rng(self) -> torch.Generator:
        """A new source of random choices."""
        return torch.Generator().manual_seed(self.settings.seed)

    @property
    def halves(self) -> list[Tensor]:
        """Held-out images to fit, and to judge, for methods that fit some."""
        return data.folds(self.sets.validation.labels, self.settings.seed)


# The common parts.


def new_network(task: Task, other: int = 0) -> nn.Module:
    """As ERM starts, or with another seed."""
    return models.new_model(task.settings.seed + other)


def body(network: nn.Module) -> nn.Module:
    """All but its last layer."""
    return nn.Sequential(network.backbone, network.linear[:-1])


def features(network: nn.Module, images: Split) -> Tensor:
    """The inputs of the last layer."""
    return metrics.predict(body(network), images)


def each_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image."""
    return F.cross_entropy(logits, labels, reduction="none")


def draw_batches(
    count: int,
    epochs: int,
    batch_size: int,
    weights: Tensor | None,
    rng: torch.Generator,
) -> list[Tensor]:
    """The index of each batch; with weights, drawn by these, with replacement."""
    shares = torch.ones(count) if weights is None else weights
    batches = []
    for _ in range(epochs):
        order = torch.multinomial(shares, count, weights is not None, generator=rng)
        batches += order.split(batch_size)
    # Batch normalisation needs more than one image.
    return [index for index in batches if len(index) > 1]


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One step."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def train_on(
    batches: Iterable[Tensor],
    images: Split,
    loss_of: Loss,
    sgd: SGD,
    scheduler: LRScheduler,
) -> None:
    """A step for each batch."""
    is_supported = training.has_bfloat16(torch.device("cpu"))
    for index in batches:
        batch, labels = images.batch(index)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_supported):
            loss = loss_of(batch, labels, index)
        descend(sgd, loss)
        scheduler.step()


def fit(
    task: Task,
    networks: list[nn.Module],
    loss_of: Loss,
    epochs: int | None = None,
    weights: Tensor | None = None,
) -> Networks:
    """Yield the last network, trained as ERM is; go on by our schedule; yield it again.

    Args:
        task: of which are the images, and the epochs if no others are given.
        networks: that are trained together.
        loss_of: the loss of a batch.
        epochs: of the first schedule.
        weights: see `draw_batches`.
    """
    settings = task.settings
    images = task.sets.train
    epochs = epochs or settings.epochs
    parameters = [w for network in networks for w in network.train().parameters()]
    options = {"momentum": 0.9, "weight_decay": 1e-4}
    batches = draw_batches(len(images), epochs, settings.batch_size, weights, task.rng)
    sgd = SGD(parameters, settings.lr, **options)
    every = settings.lr_decay_epochs * len(batches) // epochs
    train_on(batches, images, loss_of, sgd, StepLR(sgd, every, 0.5))
    yield "ERM's schedule", networks[-1]

    ours = experiment.choice_settings(settings.base, len(images))
    batches = draw_batches(
        len(images), ours.finetune_epochs, ours.finetune_batch_size, weights, task.rng
    )
    sgd = SGD(parameters, ours.finetune_lr, **options)
    train_on(batches, images, loss_of, sgd, LinearLR(sgd, 1, 0, len(batches)))
    yield "then ours", networks[-1]


def fit_plainly(task: Task, epochs: int | None = None) -> nn.Module:
    """ERM, or for fewer epochs."""
    network = new_network(task)

    def loss_of(batch: Tensor, labels: Tensor, _index: Tensor) -> Tensor:
        return F.cross_entropy(network(batch).float(), labels)

    next(fit(task, [network], loss_of, epochs))
    return network


def is_wrong(network: nn.Module, images: Split) -> Tensor:
    """Which images it gets wrong."""
    return ~metrics.is_right(metrics.predict(network, images), images.labels)


def judge(
    task: Task,
    method: str,
    networks: Networks,
    tried: str = "",
    earlier: float = 0,
    needs: str = "classes",
    judged_on: slice | Tensor = slice(None),
) -> None:
    """Add a row for each network of a method.

    Args:
        task: to whose rows they are added.
        method: its name.
        networks: what it makes, when it is asked for the next.
        tried: hyperparameters of all of these.
        earlier: seconds that went before.
        needs: what it must know.
        judged_on: which held-out images the referees see.
    """
    started = time.perf_counter()
    for how, network in networks:
        earlier += time.perf_counter() - started
        words = f"{tried}, {how}".strip(", ")
        row = {"method": method, "needs": needs, "tried": words, "seconds": earlier}
        task.rows.append(row | referees(task, network, judged_on))
        started = time.perf_counter()


def referees(task: Task, network: nn.Module, judged_on: slice | Tensor) -> dict:
    """Accuracy on the test sets, their worst group, and what each referee says."""
    accuracies = results.evaluate(network, task.sets)
    held_out = task.sets.validation[judged_on]
    logits = metrics.predict(network, held_out)
    is_right = metrics.is_right(logits, held_out.labels).double()
    is_hard = task.is_mistake[judged_on]
    cells = [is_right[is_hard], is_right[~is_hard]]
    classes = [is_right[held_out.labels == label] for label in (0, 1)]
    return {
        **{name: accuracies[name] for name in results.ACCURACIES},
        "held-out groups": min(metrics.group_accuracy(logits, held_out).values()),
        "ERM's mistakes": min(cell.mean().item() for cell in cells if len(cell)),
        "worst class": min(members.mean().item() for members in classes),
    }


# Without groups.


def random_erasing(task: Task) -> Networks:
    """A black rectangle at a random place of every other image."""
    network = new_network(task)
    erase = RandomErasing()
    torch.manual_seed(task.settings.seed)

    def loss_of(batch: Tensor, labels: Tensor, _index: Tensor) -> Tensor:
        erased = torch.stack([erase(image) for image in batch])
        return F.cross_entropy(network(erased).float(), labels)

    return fit(task, [network], loss_of)


def train_weighted(task: Task, wrong: Tensor, factor: float) -> Networks:
    """A new network; what was wrong counts that many times as much."""
    network = new_network(task)
    weights = 1 + (factor - 1) * wrong.float()

    def loss_of(batch: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return (weights[index] * each_loss(network(batch).float(), labels)).mean()

    return fit(task, [network], loss_of)


def jtt(task: Task, epochs: int, factor: float) -> Networks:
    """What a network of few epochs gets wrong counts more for a second one."""
    wrong = is_wrong(fit_plainly(task, epochs), task.sets.train)
    yield from train_weighted(task, wrong, factor)


def generalized_cross_entropy(logits: Tensor, labels: Tensor, q: float = 0.7) -> Tensor:
    """Of each image; times `q`, as in the authors' code of LfF."""
    probability = logits.softmax(1).gather(1, labels[:, None])[:, 0].detach()
    return q * probability**q * each_loss(logits, labels)


def smoothed(old: Tensor, now: Tensor) -> Tensor:
    """The moving average of losses."""
    return torch.where(old == 0, now, 0.7 * old + 0.3 * now).detach()


def lff(task: Task) -> Networks:
    """Two networks side by side; what is hard for the biased one counts more."""
    train = task.sets.train
    networks = [new_network(task), new_network(task)]  # the first is the biased one
    losses = torch.zeros(2, len(train))

    def loss_of(batch: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        outputs = [network(batch).float() for network in networks]
        now = torch.stack([each_loss(logits, labels) for logits in outputs])
        losses[:, index] = smoothed(losses[:, index], now)
        of_class = [losses[:, train.labels == label].amax(1) for label in (0, 1)]
        largest = torch.stack(of_class, 1)
        biased, other = losses[:, index] / largest[:, labels]
        difficulty = biased / (biased + other + 1e-8)
        of_biased = generalized_cross_entropy(outputs[0], labels)
        return (of_biased + difficulty * now[1]).mean()

    return fit(task, networks, loss_of)


def labels_given_prediction(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Row k: the share of each label where the biased network predicts class k."""
    one_hot = F.one_hot(labels, probabilities.shape[1]).double()
    joint = probabilities.double().T @ one_hot / len(labels)
    return joint / joint.sum(1, keepdim=True)


def ula(task: Task, epochs: int) -> Networks:
    """What a biased network's prediction says of the class is added to the logits."""
    train = task.sets.train
    logits = metrics.predict(fit_plainly(task, epochs), train)
    conditional = labels_given_prediction(logits.softmax(1), train.labels)
    shifts = conditional.log()[logits.argmax(1)].float()
    network = new_network(task)

    def loss_of(batch: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        return F.cross_entropy(network(batch).float() + shifts[index], labels)

    yield from fit(task, [network], loss_of)


def afr(task: Task) -> Networks:
    """ERM on four fifths of the images; its last layer, reweighted, on the rest."""
    train = task.sets.train
    order = torch.randperm(len(train), generator=task.rng)
    most = len(train) * 4 // 5
    late = train[order[most:]]
    early = task.sets._replace(train=train[order[:most]])
    first = fit_plainly(task._replace(sets=early))
    inputs = features(first, late)
    probability = first.linear[-1](inputs).softmax(1).detach()
    of_label = probability.gather(1, late.labels[:, None])[:, 0]
    for gamma in (1, 2, 4, 8, 16):
        weights = (-gamma * of_label).exp() / late.labels.bincount()[late.labels]
        network = copy.deepcopy(first)
        fit_last_layer(network.linear[-1], inputs, late.labels, weights)
        yield f"γ = {gamma}", network


def fit_last_layer(
    layer: nn.Module, inputs: Tensor, labels: Tensor, weights: Tensor
) -> None:
    """AFR's second stage: plain gradient descent, with clipped steps."""
    sgd = SGD(layer.parameters(), 0.01)
    for _ in range(500):
        losses = each_loss(layer(inputs), labels)
        sgd.zero_grad()
        (weights / weights.sum() @ losses).backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1)
        sgd.step()


def elbow(losses: Tensor) -> Tensor:
    """Where each row of losses, N×k, is furthest below its chord; or the last."""
    lowest = losses.amin(1, keepdim=True)
    highest = losses.amax(1, keepdim=True)
    scaled = (losses - lowest) / (highest - lowest).clamp(min=1e-8)
    below = torch.linspace(0, 1, losses.shape[1]) - scaled
    last = losses.shape[1] - 1
    return torch.where(below.amax(1) > 0, below.argmax(1), last)


def salient_parts(task: Task) -> Tensor:
    """N×H×W, True where ERM looks: the parts of DaC."""
    train = task.sets.train
    predicted = metrics.predict(task.base, train).argmax(1)
    maps = saliency.saliency_maps(task.base, train.images, predicted)
    maps = masking.resize(maps, train.images.shape[-2:])
    quantiles = torch.tensor([0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    limits = maps.flatten(1).quantile(quantiles, dim=1)[:, :, None, None]
    losses = []
    for limit in limits:
        logits = metrics.predict(task.base, masking.MaskedDataset(train, maps < limit))
        losses.append(each_loss(logits, train.labels))
    best = elbow(torch.stack(losses, 1))
    return maps >= limits[best, torch.arange(len(train))]


def composed(
    images: Tensor,
    parts: Tensor,
    labels: Tensor,
    color: Tensor,
    rng: torch.Generator,
) -> Tensor:
    """The part of each image over the rest of one of another class, if there is any."""
    is_other = labels[:, None] != labels
    partners = torch.multinomial(is_other + 1e-9, 1, generator=rng)[:, 0]
    rest = torch.where(parts[partners], color, images[partners])
    return torch.where(parts, images, rest)


def dac_batch(
    images: Tensor,
    labels: Tensor,
    parts: Tensor,
    is_sure: Tensor,
    rng: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Originals, then parts alone and compositions of those that ERM is sure of."""
    color = images.mean((0, 2, 3), keepdim=True)
    sure = images[is_sure]
    part = parts[is_sure][:, None]
    of_sure = labels[is_sure]
    alone = torch.where(part, sure, color)
    together = composed(sure, part, of_sure, color, rng)
    return torch.cat([images, alone, together]), torch.cat([labels, of_sure, of_sure])


def new_last_layer(network: nn.Module, rng: torch.Generator) -> nn.Linear:
    """One with random weights."""
    layer = nn.Linear(network.linear[-1].in_features, 2)
    nn.init.xavier_uniform_(layer.weight, generator=rng)
    nn.init.zeros_(layer.bias)
    return layer


def dac(task: Task, parts: Tensor, alpha: float) -> Networks:
    """A new last layer, fitted to images, parts and compositions."""
    train = task.sets.train
    network = copy.deepcopy(task.base).eval()
    frozen = body(network)
    rng = task.rng
    layer = new_last_layer(network, rng)
    network.linear[-1] = layer
    losses = each_loss(metrics.predict(task.base, train), train.labels)
    is_sure = losses <= losses.quantile(0.8)
    adam = Adam(layer.parameters(), 0.005)
    scheduler = StepLR(adam, 5, 0.5)
    for _ in range(20):
        for index in torch.randperm(len(train), generator=rng).split(64):
            batch, labels = train.batch(index)
            images, targets = dac_batch(
                batch, labels, parts[index], is_sure[index], rng
            )
            with torch.no_grad():
                inputs = frozen(images)
            losses = each_loss(layer(inputs), targets)
            weights = torch.full_like(losses, 1 / len(index))
            weights[len(index) :] = 2 * alpha / max(1, len(losses) - len(index))
            descend(adam, weights @ losses)
        scheduler.step()
    yield f"α = {alpha}", network


def disagreement(early: Tensor, final: Tensor) -> Tensor:
    """N, of logits N×classes."""
    divergence = F.kl_div(final.log_softmax(1), early.softmax(1), reduction="none")
    return divergence.mean(1)


def self_finetuned(task: Task, epochs: int) -> Networks:
    """ERM's last layer, trained on where it disagrees most with an earlier network."""
    late = task.sets.validation[task.halves[0]]
    early = metrics.predict(fit_plainly(task, epochs), late)
    final = metrics.predict(task.base, late)
    order = disagreement(early, final).argsort(descending=True, stable=True)
    for count in (20, 100):
        chosen = late[order[:count]]
        network = copy.deepcopy(task.base)
        inputs = features(network, chosen)
        weights = 1 / chosen.labels.bincount()[chosen.labels]
        rng = task.rng
        layer = network.linear[-1]
        sgd = SGD(layer.parameters(), 0.01, weight_decay=1e-4)
        for _ in range(250):
            index = torch.multinomial(weights, 32, replacement=True, generator=rng)
            descend(sgd, F.cross_entropy(layer(inputs[index]), chosen.labels[index]))
        yield f"{count} images", network


def extremes(losses: Tensor, labels: Tensor, count: int) -> Tensor:
    """Index of the largest and the smallest losses of each class."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero()[:, 0]
        order = members[losses[members].argsort(descending=True, stable=True)]
        chosen += [order[:count], order[-count:]]
    return torch.cat(chosen)


def environments(logits: Tensor, labels: Tensor, rng: torch.Generator) -> Tensor:
    """N: the number of each image's environment, as EIIL finds them."""
    errors = logits.softmax(1) - F.one_hot(labels, logits.shape[1])
    slopes = (errors * logits).sum(1)  # of the losses, by a scale of the logits
    split = torch.randn(len(labels), generator=rng).requires_grad_()
    adam = Adam([split], 0.01)
    for _ in range(20_000):
        share = split.sigmoid()
        penalties = torch.stack([(slopes * part).mean() for part in (share, 1 - share)])
        descend(adam, -penalties.square().mean())
    return 2 * labels + (split > 0)


def last_layers(
    task: Task, inputs: Tensor, labels: Tensor, strength: float
) -> Iterator[nn.Linear]:
    """Yield a new last layer after each of 100 epochs."""
    rng = task.rng
    layer = new_last_layer(task.base, rng)
    adam = Adam(layer.parameters(), 0.001)
    scheduler = StepLR(adam, 85, 0.1)
    for _ in range(100):
        for index in torch.randperm(len(labels), generator=rng).split(32):
            loss = F.cross_entropy(layer(inputs[index]), labels[index])
            penalty = sum(part.abs().sum() for part in layer.parameters())
            descend(adam, loss + strength * penalty)
        scheduler.step()
        yield layer


def evals(task: Task) -> Networks:
    """A last layer fitted to extreme losses, the best by environments that it finds."""
    late, others = [task.sets.validation[half] for half in task.halves]
    members = environments(metrics.predict(task.base, others), others.labels, task.rng)
    losses = each_loss(metrics.predict(task.base, late), late.labels)
    network = copy.deepcopy(task.base)
    inputs = features(network, late)
    of_others = features(network, others)
    best = -1
    tried = ""
    for count, strength in itertools.product((2, 3, 5, 10, 20, 50), (0, 0.01, 0.1)):
        index = extremes(losses, late.labels, count)
        for layer in last_layers(task, inputs[index], late.labels[index], strength):
            right = metrics.is_right(layer(of_others), others.labels).double()
            worst = min(right[members == k].mean() for k in members.unique())
            if worst > best:
                best = worst
                tried = f"k = {count}, λ = {strength}"
                network.linear[-1].load_state_dict(layer.state_dict())
    yield tried, network


# With groups, or with images of another kind.


def group_losses(losses: Tensor, members: Tensor) -> Tensor:
    """The mean of each of four groups; of none, 0."""
    sums = torch.zeros(4).index_add(0, members, losses)
    return sums / members.bincount(minlength=4).clamp(min=1)


def group_weights(weights: Tensor, losses: Tensor) -> Tensor:
    """The weights of the groups after a step of GroupDRO."""
    weights = weights * (0.01 * losses.detach()).exp()
    return weights / weights.sum()


def group_dro(task: Task, members: Tensor, is_balanced: bool) -> Networks:
    """The weight of a group grows with its loss."""
    network = new_network(task)
    sizes = members.bincount()[members].double()
    weights = torch.ones(4)

    def loss_of(batch: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        nonlocal weights
        losses = each_loss(network(batch).float(), labels)
        losses = group_losses(losses, members[index])
        weights = group_weights(weights, losses)
        return weights @ losses

    return fit(task, [network], loss_of, weights=1 / sizes if is_balanced else None)


def balanced(members: list[Tensor], rng: torch.Generator) -> Tensor:
    """As many images of each group as the smallest has."""
    few = min(map(len, members))
    parts = []
    for index in members:
        parts.append(index[torch.randperm(len(index), generator=rng)[:few]])
    return torch.cat(parts)


def mean_layer(
    fits: list[LogisticRegression], scaler: StandardScaler
) -> tuple[Tensor, Tensor]:
    """Weights 2×inputs and biases of the mean of regressions, for unscaled inputs."""
    mean = torch.tensor(scaler.mean_)
    scale = torch.tensor(scaler.scale_)
    weight = sum(torch.tensor(fit.coef_[0]) for fit in fits) / len(fits) / scale
    bias = sum(fit.intercept_[0] for fit in fits) / len(fits) - weight @ mean
    # A regression has one score: half of it for class 1, minus half of it for class 0.
    return torch.stack([-weight / 2, weight / 2]), torch.stack([-bias / 2, bias / 2])


def dfr(task: Task) -> Networks:
    """ERM's last layer, fitted again on held-out images with balanced groups."""
    held_out = task.sets.validation
    scaler = StandardScaler().fit(features(task.base, task.sets.train))
    inputs = scaler.transform(features(task.base, held_out))
    labels = held_out.labels.numpy()
    members = [*shortcuts.groups(held_out).values()]
    of_fit = [index[::2] for index in members if len(index) > 1]
    of_test = [index[1::2] for index in members if len(index) > 1]
    rng = task.rng
    to_fit = balanced(of_fit, rng)
    seed = task.settings.seed
    # L1 only from scikit-learn 1.8 on.
    options = {"l1_ratio": 1, "solver": "liblinear", "random_state": seed}

    def regression(index: Tensor, strength: float) -> LogisticRegression:
        fresh = LogisticRegression(C=strength, **options)
        return fresh.fit(inputs[index], labels[index])

    def worst(strength: float) -> float:
        right = regression(to_fit, strength).predict(inputs) == labels
        return min(right[index].mean() for index in of_test)

    best = max((1, 0.7, 0.3, 0.1, 0.07, 0.03, 0.01), key=worst)
    fits = [regression(balanced(members, rng), best) for _ in range(20)]
    network = copy.deepcopy(task.base).requires_grad_(False)
    weight, bias = mean_layer(fits, scaler)
    network.linear[-1].weight.copy_(weight)
    network.linear[-1].bias.copy_(bias)
    yield f"C = {best}", network


def disagrees(first: Tensor, second: Tensor) -> Tensor:
    """The loss of each image: little where the second denies what the first says."""
    share, label = first.max(1)
    other = second.gather(1, label[:, None])[:, 0]
    return -(share * (1 - other) + other * (1 - share) + 1e-7).log()


def dbat(task: Task, shifted: Split, alpha: float) -> Networks:
    """A second network disagrees with ERM on shifted images."""
    first = metrics.predict(task.base, shifted).softmax(1)
    network = new_network(task, 1)
    rng = task.rng

    def loss_of(batch: Tensor, labels: Tensor, _index: Tensor) -> Tensor:
        drawn = torch.randint(len(shifted), (len(batch),), generator=rng)
        unlabelled, _ = shifted.batch(drawn)
        second = network(unlabelled).float().softmax(1)
        denial = disagrees(first[drawn], second).mean()
        return F.cross_entropy(network(batch).float(), labels) + alpha * denial

    return fit(task, [network], loss_of)


# Groups that are found.


def flipped(labels: Tensor, logits: Tensor, rng: torch.Generator) -> Tensor:
    """Labels, some of them changed to what a twin of XRM predicts."""
    share, predicted = logits.detach().softmax(1).max(1)
    classes = logits.shape[1]
    chance = ((share - 1 / classes) * classes / (classes - 1)).clamp(0, 1)
    is_flipped = torch.bernoulli(chance, generator=rng).bool()
    return torch.where(is_flipped, predicted, labels)


def xrm(task: Task) -> Tensor:
    """Which training images one of the two networks gets wrong."""
    train = task.sets.train
    twins = [new_network(task), new_network(task, 1)]
    rng = task.rng
    is_first = torch.rand(len(train), 1, generator=rng) < 0.5
    now = train.labels.clone()

    def loss_of(batch: Tensor, _labels: Tensor, index: Tensor) -> Tensor:
        first, second = [network(batch).float() for network in twins]
        seen = torch.where(is_first[index], first, second)
        unseen = torch.where(is_first[index], second, first)
        losses = each_loss(seen, now[index])
        of_class = [losses[now[index] == k].mean() for k in now[index].unique()]
        now[index] = flipped(now[index], unseen, rng)
        return sum(of_class)

    next(fit(task, twins, loss_of))
    return is_wrong(twins[0], train) | is_wrong(twins[1], train)


# All of them.


def by_paper(task: Task, base: Trained) -> Networks:
    """MaskTune by the paper's rule."""
    paper = task.settings.replace(method="mean_std", param=2.0, finetune_lr=0.01)
    yield "", experiment.masktune(paper, base, task.sets.train).model


def by_choice(task: Task, base: Trained) -> Networks:
    """Ours: a mask that is chosen."""
    train = task.sets.train
    choice = experiment.choose(base, train)
    chosen = experiment.chosen_model(choice, base, train)
    yield choice.verdict.chosen, chosen.model


def judge_groups(
    task: Task,
    method: str,
    is_known: Tensor,
    earlier: float = 0,
    needs: str = "classes",
) -> None:
    """GroupDRO with groups of class × what is known of each image."""
    members = 2 * task.sets.train.labels + is_known
    for tried, is_balanced in {"balanced": True, "as they come": False}.items():
        networks = group_dro(task, members, is_balanced)
        judge(task, method, networks, tried, earlier, needs)


def judge_whole(task: Task) -> None:
    """Methods that train a whole network."""
    judge(task, "random erasing", random_erasing(task))
    for epochs, factor in itertools.product((1, 2), (20, 50, 100)):
        tried = f"T = {epochs}, λ = {factor}"
        judge(task, "JTT", jtt(task, epochs, factor), tried)
    judge(task, "LfF", lff(task))
    for epochs in (1, 2):
        judge(task, "uLA", ula(task, epochs), f"T = {epochs}")
    judge_groups(task, "GroupDRO", task.sets.train.has_shortcut, needs="groups")
    # The same images are held out, whatever the share.
    shifted = datasets.load(task.settings.replace(conflicting_share=0.5)).validation
    for alpha in (0.1, 1, 2):
        judge(
            task,
            "D-BAT",
            dbat(task, shifted, alpha),
            f"α = {alpha}",
            task.seconds,
            "shifted images, unlabelled",
        )
    started = time.perf_counter()
    wrong = xrm(task)
    seconds = time.perf_counter() - started
    judge_groups(task, "XRM → GroupDRO", wrong, seconds)
    for factor in (20, 50, 100):
        networks = train_weighted(task, wrong, factor)
        judge(task, "XRM → JTT", networks, f"λ = {factor}", seconds)


def judge_last_layers(task: Task) -> None:
    """Methods that fit the last layer alone."""
    judge(task, "AFR", afr(task))
    started = time.perf_counter()
    salient = salient_parts(task)
    earlier = task.seconds + time.perf_counter() - started
    for part, parts in {"looked at": salient, "the rest": ~salient}.items():
        for alpha in (1, 6, 10):
            judge(task, "DaC", dac(task, parts, alpha), f"{part} kept", earlier)
    of_held_out = {"earlier": task.seconds, "judged_on": task.halves[1]}
    for share in (0.1, 0.2, 0.5):
        epochs = round(share * task.settings.epochs)
        networks = self_finetuned(task, epochs)
        judge(task, "SELF", networks, f"T = {epochs}", **of_held_out)
    judge(task, "EVaLS", evals(task), **of_held_out)
    judge(task, "DFR", dfr(task), "", task.seconds, "groups, held out")


def compare(settings: Settings) -> pd.DataFrame:
    """The best of each method's rows by each referee."""
    sets = datasets.load(settings)
    base = experiment.base_model(settings, sets.train)
    is_mistake = is_wrong(base.model, sets.validation)
    task = Task(settings, sets, base.model, base.seconds, is_mistake, [])
    judge(task, "ERM", iter([("", base.model)]), "", base.seconds)
    judge_whole(task)
    judge_last_layers(task)
    judge(task, "MaskTune, the paper's rule", by_paper(task, base), "", base.seconds)
    judge(task, "MaskTune, ours", by_choice(task, base), "", base.seconds)
    tries = pd.DataFrame(task.rows)
    parts = []
    for referee in ("held-out groups", "ERM's mistakes", "worst class"):
        best = tries.groupby("method", sort=False)[referee].idxmax()
        parts.append(tries.loc[best].assign(referee=referee))
    return pd.concat(parts, ignore_index=True)


def run(conflicting_share: float, seed: int) -> list[dict]:
    """All rows of one experiment and seed; its models are not kept."""
    torch.set_num_threads(1)
    with TemporaryDirectory() as directory:
        settings = Settings(
            directory=directory,
            device="cpu",
            dataset="mnist5k",
            conflicting_share=conflicting_share,
            seed=seed,
            validation_share=0.2,
        )
        table = compare(settings)
    key = {"conflicting_share": conflicting_share, "seed": seed}
    return table.assign(**key).to_dict("records")


if __name__ == "__main__":
    import methods  # its functions have this name in the other processes, too

    resume(FILE, KEY, PLAN, methods.run)
