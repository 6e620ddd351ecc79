"""Write the tables of README.md and results/README.md from the CSV files.

    python studies/tables.py

A table is known by its first line. Everything else in the two files is written by hand.
"""

import numpy as np
import pandas as pd

from masktune_utils import results
from masktune_utils.settings import REPOSITORY

LINEAR = "_finetune_lr=0.02_finetune_schedule=linear"
PAPER = "mean_std_2.0_finetune_lr=0.01"
FILES = (REPOSITORY / "README.md", REPOSITORY / "results" / "README.md")
RUNS = pd.read_csv(REPOSITORY / "results" / "reference.csv")
CHOSEN = RUNS[RUNS["chosen"].astype(str).eq("True")]  # by the three tests
# The same base models, and what the one test chooses for them.
CHOICES_RUN = pd.read_csv(REPOSITORY / "results" / "reference_choices.csv")
ONE_TEST = CHOICES_RUN[CHOICES_RUN["configuration"].eq("chosen")]
RULES = pd.read_csv(REPOSITORY / "results" / "reference_rules.csv")
AUTHORS = pd.read_csv(REPOSITORY / "results" / "reference_paper_setting.csv")
PHOTOGRAPHS = pd.read_csv(REPOSITORY / "results" / "photographs.csv")
REGISTERED = pd.read_csv(REPOSITORY / "results" / "registered_second.csv")
KIND = ["dataset", "labels", "kind"]
KINDS_OF_A_SEED = 45
OUT_OF_REACH = ("pixels", "coloured digit", "tint", "none")  # see registered_second.md
NOT_CANDIDATES = ["ERM", "nothing masked", "oracle"]
SETS = {  # data set and classes, as in the texts
    ("mnist", "halves"): "MNIST, two classes",
    ("mnist", "digits"): "MNIST, ten classes",
    ("fashion_mnist", "halves"): "Fashion-MNIST, two classes",
    ("fashion_mnist", "digits"): "Fashion-MNIST, ten classes",
    ("animals", "halves"): "animals, two classes",
    ("animals", "digits"): "animals, ten classes",
}


def cells(rows: pd.DataFrame, *names: str) -> list[str]:
    """Columns of rows, as mean ± standard deviation in %; blank if there are none."""
    if not len(rows):
        return [""] * len(names)
    return results.summarize(rows.assign(all=0), ["all"], names).iloc[0].tolist()[:-1]


def of(experiment: str, configuration: str) -> pd.DataFrame:
    """The rows of a configuration, one for each seed."""
    is_row = RUNS["experiment"].eq(experiment) & RUNS["configuration"].eq(configuration)
    return RUNS[is_row]


