"""A place, pointed at or found: what depends on it, and what hiding it is worth.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/places.py 500 501 502

makes the rows that are missing in `results/places.csv`, two runs at a time, 90 seconds
of one core each: the kinds of registered.py whose shortcut has one place, and those
without a shortcut. ERM is audited by 1,000 other images.

    OMP_NUM_THREADS=1 python studies/places.py photographs 9 10 11

does so with the photographs of stamps.py, by 900 other images, a quarter of an hour of
one core each; photographs.py says what it needs.

    MASKTUNE_DATA=… OMP_NUM_THREADS=1 python studies/places.py again 500

hides the place that the audit proposes, audits what comes out, and hides both places;
rows go to `results/places_again.csv`, see `again`. In `places.csv` a row is a place:

- `box`: what a person points at, the bounding box of the shortcut and a pixel around;
- `mistakes`, `reliance`: where the maps of an audit point;
- `difference`: the mean of mistakes minus the mean of their class;
- `occlusion`: where grey windows lower the probability of the image's own class most.

The first three are hidden, too, each in a copy of ERM's training. `is_found`: the audit
proposes this place. The true worst group is that of the test sets. `oracle`, of
photographs: the worst group of ERM on the same images without the shortcut, fine-tuned
alike.
"""

import sys
from collections.abc import Callable

import registered
import torch
from resume import resume
from torch import Tensor, nn

from masktune_utils import results
from masktune_utils.choice import Audit, audit, hide
from masktune_utils.choice.audit import LARGEST, region_of
from masktune_utils.choice.exchange import mean_falls
from masktune_utils.data import Split
from masktune_utils.metrics import group_accuracy, predict

MANY_PLACES = ("two squares", "square anywhere", "frame", "cross in a corner")
HIDDEN = ("box", "mistakes", "reliance")
PLAN = [
    (dataset, labels, kind)
    for dataset, labels, kind in registered.PLAN
    if kind not in (*MANY_PLACES, *registered.OUT_OF_REACH)
]
PHOTOGRAPHS = [("photographs", "halves", kind) for kind in ("date", "logo", "scratch")]


def box(area: Tensor) -> Tensor:
    """The bounding box of an area, H×W, and a pixel around."""
    rows = area.any(1).nonzero()[:, 0]
    columns = area.any(0).nonzero()[:, 0]
    region = torch.zeros_like(area)
    region[
        max(0, rows.min() - 1) : rows.max() + 2,
        max(0, columns.min() - 1) : columns.max() + 2,
    ] = True
    return region


def difference_map(images: Split, predicted: Tensor) -> Tensor:
    """Where mistakes look unlike their class, H×W: the mean absolute difference."""
    pixels = images.images.float() / 255
    is_mistake = predicted != images.labels
    parts = []
    for label in images.labels[is_mistake].unique():
        of_class = images.labels == label
        mean_mistake = pixels[of_class & is_mistake].mean(0)
        parts.append((mean_mistake - pixels[of_class].mean(0)).abs().mean(0))
    return torch.stack(parts).mean(0) if parts else torch.zeros(pixels.shape[-2:])


def occlusion_map(network: nn.Module, images: Split) -> Tensor:
    """By how much a grey window lowers the log-probability of the class, h×w."""
    sample = images[:100]
    labels = sample.labels

    def logarithm(pixels: Tensor) -> Tensor:
        outputs = predict(network, Split(pixels, labels)).log_softmax(1)
        return outputs.gather(1, labels[:, None])[:, 0]

    grey = torch.full_like(sample.images, 128)
    weights = torch.full((len(sample),), 1 / len(sample))
    return mean_falls(logarithm, sample.images, grey, weights)


def measured(found: Audit) -> dict:
    """What an audit says of its place."""
    swapped = found.class_swaps
    return {
        "accuracy": found.accuracy,
        "estimate": swapped.worst,
        "error": swapped.error,
        "any_partner": swapped.accuracy.nanmean(1).min().item(),
        "changed": swapped.changed,
        "estimate_elsewhere": min(of.worst for _, of in found.elsewhere),
        "changed_elsewhere": max(of.changed for _, of in found.elsewhere),
        "counted": len(found.swaps.mistakes),
        "moving": len(found.swaps.moving),
        "moving_elsewhere": max(len(of.moving) for of, _ in found.elsewhere),
    }


