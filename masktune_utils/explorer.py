"""A panel for JupyterLab: what a mask hides of an image, and what the models predict.

In a notebook that runs headless, the same call shows a picture and a table.
"""

import warnings
from typing import Any, get_args

import ipywidgets as widgets
import pandas as pd
from IPython.display import Image, display
from torch import Tensor

from masktune_utils import data, evaluation, masking, plotting, progress, saliency
from masktune_utils.models import SmallCNN
from masktune_utils.settings import PARAM_RANGES, Method, Settings, Upsample
from masktune_utils.shortcuts import BiasedSets, examples

PER_GROUP = 250  # at most this many images of each group are offered


def explain(
    some: data.Split, models: dict[str, SmallCNN], cam: str, **rule: Any
) -> tuple[dict[str, Tensor], pd.DataFrame]:
    """Mask images, and let the models predict the classes of both.

    Args:
        some: N images.
        models: `ERM`, whose maps make the mask, and perhaps `MaskTune`.
        cam: see `saliency.saliency_maps`.
        **rule: see `masking.mask_dataset`.

    Returns:
        Pictures, see `plotting.grid`; and a table of N rows with the predicted classes and their
        probabilities.
    """
    with warnings.catch_warnings(action="ignore"):  # of maps that are zero: they are seen here
        maps = [saliency.saliency_maps(m, some.images, some.labels, cam) for m in models.values()]
    rule["seed"] = int(some.images.sum())  # a random patch is one of its image
    masked = masking.mask_dataset(some, maps[0], **rule)
    pictures = {"image": some.images, "map": maps[0], "mask": masked.masks(slice(None))}
    pictures["masked"] = masked.batch(slice(None))[0]
    if len(maps) > 1:
        pictures["map after"] = maps[1]
    table = {"digit": some.digits.tolist(), "class": some.labels.tolist()}
    for kind, images in {"image": some, "masked image": masked}.items():
        for name, model in models.items():
            predicted = zip(*evaluation.predict(model, images).softmax(1).max(1), strict=True)
            table[f"{name}, {kind}"] = [f"class {label}, {share:.0%}" for share, label in predicted]
    return pictures, pd.DataFrame(table)


def offered_images(sets: BiasedSets, *how: Any, **rule: Any) -> dict[str, data.Split]:
    """Images to choose from, by set and group; first where the predictions differ.

    Args:
        sets: the images.
        *how: see `explain`. The predictions of the two models are compared; with one model, its
            predictions for the image and for the masked image.
        **rule: see `explain`.
    """
    found = []
    for part in ("train", "raw", "biased"):
        index, titles = examples(getattr(sets, part), PER_GROUP)
        some = getattr(sets, part)[index]
        one, other = explain(some, *how, **rule)[1].iloc[:, 2:4].T.to_numpy()
        pairs = zip(one, other, strict=True)
        differ = pd.Series([a.partition(",")[0] != b.partition(",")[0] for a, b in pairs])
        for title, rows in differ.groupby(titles, sort=False):
            name = f"{part}, {title}: {rows.sum()} of {len(rows)} differ".replace("\n", ", ")
            order = rows.sort_values(ascending=False, kind="stable").index
            found.append((rows.sum(), name, some[order.tolist()]))
    return {name: some for _, name, some in sorted(found, key=lambda row: -row[0])}


def explore(
    settings: Settings, name: str, sets: BiasedSets, models: dict[str, SmallCNN], **rule: Any
) -> None:
    """Show what a mask hides of an image, and what the models predict for both.

    Args:
        settings: of the notebook.
        name: of the picture's file.
        sets: the images.
        models: see `explain`.
        **rule: the first mask, see `explain`.
    """
    groups = offered_images(sets, models, settings.cam, **rule)

    def show(group: str, image: int = 0, **chosen: Any) -> None:
        some, new = groups[group][[image % len(groups[group])]], rule | chosen
        new["param"] = min(new["param"], PARAM_RANGES[new["method"]])  # the slider comes later
        pictures, table = explain(some, models, settings.cam, **new)
        display(Image(data=plotting.png(plotting.grid(pictures)), retina=True), table)

    if not progress.is_live():
        title, some = next(iter(groups.items()))
        pictures, table = explain(some[:4], models, settings.cam, **rule)
        print(title)
        plotting.show(plotting.grid(pictures), settings, name)
        display(table)
        return
    lists = {"group": [*groups], "method": [*get_args(Method)], "upsample": [*get_args(Upsample)]}
    ranges = {"image": (0, PER_GROUP - 1), "param": (0.0, 1.0, 0.01), "dilation": (0, 27)}
    panel = widgets.interactive(show, **lists, **ranges)
    controls = {control.description: control for control in panel.children[:-1]}
    # a method has its own range
    widgets.dlink((controls["method"], "value"), (controls["param"], "max"), PARAM_RANGES.get)
    for key, control in controls.items():
        control.layout.width, control.style.description_width = "480px", "90px"
        control.value = rule.get(key, control.value)
    display(panel)
