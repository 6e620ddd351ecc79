"""Write the tables of README.md and results/README.md from the CSV files.

    python studies/tables.py

A table is known by its first line, and is made if a file has that line. Everything else
in the two files is written by hand.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from registered import KEY, LIMIT, OUT_OF_REACH

from masktune_utils import results
from masktune_utils.choice import ERM
from masktune_utils.settings import REPOSITORY

FOLDER = REPOSITORY / "results"
FILES = (REPOSITORY / "README.md", FOLDER / "README.md")
OF_MODELS = ["experiment", "configuration"]
PAPER = "mean_std_2.0_finetune_lr=0.01"
KINDS = 45  # of runs, for each seed
ROWS_OF_PLACES = 179  # of a seed: five places of 31 kinds with a box, four of six
KINDS_OF_PHOTOGRAPHS = 7


class Test(NamedTuple):
    """The seeds of a registered test; those of which all kinds are there count."""

    seeds: range
    of_mnist5k: range
    of_photographs: range


SHOWN = Test(range(400, 403), range(20, 25), range(6, 9))
OF_PLACES = range(500, 503)
OF_PHOTOGRAPHS = range(9, 12)
LIMITS = {  # measure → in words, and its limit
    "regret": ("mean regret, a mask can hide the shortcut", "at most", 1.8),
    "regret of clothes": ("the same, ten classes of clothes", "at most", 3),
    "ahead": (
        "ahead of the best single mask, a mask can hide the shortcut",
        "at least",
        6,
    ),
    "loss": ("below ERM without a shortcut", "at most", 0.5),
    "largest loss": ("the same: the largest loss of a run", "at most", 4),
    "harmed": (
        "share of runs harmed, of those with ERM at 50% or more",
        "at most",
        0.02,
    ),
    "mnist5k": (
        "mnist5k, ten classes: share of runs that rise by 20 or more",
        "at least",
        0.7,
    ),
    "loss on mnist5k": ("the same: the largest loss of a run", "at most", 2),
    "photographs": (
        "photographs: share within ten points of the oracle",
        "at least",
        0.75,
    ),
    "loss of photographs": (
        "the same: the largest loss of a run, of those with ERM at 50% or more",
        "at most",
        5,
    ),
}
LIMITS_OF_PLACES = {
    "behind": (
        "the box hidden: behind the best in hindsight, on average",
        "at most",
        3,
    ),
    "off": (
        "the estimate is off, on average (two classes before, after; ten)",
        "at most",
        5,
    ),
    "unseen": ("runs harmed by a wrong place, at a price below 3", "at most", 0),
    "off in photographs": (
        "photographs: the estimate is off, on average (before, after)",
        "at most",
        5,
    ),
    "near in photographs": (
        "photographs, the box hidden: share within ten points of the oracle",
        "at least",
        0.75,
    ),
}
LENGTHS = ["1", "2", "4", "8", "50"]  # epochs of halves in lengths.csv
NOT_MASKS = ["ERM", "nothing masked", "oracle"]
IN_HINDSIGHT = ["ERM", "chosen", "best"]
DATASETS = {"mnist": "MNIST", "fashion_mnist": "Fashion-MNIST", "animals": "animals"}
CLASSES = {"halves": "two classes", "digits": "ten classes"}
RANGES = "runs|ERM|chosen|best in hindsight|"
ON_MNIST = {  # configuration → name in the text
    "base": "ERM",
    "threshold_1.0_finetune_lr=0.01": "no-mask control: the same epoch, nothing masked",
    PAPER: "published: the paper's `mean_std` 2",
    "top_k_0.1": "earlier reproduction's best on raw, `top_k` 0.1, by SGD at 0.0025",
    "top_k_0.1_finetune_optimizer=adam_finetune_lr=0.001": (
        "the same, by Adam as there (98.28 raw there)"
    ),
    "mean_std_4.0_dilation=4_finetune_lr=0.02_finetune_schedule=linear": (
        "ours: `mean_std` 4 dilated by 4, found on this task"
    ),
    "chosen": "ours: chosen without group labels",
    "oracle": "oracle: ERM without a square, 20 epochs, not fine-tuned",
}
OF_AUTHORS = {  # model of reference_paper_setting.csv → name in the text
    "ERM, last checkpoint": "ERM",
    "the authors' code": "the authors' code",
    "maps of the last checkpoint": "with maps of the last checkpoint",
    "both, momentum from zero": "our setting",
}


def read(name: str) -> pd.DataFrame:
    """A table of the results."""
    return pd.read_csv(FOLDER / name)


def summary(name: str, by: str | list[str]) -> pd.DataFrame:
    """Raw, biased and worst group by model, as mean ± standard deviation in %."""
    return results.summarize(read(name), by).drop(columns="seeds")


def line(*cells: str) -> str:
    """A row of a Markdown table."""
    return f"|{'|'.join(cells)}|"


def lines(table: pd.DataFrame) -> list[str]:
    """The rows of a table of text and counts, each with its index."""
    rows = table.reset_index().itertuples(index=False)
    return [line(*map(str, row)) for row in rows]


def main_table() -> list[str]:
    """ERM, published, ours and the oracle, on the full MNIST."""
    runs = summary("reference.csv", OF_MODELS)
    choices = summary("reference_choices.csv", OF_MODELS)
    mnist = runs.loc["mnist"]
    mnist.loc["chosen"] = choices.loc[("mnist", "chosen")]
    mnist.loc["oracle"] = runs.loc[("mnist_shortcut=none_epochs=20", "base")]
    return lines(mnist.loc[[*ON_MNIST]].rename(ON_MNIST))


def short_table() -> list[str]:
    """The registered test in three lines."""
    parts = by_kind(registered(SHOWN.seeds))
    _, on_objects, _ = parts.values()
    more_training = on_objects["nothing masked"].mean()
    words = f"pixels (more training alone: {more_training:.0f})"
    rows = means_and_ranges(parts.items(), IN_HINDSIGHT)
    return [row.replace("pixels", words) for row in rows]


def table_by_set() -> list[str]:
    """The registered test by data set, where a mask can hide the shortcut."""
    hidden, _, _ = by_kind(registered(SHOWN.seeds)).values()
    parts = {}
    for (dataset, labels), runs in hidden.groupby(["dataset", "labels"]):
        parts[f"{DATASETS[dataset]}, {CLASSES[labels]}"] = runs
    rows = means_and_ranges(parts.items(), [*IN_HINDSIGHT, "oracle"])
    return rows[::-1]  # MNIST first


def means_and_ranges(
    parts: Iterable[tuple[str, pd.DataFrame]], models: list[str]
) -> list[str]:
    """Number of runs; mean, lowest and highest worst group of models, in points."""
    rows = []
    for name, runs in parts:
        ranges = runs[models].agg(mean_and_range)
        rows.append(line(name, f"{len(runs)}", *ranges))
    return rows


def mean_and_range(points: pd.Series) -> str:
    """Of several values; one as it is; of none, nothing."""
    low, mean, high = points.agg(["min", "mean", "max"])
    if points.count() > 1:
        return f"{mean:.0f} ({low:.0f}–{high:.0f})"
    return f"{mean:.0f}".removeprefix("nan")


def registered(seeds: range) -> pd.DataFrame:
    """A registered test, seeds of which all kinds are there: a row a run, in points.

    A column for each model that all runs have, for the choice, for the best of all but
    the oracle, and for the best single mask; and what is measured.
    """
    rows = read("registered.csv").query(f"seed in {[*seeds]}")
    kinds = rows.groupby("seed")["is_chosen"].transform("sum")
    rows = rows[kinds == KINDS].assign(points=100 * rows["worst_group"])
    models = rows.query("halves != 'late'").pivot(
        index=KEY, columns="model", values="points"
    )
    runs = models[NOT_MASKS].assign(
        chosen=rows[rows["is_chosen"]].set_index(KEY)["points"],
        best=rows.query("model != 'oracle'").groupby(KEY)["points"].max(),
        single=best_single(models.drop(columns=NOT_MASKS)),
    )
    runs["regret"] = runs["best"] - runs["chosen"]
    runs["ahead"] = runs["chosen"] - runs["single"]
    runs["loss"] = runs["ERM"] - runs["chosen"]
    return runs.reset_index()


def by_kind(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Runs whose shortcut a mask can hide without the object, or cannot; and others."""
    is_out_of_reach = runs["kind"].isin(OUT_OF_REACH)
    is_none = runs["kind"] == "none"
    return {
        "a mask can hide it": runs[~(is_out_of_reach | is_none)],
        "colour, tint, scattered pixels": runs[is_out_of_reach],
        "no shortcut": runs[is_none],
    }


