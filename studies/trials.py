"""What models predict for held-out images, saved: to try rules without training.

    python studies/trials.py        # packs results/trials/*.npz into results/trials.zip

In the archive, `{data set}_{classes}_{kind}_{seed}.npz` and `photographs/…`. A file
holds a `HeldOut`, and the accuracy in the worst group of the test sets, of each model:

    from trials import read
    held_out, worst_groups = read("mnist_halves_square-6_200")
    print(judge(held_out).reason, worst_groups)

Older files lack what hides where, and have the worst class where masks resample.
"""

import io
import zipfile

import numpy as np
import pandas as pd
import torch

from masktune_utils.choice import HeldOut
from masktune_utils.settings import REPOSITORY
from masktune_utils.store import write_bytes

FOLDER = REPOSITORY / "results" / "trials"
ARCHIVE = REPOSITORY / "results" / "trials.zip"


def file_name(name: str) -> str:
    """A name without blanks."""
    return name.replace(", ", "_").replace(" ", "-")


def save(name: str, held_out: HeldOut, worst_groups: dict[str, float]) -> None:
    """Save as arrays that NumPy reads without running code."""
    masks = [*held_out.explained]
    models = [*held_out.predictions]
    resampled = pd.DataFrame(held_out.resampled).reindex(models).T
    stacked = torch.stack([*held_out.predictions.values()], 1)
    arrays = {
        "models": np.array(models),
        "masks": np.array(masks),
        "labels": held_out.labels.numpy().astype(np.int16),
        "predictions": stacked.numpy().astype(np.int16),
        "explained": torch.stack([*held_out.explained.values()], 1).numpy(),
        "resampled": resampled.to_numpy(float),
        "hidden": np.array([*held_out.hidden.values()]),
        "place": np.array([*held_out.place.values()]),
        "mistake_map": held_out.mistake_map.numpy(),
        "has_maps": np.array(held_out.has_maps),
        "worst_groups": np.array([worst_groups.get(model, np.nan) for model in models]),
    }
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(FOLDER / f"{file_name(name)}.npz", buffer.getvalue())


def pack() -> None:
    """Add the files of `FOLDER` to the archive; a run that is there stays as it is."""
    with zipfile.ZipFile(ARCHIVE, "a", zipfile.ZIP_STORED) as archive:
        for path in sorted(FOLDER.rglob("*.npz")):
            name = path.relative_to(FOLDER).as_posix()
            if name not in archive.namelist():
                # With one date, the same files make the same archive.
                archive.writestr(zipfile.ZipInfo(name), path.read_bytes())


def names() -> list[str]:
    """Of all runs in the archive."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        return sorted(name.removesuffix(".npz") for name in archive.namelist())


def read(name: str) -> tuple[HeldOut, pd.Series]:
    """What a file of the archive holds: predictions, and the worst group by model."""
    with zipfile.ZipFile(ARCHIVE) as archive:
        content = archive.read(f"{name}.npz")
    with np.load(io.BytesIO(content)) as arrays:
        saved = dict(arrays)
    models = saved["models"].tolist()
    masks = saved["masks"].tolist()
    predictions = torch.from_numpy(saved["predictions"]).long()
    explained = torch.from_numpy(saved["explained"])
    resampled = pd.DataFrame(saved["resampled"], masks, models).T
    held_out = HeldOut(
        labels=torch.from_numpy(saved["labels"]).long(),
        mistake_map=torch.from_numpy(saved["mistake_map"]),
        has_maps=bool(saved["has_maps"]),
        predictions=dict(zip(models, predictions.T, strict=True)),
        explained=dict(zip(masks, explained.T, strict=True)),
        resampled={mask: resampled[mask].dropna().to_dict() for mask in masks},
        hidden=dict(zip(masks, saved["hidden"].tolist(), strict=True)),
        place=dict(zip(masks, saved["place"].tolist(), strict=True)),
    )
    return held_out, pd.Series(saved["worst_groups"], models)


if __name__ == "__main__":
    pack()