def line(name: str, values: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {name} | {' | '.join(values)} |"


def table(header: str, lines: list[str]) -> list[str]:
    """A Markdown table, whose columns of numbers are aligned to the right."""
    count = header.count("|") - 2
    return [header, f"|---|{'--:|' * count}", *lines]


def main_table() -> list[str]:
    """ERM, published, ours and the oracle, on the full MNIST."""
    of_mnist = ONE_TEST[ONE_TEST["experiment"] == "mnist"]
    seeds = ", ".join(map(str, sorted(of_mnist["seed"])))
    rows = {
        "ERM": of("mnist", "base"),
        "one more epoch, nothing masked": of("mnist", "threshold_1.0_finetune_lr=0.01"),
        "published rule: `top_k` 0.1, by Adam (best of fifteen on raw)": of(
            "mnist", "top_k_0.1_finetune_optimizer=adam_finetune_lr=0.001"
        ),
        "published rule: the paper's, `mean_std` 2": of("mnist", PAPER),
        "ours: `mean_std` 4 dilated by 4, found on this task": of(
            "mnist", f"mean_std_4.0_dilation=4{LINEAR}"
        ),
        f"ours: chosen without group labels (seed {seeds}, of development)": of_mnist,
        "oracle: ERM of 20 epochs without any square in training": of(
            "mnist_shortcut=none_epochs=20", "base"
        ),
    }
    lines = [line(name, cells(rows[name], *results.ACCURACIES)) for name in rows]
    return table("| | raw | biased | worst group |", lines)


def short_table() -> list[str]:
    """The registered test in three lines."""
    runs = registered()
    can_hide = ~runs["kind"].isin(OUT_OF_REACH)
    is_without = runs["kind"] == "none"
    parts = {
        "a mask can hide it": runs[can_hide],
        "colour, tint, scattered pixels": runs[~can_hide & ~is_without],
        "no shortcut": runs[is_without],
    }
    header = "| shortcut | runs | ERM | chosen | best in hindsight |"
    return table(header, means_and_ranges(parts))


def shortcuts_table() -> list[str]:
    """The registered test by data set, where a mask can hide the shortcut."""
    runs = registered()
    can_hide = ~runs["kind"].isin(OUT_OF_REACH)
    parts = {}
    for (dataset, labels), name in SETS.items():
        is_of_set = runs["dataset"].eq(dataset) & runs["labels"].eq(labels)
        parts[name] = runs[is_of_set & can_hide]
    header = "| a mask can hide it | runs | ERM | chosen | best in hindsight |"
    return table(header, means_and_ranges(parts))


def means_and_ranges(parts: dict[str, pd.DataFrame]) -> list[str]:
    """Number of runs; mean, lowest and highest worst group of three models."""
    lines = []
    for name, members in parts.items():
        values = [f"{len(members)}"]
        for model in ("ERM", "chosen", "best"):
            low, mean, high = members[model].agg(["min", "mean", "max"])
            values.append(f"{mean:.0f} ({low:.0f}–{high:.0f})")
        lines.append(line(name, values))
    return lines


def rules_table() -> list[str]:
    """The rule, and variants, on the trials."""
    names = [name.replace("_", " ") for name in RULES]
    lines = []
    for name, *values in RULES.itertuples(index=False):
        lines.append(line(name, [f"{value:g}" for value in values]))
    return table(f"| {' | '.join(names)} |", lines)


def authors_table() -> list[str]:
    """The setting of the authors' code, and each difference by itself."""
    lines = []
    for name, rows in AUTHORS.groupby("model", sort=False):
        values = cells(rows, *results.ACCURACIES)
        has_masks = rows["hidden_shortcut_whole"].notna().all()
        values += cells(rows, "hidden_shortcut_whole") if has_masks else [""]
        lines.append(line(name, values))
    header = "| setting of the authors' code | raw | biased | worst group "
    return table(f"{header}| its squares completely hidden |", lines)


def registered() -> pd.DataFrame:
    """The second registered test: a row for each run of the whole seeds, in points.

    A column for each model that all runs have, for the choice, the best of ERM and the
    candidates, and the best single candidate; and what registered_second.md measures.
    """
    runs = REGISTERED.assign(points=100 * REGISTERED["worst_group"])
    counts = runs.drop_duplicates([*KIND, "seed"])["seed"].value_counts()
    runs = runs[runs["seed"].isin(counts.index[counts == KINDS_OF_A_SEED])]
    by = [*KIND, "seed"]
    models = runs.pivot(index=by, columns="model", values="points")
    candidates = models.drop(columns=NOT_CANDIDATES)
    chosen = runs[runs["is_chosen"]].set_index(by)
    table = models[NOT_CANDIDATES].assign(
        chosen=chosen["points"],
        best=candidates.max(axis=1).clip(lower=models["ERM"]),
        single=best_single(candidates),
    )
    table["regret"] = table["best"] - table["chosen"]
    table["gain"] = table["chosen"] - table["single"]
    table["harm"] = table["ERM"] - table["chosen"]
    return table.reset_index()


def best_single(candidates: pd.DataFrame) -> pd.Series:
    """The candidate that is best on average where a mask can hide the shortcut.

    If a run has fewer rounds of it, the last of these.
    """
    rules = candidates.columns.str.replace(r", \d rounds", "", regex=True)
    parts = [candidates.loc[:, rules == rule].ffill(axis=1) for rule in rules.unique()]
    filled = pd.concat(parts, axis=1)
    can_hide = ~filled.index.get_level_values("kind").isin(OUT_OF_REACH)
    return filled[filled[can_hide].mean().idxmax()]


def by_bootstrap(runs: pd.DataFrame, name: str) -> str:
    """Mean of a measure; and its 95% interval: kinds are drawn, and seeds of each."""
    values = runs.pivot(index=KIND, columns="seed", values=name).to_numpy()
    rng = np.random.default_rng(0)
    kinds, seeds = values.shape
    rows = rng.integers(kinds, size=(10_000, kinds, 1))
    columns = rng.integers(seeds, size=(10_000, kinds, seeds))
    low, high = np.quantile(values[rows, columns].mean((1, 2)), [0.025, 0.975])
    return f"{values.mean():.2f} ({low:.2f} to {high:.2f})"


def registered_table() -> list[str]:
    """The measures of the second registered test, and what was announced."""
    runs = registered()
    hidden = runs[~runs["kind"].isin(OUT_OF_REACH)]
    without = runs[runs["kind"] == "none"]
    harmed = (runs["harm"] > 1).sum()
    rows = {
        "mean regret, a mask can hide the shortcut": [
            by_bootstrap(hidden, "regret"),
            "at most 2",
        ],
        "the same, without ten classes of clothes": [
            by_bootstrap(hidden[~is_of_clothes(hidden)], "regret"),
            "",
        ],
        "mean gain over the best single candidate": [
            by_bootstrap(hidden, "gain"),
            "at least 5",
        ],
        "mean gain over ERM, all kinds": [
            by_bootstrap(runs.assign(gain=-runs["harm"]), "gain"),
            "",
        ],
        "harm: more than a point below ERM": [
            f"{harmed} of {len(runs)}",
            "1 of 50",
        ],
        "below ERM without a shortcut, on average": [
            by_bootstrap(without, "harm"),
            "at most 1",
        ],
        "the same, at most": [f"{without['harm'].max():.2f}", "3"],
    }
    lines = [line(name, values) for name, values in rows.items()]
    return table("| registered test, points | outcome | announced |", lines)


def is_of_clothes(runs: pd.DataFrame) -> pd.Series:
    """Fashion-MNIST with ten classes."""
    return runs["dataset"].eq("fashion_mnist") & runs["labels"].eq("digits")


def photographs_table() -> list[str]:
    """Every run on photographs, the seeds of a kind side by side."""
    models = ["ERM", "nothing masked", "chosen", "trained anew", "oracle"]
    kinds = PHOTOGRAPHS.groupby(["images", "shortcut", "network"])
    lines = []
    for (images, shortcut, network), rows in kinds:
        by_seed = rows.pivot_table("worst_group", "seed", "model")
        short, *_ = network.split(",")
        seeds = ", ".join(map(str, by_seed.index))
        cells = []
        for model in models:
            shares = 100 * by_seed.get(model, pd.Series(dtype=float))
            cells.append(", ".join(shares.map("{:.1f}".format)))
        lines.append(line(f"{images}, {shortcut}: {short}; {seeds}", cells))
    return table(f"| photographs; seeds | {' | '.join(models)} |", lines)


TABLES = (
    main_table,
    registered_table,
    short_table,
    shortcuts_table,
    rules_table,
    authors_table,
    photographs_table,
)


def with_tables(text: str) -> str:
    """A text with its tables written anew."""
    new = {}
    for make in TABLES:
        lines = make()
        new[lines[0]] = lines
    written = []
    is_old = False
    for row in text.split("\n"):
        if row in new:
            written += new[row]
        is_old = row in new or (is_old and row.startswith("|"))
        if not is_old:
            written.append(row)
    return "\n".join(written)


if __name__ == "__main__":
    for file in FILES:
        file.write_text(with_tables(file.read_text()))