def best_single(masks: pd.DataFrame) -> pd.Series:
    """The mask that is best on average where a mask can hide the shortcut.

    If a run has fewer rounds of it, the last of these.
    """
    rules = masks.columns.str.replace(r", \d rounds", "", regex=True)
    parts = [masks.loc[:, rules == rule].ffill(axis=1) for rule in rules.unique()]
    filled = pd.concat(parts, axis=1)
    hidden, _, _ = by_kind(filled.reset_index("kind")).values()
    return filled[hidden.mean(numeric_only=True).idxmax()]


def with_interval(runs: pd.DataFrame, name: str) -> str:
    """Mean of a measure; its 95% interval, by bootstrap over shortcuts and seeds."""
    groups = runs.groupby(["kind", "seed"])[name]
    sums = groups.sum().unstack(fill_value=0).to_numpy()
    sizes = groups.size().unstack(fill_value=0).to_numpy()
    rng = np.random.default_rng(0)
    means = []
    for _ in range(10_000):
        kinds, seeds = [rng.choice(side, side) for side in sums.shape]
        drawn = np.ix_(kinds, seeds)
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{runs[name].mean():.2f} ({low:.2f} to {high:.2f})"


def measures(test: Test) -> dict[str, tuple[float, str]]:
    """What a registered test measures: its value, and how it is written."""
    runs = registered(test.seeds)
    hidden, _, without = by_kind(runs).values()
    clothes = hidden.query("dataset == 'fashion_mnist' and labels == 'digits'")
    is_harmed = runs.query("ERM >= 50")["loss"] > 1
    gains = gains_on_mnist5k(test.of_mnist5k)
    is_repaired = gains >= 20
    half_right = photographs(test.of_photographs).drop("background", errors="ignore")
    losses = half_right.query("ERM >= 50").eval("ERM - chosen")
    is_near = ends_near_oracle(test.of_photographs)
    return {
        "regret": value(hidden["regret"].mean(), with_interval(hidden, "regret")),
        "regret of clothes": value(clothes["regret"].mean()),
        "ahead": value(hidden["ahead"].mean(), with_interval(hidden, "ahead")),
        "loss": value(without["loss"].mean()),
        "largest loss": value(without["loss"].max()),
        "harmed": value(is_harmed.mean(), share(is_harmed)),
        "mnist5k": value(is_repaired.mean(), share(is_repaired)),
        "loss on mnist5k": value(max(0.0, -gains.min())),
        "photographs": value(is_near.mean(), share(is_near)),
        "loss of photographs": value(losses.max()),
    }