def run(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """A row for each place."""
    if dataset == "photographs":
        return of_photographs(kind, seed)
    sets = registered.load(dataset, labels, kind, seed)
    network = registered.fit(sets.train, seed=seed)

    def worst_group(tuned: nn.Module) -> float:
        return results.evaluate(tuned, sets)["worst_group"]

    return compare(network, sets.train, sets.validation, worst_group, seed)


def of_photographs(shortcut: str, seed: int) -> list[dict]:
    """A row for each place, with photographs."""
    import photographs  # needs packages that the other kinds do not
    import stamps

    train, test, _ = stamps.load(shortcut, seed)
    others, _ = stamps.biased(shortcut, "others", seed)
    network = photographs.fit(train, seed=seed)

    def worst_group(tuned: nn.Module) -> float:
        return min(group_accuracy(predict(tuned, test), test).values())

    oracle = worst_group(photographs.oracle(shortcut, seed))
    rows = compare(network, train, others, worst_group, seed)
    return [{**row, "oracle": oracle} for row in rows]


def again(dataset: str, labels: str, kind: str, seed: int) -> list[dict]:
    """Hide the place of an audit, audit again, hide both; a row for each network.

    `region`, `covers`: what is hidden so far, of the image and of the shortcut.
    `rest`: the share of what is left of the shortcut that the next place covers.
    `estimate`, `elsewhere`: if the next place comes from another class, or others.
    """
    sets = registered.load(dataset, labels, kind, seed)
    others = shuffled(sets.validation, seed)
    area = others.shortcut.float().mean(0)
    erm = registered.fit(sets.train, seed=seed)
    tuned = erm
    hidden = torch.zeros(area.shape, dtype=torch.bool)
    rows = []
    for count in range(3):
        if count:
            tuned = hide(sets.train, hidden, seed=seed).finetune(erm)
        found = audit(tuned, others, seed)
        left = area * ~hidden
        rows.append(
            {
                "hidden": count,
                "region": hidden.float().mean().item(),
                "covers": 1 - (left.sum() / area.sum()).item(),
                "worst_group": results.evaluate(tuned, sets)["worst_group"],
                "accuracy": found.accuracy,
                "found_by": found.found_by,
                "rest": ((left * found.region).sum() / left.sum()).item(),
                "estimate": found.class_swaps.worst,
                "elsewhere": min(of.worst for _, of in found.elsewhere),
                "commit": registered.commit(),
            }
        )
        hidden |= found.region
    return rows


def shuffled(images: Split, seed: int) -> Split:
    """In random order."""
    return images[torch.randperm(len(images), generator=registered.seeded(seed))]


def compare(
    network: nn.Module,
    train: Split,
    others: Split,
    worst_group: Callable[[nn.Module], float],
    seed: int,
) -> list[dict]:
    """A row for each place.

    Args:
        network: ERM.
        train: its images.
        others: drawn like these, with their shortcut.
        worst_group: of a network, on the test sets.
        seed: of random choices.
    """
    others = shuffled(others, seed)
    size = others.images.shape[-2:]
    found = audit(network, others, seed)
    maps = {
        **found.maps,
        "difference": difference_map(others, found.predicted),
        "occlusion": occlusion_map(network, others),
    }
    regions = {name: region_of(values, size) for name, values in maps.items()}
    area = others.shortcut.float().mean(0)
    if area.any():
        regions["box"] = box(area > 0)
    of_erm = {
        "mistakes": int((found.predicted != others.labels).sum()),
        "worst_group": worst_group(network),
    }
    rows = []
    for name, region in regions.items():
        row = {
            "place": name,
            "is_found": name == found.found_by,
            "region": region.float().mean().item(),
            "covers": (area * region).sum().item() / max(area.sum().item(), 1e-8),
            **of_erm,
        }
        if name in HIDDEN and 0 < region.float().mean() <= LARGEST:
            pointed = audit(network, others, seed, place=region)
            tuned = hide(train, region, seed=seed).finetune(network)
            after = audit(tuned, others, seed, place=region)
            row |= measured(pointed)
            row["hidden_worst_group"] = worst_group(tuned)
            row |= {f"hidden_{key}": value for key, value in measured(after).items()}
        rows.append({**row, "commit": registered.commit()})
    return rows


if __name__ == "__main__":
    import places  # its functions have this name in the other processes, too

    _, *seeds = sys.argv
    plan = PLAN
    file, make = "places.csv", places.run
    if "photographs" in seeds:
        plan = PHOTOGRAPHS
    if "again" in seeds:
        plan = [kind for kind in PLAN if "none" not in kind]
        file, make = "places_again.csv", places.again
    runs = [(*kind, int(seed)) for seed in seeds if seed.isdigit() for kind in plan]
    resume(file, registered.KEY, runs, make)
