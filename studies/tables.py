"""Write the tables of README.md and results/README.md from the CSV files.

    python studies/tables.py

A table is known by its first line, and is made if a file has that line. Everything else
in the two files is written by hand.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from registered import KEY, LIMIT, OUT_OF_REACH

from masktune_utils import results
from masktune_utils.choice import ERM
from masktune_utils.choice.exchange import FEW
from masktune_utils.settings import REPOSITORY

FOLDER = REPOSITORY / "results"
FILES = (REPOSITORY / "README.md", FOLDER / "README.md")
OF_MODELS = ["experiment", "configuration"]
PAPER = "mean_std_2.0_finetune_lr=0.01"
KINDS = 45  # of runs, for each seed
FIRST_OF_PHOTOGRAPHS = 6
KINDS_OF_PHOTOGRAPHS = 7
FIRST = 400  # seed of the newest registered test
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
    parts = by_kind(registered())
    _, on_objects, _ = parts.values()
    more_training = on_objects["nothing masked"].mean()
    words = f"pixels (more training alone: {more_training:.0f})"
    rows = means_and_ranges(parts.items(), IN_HINDSIGHT)
    return [row.replace("pixels", words) for row in rows]


def table_by_set() -> list[str]:
    """The registered test by data set, where a mask can hide the shortcut."""
    hidden, _, _ = by_kind(registered()).values()
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


def registered() -> pd.DataFrame:
    """The registered test, seeds of which all kinds are there: a row a run, in points.

    A column for each model that all runs have, for the choice, for the best of all but
    the oracle, and for the best single mask; and what is measured.
    """
    rows = read("registered.csv").query(f"seed >= {FIRST}")
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
    """Mean of a measure; and its 95% interval, by bootstrap over shortcuts."""
    by_shortcut = runs.groupby("kind")[name].agg(["sum", "size"]).to_numpy()
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(by_shortcut), (10_000, len(by_shortcut)))
    sums = by_shortcut[drawn].sum(1)
    low, high = np.quantile(sums[:, 0] / sums[:, 1], [0.025, 0.975])
    return f"{runs[name].mean():.2f} ({low:.2f} to {high:.2f})"


def table_of_measures() -> list[str]:
    """What the registered test measures, and the limits of registered.md."""
    runs = registered()
    hidden, _, without = by_kind(runs).values()
    clothes = hidden.query("dataset == 'fashion_mnist' and labels == 'digits'")
    is_harmed = runs.query("ERM >= 50")["loss"] > 1
    gains = gains_on_mnist5k()
    is_repaired = gains >= 20
    is_near = ends_near_oracle()
    half_right = photographs().drop("background").query("ERM >= 50")
    losses = half_right[ERM] - half_right["chosen"]
    return [
        measured(
            "mean regret, a mask can hide the shortcut",
            hidden["regret"].mean(),
            "at most",
            1.8,
            with_interval(hidden, "regret"),
        ),
        measured(
            "the same, ten classes of clothes",
            clothes["regret"].mean(),
            "at most",
            3,
        ),
        measured(
            "ahead of the best single mask, a mask can hide the shortcut",
            hidden["ahead"].mean(),
            "at least",
            6,
            with_interval(hidden, "ahead"),
        ),
        measured(
            "below ERM without a shortcut",
            without["loss"].mean(),
            "at most",
            0.5,
        ),
        measured(
            "the same: the largest loss of a run", without["loss"].max(), "at most", 4
        ),
        measured(
            "share of runs harmed, of those with ERM at 50% or more",
            is_harmed.mean(),
            "at most",
            0.02,
            share(is_harmed),
        ),
        measured(
            "mnist5k, ten classes: share of runs that rise by 20 or more",
            is_repaired.mean(),
            "at least",
            0.7,
            share(is_repaired),
        ),
        measured("the same: the largest loss of a run", -gains.min(), "at most", 2),
        measured(
            "photographs: share within ten points of the oracle (ERM without the "
            "shortcut, fine-tuned alike)",
            is_near.mean(),
            "at least",
            0.75,
            share(is_near),
        ),
        measured(
            "the same: the largest loss of a run, of those with ERM at 50% or more",
            losses.max(),
            "at most",
            5,
        ),
    ]


def share(runs: pd.Series) -> str:
    """Of runs, True or False, how many are; in words."""
    return f"{runs.mean():.2f} ({runs.sum()} of {len(runs)})"


def gains_on_mnist5k() -> pd.Series:
    """Notebook 11 with ten classes: how far the worst group rises, in points."""
    runs = read("reference_11_abstaining.csv").query("labels == 'digits'")
    errors = runs.pivot(
        index=["placement", "seed"], columns="rule", values="error_worst_group"
    )
    return 100 * (errors["ERM"] - errors["MaskTune"])


def measured(
    name: str,
    value: float,
    bound: str,
    limit: float,
    words: str = "",
) -> str:
    """A measure, in words or by its value; and whether it keeps its limit."""
    is_met = value <= limit if bound == "at most" else value >= limit
    verdict = "met" if is_met else "**missed**"
    return line(name, words or f"{value:.2f}", f"{bound} {limit}", verdict)


def rows_of_photographs() -> pd.DataFrame:
    """The rows of the test's photographs, seeds of which all kinds are there."""
    rows = read("photographs.csv").query(f"seed >= {FIRST_OF_PHOTOGRAPHS}")
    kinds = rows.groupby("seed")["shortcut"].transform("nunique")
    return rows[kinds == KINDS_OF_PHOTOGRAPHS]