def measures_of_places(seeds: range) -> dict[str, tuple[float, str]]:
    """What the same test measures of places, see `measures`."""
    rows = places(seeds)
    boxes = rows.query("place == 'box'")
    models = read("registered.csv").query("model != 'oracle'")
    best = 100 * models.groupby(KEY)["worst_group"].max().rename("best")
    behind = boxes.join(best, on=KEY).eval("best - hidden_worst_group")
    off = pd.DataFrame({"labels": boxes["labels"]})
    off["before"] = (boxes["estimate"] - boxes["worst_group"]).abs()
    off["after"] = (boxes["hidden_estimate"] - boxes["hidden_worst_group"]).abs()
    means = off.groupby("labels")[["before", "after"]].mean().iloc[::-1].stack()
    wrong = rows.query("is_found and kind == 'none'")
    is_harmed = wrong.eval("worst_group - hidden_worst_group > 5")
    is_unseen = is_harmed & wrong.eval("accuracy - hidden_accuracy < 3")
    of_photographs = photographed_places()
    off_photographs = [
        (of_photographs[f"{when}estimate"] - of_photographs[f"{when}worst_group"])
        .abs()
        .mean()
        for when in ("", "hidden_")
    ]
    is_near = of_photographs["oracle"] - of_photographs["hidden_worst_group"] <= 10
    return {
        "off in photographs": value(
            max(off_photographs), ", ".join(map("{:.1f}".format, off_photographs))
        ),
        "near in photographs": value(is_near.mean(), share(is_near)),
        "behind": value(behind.mean(skipna=False)),
        "off": value(means.max(), ", ".join(map("{:.1f}".format, means))),
        "unseen": value(is_unseen.sum(), f"{is_unseen.sum()} of {is_harmed.sum()}"),
    }


