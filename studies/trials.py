"""What models predict for held-out images, saved: to try rules without training.

    python studies/trials.py        # packs results/trials/*.pt into results/trials.zip

In the archive, `{data set}_{classes}_{kind}_{seed}.pt` and `photographs/…`. A file
holds a `HeldOut`, and the accuracy in the worst group of the test sets, by model:

    held_out, worst_groups = trials.read("mnist_halves_square-6_300")
    print(score.decide(held_out).reason, worst_groups)

Files of seeds before 400 (photographs: before 6) are of the masks of the time; those
before 300 (photographs: 0 to 2) know only what share a mask hides, not where.
"""

import io
import zipfile
from pathlib import Path

import pandas as pd
import torch

from masktune_utils import results
from masktune_utils.choice import HeldOut
from masktune_utils.choice.chosen import EARLY
from masktune_utils.results import TRIALS
from masktune_utils.settings import REPOSITORY
from masktune_utils.store import write_bytes

FOLDER = REPOSITORY / "results" / "trials"
FIRST_EARLY = 400  # seed from which on networks of short trainings were asked first


def save(name: str, held_out: HeldOut, worst_groups: dict[str, float]) -> None:
    """Save a run without its masked images, to be packed later."""
    content = {**vars(held_out), "worst_groups": worst_groups}
    del content["masked"]
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file_name = name.replace(", ", "_").replace(" ", "-")
    write_bytes(FOLDER / f"{file_name}.pt", buffer.getvalue())


def pack(folder: Path = FOLDER) -> None:
    """Add the files of a folder to its archive; a run that is there stays as it is."""
    archive_path = folder.with_suffix(".zip")
    with zipfile.ZipFile(archive_path, "a") as archive:
        for path in sorted(folder.rglob("*.*")):
            name = path.relative_to(folder).as_posix()
            if name not in archive.namelist():
                # With one date, the same files make the same archive.
                entry = zipfile.ZipInfo(name)
                archive.writestr(entry, path.read_bytes(), zipfile.ZIP_LZMA)


def read(name: str) -> tuple[HeldOut, pd.Series]:
    """A run of the archive: what models predict, and the worst group by model."""
    held_out, worst_groups = results.read_trial(name)
    is_early = "/" not in name and int(name.rpartition("_")[2]) >= FIRST_EARLY
    if is_early:
        held_out.share = EARLY
    return held_out, worst_groups


def names() -> list[str]:
    """Of all runs in the archive."""
    with zipfile.ZipFile(TRIALS) as archive:
        return sorted(name.removesuffix(".pt") for name in archive.namelist())


if __name__ == "__main__":
    pack()