def photographs() -> pd.DataFrame:
    """The test's photographs: a row a run, in points."""
    rows = rows_of_photographs()
    runs = 100 * rows.pivot(
        index=["shortcut", "seed"], columns="model", values="worst_group"
    )
    return runs.reindex(rows["shortcut"].unique(), level="shortcut")


def ends_near_oracle() -> pd.Series:
    """Whether each run ends within ten points, of those that a mask can repair."""
    runs = photographs().drop("background").dropna(subset="oracle")
    return runs["oracle"] - runs["chosen"] <= 10


def table_of_photographs() -> list[str]:
    """By shortcut."""
    parts = photographs().groupby("shortcut", sort=False)
    return means_and_ranges(parts, [ERM, "chosen", "oracle"])


def table_of_audited_photographs() -> list[str]:
    """What ERM's audits say, by shortcut: a value for each seed."""
    rows = rows_of_photographs().query("model == 'ERM'")
    columns = {  # of the table → how a value is written
        "audit_mistakes": "{:.0f}",
        "audit_move": "{:.0f}",
        "audit_move_elsewhere": "{:.0f}",
        "audit_stands_out": "{}",
        "audit_region": "{:.0%}",
        "audit_shortcut_covered": "{:.0%}",
    }
    texts = pd.DataFrame(
        {name: rows[name].map(columns[name].format) for name in columns}
    )
    texts = texts.replace({"True": "yes", "False": "no", "nan%": "–"})
    return lines(texts.groupby(rows["shortcut"], sort=False).agg(", ".join))


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


def table_of_audits() -> list[str]:
    """How often an audit has enough mistakes, and finds the shortcut."""
    runs = read("audits.csv").assign(runs=1)
    runs["can_tell"] = runs["mistakes"] >= FEW
    runs["finds"] = runs["stands_out"] & (runs["shortcut_covered"] >= 0.5)
    runs = pd.concat(by_kind(runs), names=["part"])
    parts = runs.groupby(["part", "images"], sort=False)
    return lines(parts[["runs", "can_tell", "stands_out", "finds"]].sum())


def table_of_places() -> list[str]:
    """A place that a person points at: true worst group and estimate, in %."""
    rows = read("places.csv").query("place == 'box'")
    sets = rows["dataset"].map(DATASETS) + ", " + rows["labels"].map(CLASSES)
    columns = [
        "worst_group",
        "estimate",
        "hidden_worst_group",
        "hidden_estimate",
        "accuracy",
        "hidden_accuracy",
    ]
    texts = (100 * rows[columns]).map("{:.1f}".format)
    return lines(texts.set_index(sets + ", " + rows["kind"]))


def table_of_found_places() -> list[str]:
    """How often maps point at the shortcut: half of it, by a third of the image."""
    rows = read("places.csv")
    with_box = rows.groupby(KEY)["place"].transform(lambda of: "box" in [*of])
    rows = rows[with_box & (rows["place"] != "box")]
    rows = pd.concat([rows[rows["is_found"]].assign(place="audit"), rows])
    is_found = (rows["covers"] >= 0.5) & (rows["region"] <= 1 / 3)
    counts = is_found.groupby([rows["labels"].map(CLASSES), rows["place"]])
    found = counts.agg(["sum", "size"]).astype(str).agg(" of ".join, axis=1)
    return lines(found.unstack("labels", fill_value="").fillna(""))


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
    "|audited|mistakes|move|elsewhere|stands out|region|covers|": (
        table_of_audited_photographs
    ),
    "|kind|1|2|4|8|50|": table_of_lengths,
    "|epochs|mean|mean regret|largest|": table_of_ways,
    "|audit|images|runs|five mistakes|stands out|covers half|": table_of_audits,
    "|place hidden|ERM: true|estimate|hidden: true|estimate|accuracy|hidden|": (
        table_of_places
    ),
    "|place by|ten classes|two classes|": table_of_found_places,
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