def value(number: float, words: str = "") -> tuple[float, str]:
    """A measure, and how it is written."""
    return number, words or f"{number:.2f}"


def table_of_measures() -> list[str]:
    """What the registered test measures, and the limits of registered.md."""
    return outcomes(measures(SHOWN), LIMITS)


def table_of_measures_of_places() -> list[str]:
    """The same, of places."""
    return outcomes(measures_of_places(OF_PLACES), LIMITS_OF_PLACES)


def outcomes(
    measured: dict[str, tuple[float, str]], limits: dict[str, tuple[str, str, float]]
) -> list[str]:
    """Measures, and whether each keeps its limit."""
    rows = []
    for name, (words, bound, limit) in limits.items():
        number, text = measured[name]
        is_met = number <= limit if bound == "at most" else number >= limit
        verdict = "met" if is_met else "**missed**"
        if math.isnan(number):
            text, verdict = "not run", ""
        rows.append(line(words, text, f"{bound} {limit}", verdict))
    return rows


def share(runs: pd.Series) -> str:
    """Of runs, True or False, how many are; in words."""
    return f"{runs.mean():.2f} ({runs.sum()} of {len(runs)})"


def gains_on_mnist5k(seeds: range) -> pd.Series:
    """Notebook 11 with ten classes: how far the worst group rises, in points."""
    runs = read("reference_11_abstaining.csv")
    runs = runs.query(f"labels == 'digits' and seed in {[*seeds]}")
    errors = runs.pivot(
        index=["placement", "seed"], columns="rule", values="error_worst_group"
    )
    return 100 * (errors["ERM"] - errors["MaskTune"])


def rows_of_photographs(seeds: range) -> pd.DataFrame:
    """The rows of a test's photographs, seeds of which all kinds are there."""
    rows = read("photographs.csv").query(f"seed in {[*seeds]}")
    kinds = rows.groupby("seed")["shortcut"].transform("nunique")
    return rows[kinds == KINDS_OF_PHOTOGRAPHS]


def photographs(seeds: range) -> pd.DataFrame:
    """A test's photographs: a row a run, in points."""
    rows = rows_of_photographs(seeds)
    runs = 100 * rows.pivot(
        index=["shortcut", "seed"], columns="model", values="worst_group"
    )
    if runs.empty:
        return pd.DataFrame(columns=[ERM, "chosen", "oracle"])
    return runs.reindex(rows["shortcut"].unique(), level="shortcut")


def ends_near_oracle(seeds: range) -> pd.Series:
    """Whether each run ends within ten points, of those that a mask can repair."""
    runs = photographs(seeds).drop("background", errors="ignore")
    runs = runs.dropna(subset="oracle")
    return runs["oracle"] - runs["chosen"] <= 10


def table_of_photographs() -> list[str]:
    """By shortcut."""
    runs = photographs(SHOWN.of_photographs)
    parts = runs.groupby("shortcut", sort=False)
    return means_and_ranges(parts, [ERM, "chosen", "oracle"])


def ways() -> pd.DataFrame:
    """lengths.csv: a row a kind; for each of its columns, a column a way."""
    runs = read("lengths.csv")
    sets = runs["dataset"].map({"mnist": "digits", "fashion_mnist": "clothes"})
    runs["run"] = sets + ", " + runs["labels"].map(CLASSES) + ", " + runs["kind"]
    return runs.pivot(index="run", columns="way")


