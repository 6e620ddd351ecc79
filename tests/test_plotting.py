import itertools

import pandas as pd

from masktune_utils import plotting


def colours(kinds: list[str]) -> dict[str, str]:
    table = pd.DataFrame({"kind": kinds, "group": kinds, "label": "", "raw": 0.5, "biased": 0.5})
    (ax,) = plotting.scatter(table, "raw", "biased", {"raw": "raw (%)", "biased": "biased (%)"}).axes
    return {container.get_label(): container.lines[0].get_color() for container in ax.containers}


def test_a_method_has_the_same_colour_in_every_figure_and_every_kind_its_own():
    everything = colours(["ERM", *plotting.masking.METHODS, "oracle"])
    some = colours(["oracle", "mean", "top_k"])
    assert some == {kind: everything[kind] for kind in some}
    assert len(set(everything.values())) == len(everything) == 7
    assert list(colours(["red square", "blue square"]).values()) == list(plotting.COLORS[:2])


def test_bars_of_three_classes_stand_side_by_side():
    table = pd.DataFrame({"configuration": ["base", "base", "mean_0.1"], "raw": 0.5, "biased": 0.25})
    for test in ("raw", "biased"):
        for label in range(3):
            table[f"{test}_class_{label}"] = [0.1 * label, 0.2 + 0.1 * label, 0.5]
    top, _ = plotting.class_accuracy(table).axes
    bars = [container for container in top.containers if len(container) == 2 and hasattr(container, "patches")]
    places = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for container in bars for bar in container)
    assert len(places) == 6 and all(left[1] <= right[0] for left, right in itertools.pairwise(places))
    assert [round(container[0].get_height(), 6) for container in bars] == [10, 20, 30]
