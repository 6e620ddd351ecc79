"""MaskTune in the setting of the authors' code, and how much each difference matters.

    OMP_NUM_THREADS=1 python studies/paper_setting.py 0 1 2

Their script (bash_files/mnist_masktune.sh of aliasgharkhani/Masktune) puts a red square
of 4 pixels in ordered placement, holds out 12,000 of the 60,000 training images, and
trains for 100 epochs at a constant rate. The masks come from the checkpoint with the
best accuracy on the held-out images, by maps for the class that it predicts. The last
checkpoint is fine-tuned, and SGD keeps its momentum. Two seeds at a time, about 40
minutes of one core each. Each seed adds its rows to reference_paper_setting.csv; one
that is there is skipped.
"""

import copy
import sys
from functools import partial

import torch
import torch.nn.functional as F
from resume import resume
from torch import Generator, nn
from torch.optim import SGD

from masktune_utils import datasets, masking, metrics, models, results
from masktune_utils.data import Split
from masktune_utils.masking import MaskedDataset
from masktune_utils.saliency import saliency_maps
from masktune_utils.settings import Settings

EPOCHS = 100

new_sgd = partial(SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)


def train_epoch(
    model: nn.Module,
    sgd: SGD,
    images: Split | MaskedDataset,
    rng: Generator,
) -> None:
    """One pass over the images in batches of 128."""
    model.train()
    for index in torch.randperm(len(images), generator=rng).split(128):
        batch, labels = images.batch(index)
        loss = F.cross_entropy(model(batch), labels)
        sgd.zero_grad()
        loss.backward()
        sgd.step()


def run(seed: int) -> list[dict]:
    """The base models and the fine-tuned ones of a seed, a row each."""
    settings = Settings(
        dataset="mnist",
        seed=seed,
        square_size=4,
        square_color="red",
        placement="ordered",
        validation_share=0.2,
    )
    sets = datasets.load(settings)
    train = sets.train
    rows = []

    def add(name, model, hidden=None):
        row = {"model": name}
        accuracies = results.evaluate(model, sets)
        for accuracy in ("worst_group", "raw", "biased"):
            row[accuracy] = round(accuracies[accuracy], 6)
        row["hidden_shortcut_whole"] = hidden
        rows.append(row)

    last = models.new_model(seed)
    sgd = new_sgd(last.parameters())
    rng = Generator().manual_seed(seed)
    best_accuracy = 0.0
    for epoch in range(1, EPOCHS + 1):
        train_epoch(last, sgd, train, rng)
        logits = metrics.predict(last, sets.validation)
        is_right = metrics.is_right(logits, sets.validation.labels)
        accuracy = is_right.double().mean()
        if accuracy > best_accuracy:
            best_accuracy = accuracy
            best = copy.deepcopy(last)
            print(f"seed {seed}: epoch {epoch} is the best so far", flush=True)
        if epoch == 20:
            add("ERM, epoch 20", last)
    add("ERM, best checkpoint", best)
    add("ERM, last checkpoint", last)

    def finetune(name, explained, labels, sgd):
        maps = saliency_maps(explained, train.images, labels)
        masked = masking.mask_dataset(train, maps, "mean_std", 2.0)
        # Together: the optimizer of the copy has its weights.
        model, optimizer = copy.deepcopy((last, sgd))
        order = Generator().manual_seed(EPOCHS + seed)
        train_epoch(model, optimizer, masked, order)
        hidden = results.hidden_shares(masked)["shortcut_whole"]
        add(name, model, round(hidden, 6))

    by_best = metrics.predict(best, train).argmax(1)
    by_last = metrics.predict(last, train).argmax(1)
    finetune("the authors' code", best, by_best, sgd)
    finetune("maps for the image's own class", best, train.labels, sgd)
    finetune("maps of the last checkpoint", last, by_last, sgd)
    finetune("both", last, train.labels, sgd)
    new = new_sgd(last.parameters())
    finetune("both, momentum from zero", last, train.labels, new)
    return rows


if __name__ == "__main__":
    import paper_setting  # its functions have this name in the other processes, too

    runs = [(int(seed),) for seed in sys.argv[1:]]
    resume("reference_paper_setting.csv", ["seed"], runs, paper_setting.run)