def table_of_lengths() -> list[str]:
    """Worst group, mistakes and those that conflict, by how long halves are trained."""
    of_ways = ways()
    points = (100 * of_ways["worst_group"]).map("{:.1f}".format)
    mistakes = of_ways["mistakes"].astype(str)
    conflicting = of_ways["conflicting_mistakes"].astype(str)
    cells = points + " (" + mistakes + "; " + conflicting + ")"
    return lines(cells[LENGTHS])


def table_of_ways() -> list[str]:
    """Ways to choose by halves: worst group, and how far behind the best of them."""
    of_ways = ways()
    points = 100 * of_ways["worst_group"]
    is_kept = of_ways["chosen"] == ERM
    gains = of_ways["gain"].mask(is_kept, -1)
    mistakes = of_ways["mistakes"][LENGTHS]
    # The first length after which held-out accuracy rises by less than a point.
    rises = mistakes.diff(-1, axis=1) / LIMIT
    settled = (rises.fillna(0) < 0.01).idxmax(axis=1)
    explained = (of_ways["move"] - of_ways["move_elsewhere"])[LENGTHS] / mistakes
    most = explained.idxmax(axis=1)

    def pick(chosen):
        return points.stack()[[*chosen.items()]].droplevel("way")

    early = points["4"]
    late = points["50"]
    table = points[LENGTHS].assign(
        **{
            "4; 50 if they keep ERM": early.mask(is_kept["4"], late),
            "4 or 50, by the larger gain": early.where(gains["4"] >= gains["50"], late),
            "the first after which accuracy gains less than a point": pick(settled),
            "the largest share of mistakes that move": pick(most),
            "masks by 4, judged by 50": points["early masks"],
            "50, and again without the mistakes": points["without mistakes"],
        }
    )
    regret = table.rsub(table.max(axis=1), axis=0)
    numbers = {
        "mean": table.mean(),
        "regret": regret.mean(),
        "largest": regret.max(),
    }
    return lines(pd.DataFrame(numbers).map("{:.1f}".format))


def places(seeds: range) -> pd.DataFrame:
    """places.csv, its whole seeds of digits, clothes and animals; shares in %."""
    rows = read("places.csv").query(f"dataset in {[*DATASETS]} and seed in {[*seeds]}")
    sizes = rows.groupby("seed")["kind"].transform("size")
    rows = rows[sizes == ROWS_OF_PLACES]
    shares = [name for name in rows if "worst_group" in name or "accuracy" in name]
    shares += ["estimate", "hidden_estimate"]
    return rows.assign(**100 * rows[shares])


def photographed_places() -> pd.DataFrame:
    """Boxes of photographs, seeds of which all kinds are there; shares in %."""
    rows = read("places.csv").query(
        f"dataset == 'photographs' and place == 'box' and seed in {[*OF_PHOTOGRAPHS]}"
    )
    kinds = rows.groupby("seed")["kind"].transform("size")
    rows = rows[kinds == 3].set_index(["kind", "seed"])
    columns = ["worst_group", "estimate", "hidden_worst_group", "hidden_estimate"]
    return 100 * rows[[*columns, "accuracy", "hidden_accuracy", "oracle"]]


def table_of_photographed_places() -> list[str]:
    """The same by shortcut: mean, lowest and highest."""
    runs = photographed_places()
    return means_and_ranges(runs.groupby("kind"), [*runs])


def table_of_places() -> list[str]:
    """A place that a person points at: true worst group and estimate, in %."""
    rows = places(OF_PLACES).query("place == 'box'")
    sets = rows["dataset"].map(DATASETS) + ", " + rows["labels"].map(CLASSES)
    columns = [
        "worst_group",
        "estimate",
        "hidden_worst_group",
        "hidden_estimate",
        "accuracy",
        "hidden_accuracy",
    ]
    names = sets + ", " + rows["kind"]
    means = rows.groupby(names, sort=False)[columns].mean()
    return lines(means.map("{:.1f}".format))


def table_of_found_places() -> list[str]:
    """How often maps point at the shortcut: half of it, by a third of the image."""
    rows = places(OF_PLACES).query("kind != 'none'")
    rows = rows[rows["place"] != "box"]
    rows = pd.concat([rows[rows["is_found"]].assign(place="audit"), rows])
    is_found = (rows["covers"] >= 0.5) & (rows["region"] <= 1 / 3)
    counts = is_found.groupby([rows["labels"].map(CLASSES), rows["place"]])
    found = counts.agg(["sum", "size"]).astype(str).agg(" of ".join, axis=1)
    return lines(found.unstack("labels", fill_value="").fillna(""))


def table_of_again() -> list[str]:
    """Where an audit's place covers a part of the shortcut: two places hidden, in %."""
    rows = read("places_again.csv")
    rows["run"] = rows["dataset"].map(DATASETS) + ", " + rows["kind"]
    rows["run"] += rows["labels"].map({"halves": "", "digits": ", ten classes"})
    rows = rows.query(f"seed in {[*OF_PLACES]}")
    numbers = rows.select_dtypes("number").columns.drop(["seed", "hidden"])
    runs = rows.pivot_table([*numbers], "run", "hidden", sort=False)
    runs = runs[runs["covers", 1] < 0.95]
    columns = [
        ("covers", 1),
        ("rest", 1),
        ("worst_group", 0),
        ("worst_group", 1),
        ("worst_group", 2),
        ("accuracy", 0),
        ("accuracy", 1),
        ("accuracy", 2),
    ]
    return lines((100 * runs[columns]).map("{:.0f}".format))


def authors_table() -> list[str]:
    """The setting of the authors' code, and its differences from ours."""
    models = summary("reference_paper_setting.csv", "model")
    return lines(models.loc[[*OF_AUTHORS]].rename(OF_AUTHORS))


def table_of_others() -> list[str]:
    """Raw / biased accuracy as others have it, digit for digit."""
    template = (
        "|{text}|{setting}|{erm_raw} / {erm_biased}|{tuned_raw} / {tuned_biased}|"
    )
    copied = pd.read_csv(
        FOLDER / "reference_others.csv", dtype=str, keep_default_na=False
    )
    rows = [template.format(**row) for row in copied.to_dict("records")]
    return [row.replace(" / |", "|") for row in rows]


TABLES = {
    "|full MNIST|raw|biased|worst group|": main_table,
    f"|shortcut|{RANGES}": short_table,
    f"|a mask can hide it|{RANGES}oracle|": table_by_set,
    "|announced, points|outcome|limit||": table_of_measures,
    "|photographs|runs|ERM|chosen|oracle|": table_of_photographs,
    "|kind|1|2|4|8|50|": table_of_lengths,
    "|epochs|mean|mean regret|largest|": table_of_ways,
    "|announced of places, points|outcome|limit||": table_of_measures_of_places,
    "|place hidden|ERM: true|estimate|hidden: true|estimate|accuracy|hidden|": (
        table_of_places
    ),
    "|place hidden|runs|ERM: true|estimate|hidden: true|estimate|accuracy|hidden|oracle|": (
        table_of_photographed_places
    ),
    "|place by|ten classes|two classes|": table_of_found_places,
    "|place of an audit|covers|rest|true: ERM|one hidden|both|accuracy: ERM|one|both|": (
        table_of_again
    ),
    "|red 4×4, ordered|raw|biased|worst group|": authors_table,
    "|text|square, placement, conflicting images|ERM|fine-tuned|": table_of_others,
}


def with_tables(text: str) -> str:
    """A text with its tables written anew."""
    written = []
    is_old = False
    for row in text.split("\n"):
        if row in TABLES:
            ruler = f"|---|{'--:|' * (row.count('|') - 2)}"
            written += [row, ruler, *TABLES[row]()]
        is_old = row in TABLES or (is_old and row.startswith("|"))
        if not is_old:
            written.append(row)
    return "\n".join(written)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(with_tables(file.read_text()))
