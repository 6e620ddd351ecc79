"""Write the tables of README.md and results/README.md from the CSV files.

    python results/tables.py

A table is known by its first line. Everything else in the two files is written by hand.
"""

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
ONE_TEST = CHOICES_RUN[CHOICES_RUN["chosen"].astype(str).eq("True")]
RULES = pd.read_csv(REPOSITORY / "results" / "reference_rules.csv")
CONTROLS = pd.read_csv(REPOSITORY / "results" / "reference_08_limits.csv")
AUTHORS = pd.read_csv(REPOSITORY / "results" / "reference_paper_setting.csv")
SHORTCUTS = {  # what comes out → kind, experiment
    "works": {
        "square of 6 or 10 pixels": ("", "_square_size=10"),
        "two squares": ("_shortcut=two_squares",),
        "frame": ("_shortcut=frame",),
        "no exception": ("_conflicting_share=0.0",),
        "ten classes": ("_labels=digits",),
    },
    "partly": {
        "square anywhere": ("_shortcut=square_anywhere",),
        "of 12 pixels": ("_square_size=12",),
    },
    "fails": {
        "coloured digit": ("_shortcut=digit_color",),
        "tint": ("_shortcut=background",),
        "scattered pixels": ("_shortcut=pixels",),
    },
    "nothing to mend": {"no shortcut": ("_shortcut=none",)},
}
ORACLES = {  # data set and classes → experiment
    ("mnist5k", "halves"): "mnist5k_shortcut=none",
    ("mnist5k", "digits"): "mnist5k_labels=digits_shortcut=none",
    ("mnist", "halves"): "mnist_shortcut=none_epochs=20",
    ("mnist", "digits"): "mnist_labels=digits_shortcut=none_epochs=20",
}
CHOICES = [  # in the order of the table
    "mnist5k_square_size=4",
    "mnist5k",
    "mnist5k_square_size=8",
    "mnist5k_square_size=10",
    "mnist5k_square_size=12",
    "mnist5k_square_color=red",
    "mnist5k_square_color=white",
    "mnist5k_placement=ordered",
    "mnist5k_shortcut=two_squares",
    "mnist5k_shortcut=square_anywhere",
    "mnist5k_shortcut=frame",
    "mnist5k_shortcut=digit_color",
    "mnist5k_shortcut=background",
    "mnist5k_shortcut=pixels",
    "mnist5k_shortcut=none",
    "mnist5k_conflicting_share=0.0",
    "mnist5k_labels=digits",
    "mnist5k_labels=digits_shortcut=none",
    "mnist",
    "mnist_placement=ordered_epochs=20",
    "mnist_shortcut=two_squares_epochs=20",
    "mnist_shortcut=square_anywhere_epochs=20",
    "mnist_shortcut=frame_epochs=20",
    "mnist_shortcut=none_epochs=20",
    "mnist_labels=digits_epochs=20",
    "mnist_labels=digits_shortcut=none_epochs=20",
]


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
        "published rule: `top_k` 0.1 (best of fifteen on raw)": of(
            "mnist", "top_k_0.1"
        ),
        "published rule: the paper's, `mean_std` 2": of("mnist", PAPER),
        "ours: `mean_std` 4 dilated by 4, found on this task": of(
            "mnist", f"mean_std_4.0_dilation=4{LINEAR}"
        ),
        f"ours: chosen without group labels (seed {seeds}, of development)": of_mnist,
        "oracle: ERM without any square in training": of(
            "mnist_shortcut=none_epochs=20", "base"
        ),
    }
    lines = [line(name, cells(rows[name], *results.ACCURACIES)) for name in rows]
    return table("| | raw | biased | worst group |", lines)


def oracle_of(experiment: str) -> str:
    """The experiment without any shortcut, whose ERM is the oracle of another."""
    row = RUNS[RUNS["experiment"] == experiment].iloc[0]
    return ORACLES[row["dataset"], row["labels"]]


def choice(experiment: str) -> dict[str, str]:
    """What was chosen for a kind of base model, over the seeds of the one test."""
    by_one = ONE_TEST[ONE_TEST["experiment"] == experiment]
    seeds = sorted(by_one["seed"])
    rows = {
        "ERM": of(experiment, "base"),
        "three tests": CHOSEN[CHOSEN["experiment"] == experiment],
        "one test": by_one,
        "oracle": of(oracle_of(experiment), "base"),
    }
    summary = {}
    for name in rows:
        rows[name] = rows[name][rows[name]["seed"].isin(seeds)]
        summary[name] = cells(rows[name], "worst_group")[0]
    for name in ("three tests", "one test"):
        kept = rows[name]["configuration"].eq("base").sum()
        summary[f"ERM kept, {name}"] = f"{kept} of {len(rows[name])}"
    summary["seeds"] = ", ".join(map(str, seeds))
    return summary


def shortcuts_table() -> list[str]:
    """The choice by the one test in short: the lowest and the highest mean of kinds."""
    lines = []
    for outcome, kinds in SHORTCUTS.items():
        names = [
            f"mnist5k{name}" for experiments in kinds.values() for name in experiments
        ]
        means = {"ERM": [], "chosen": []}
        kept = []
        for name in names:
            chosen = ONE_TEST[ONE_TEST["experiment"] == name]
            erm = of(name, "base")
            erm = erm[erm["seed"].isin(chosen["seed"])]
            means["ERM"].append(100 * erm["worst_group"].mean())
            means["chosen"].append(100 * chosen["worst_group"].mean())
            kept += chosen["configuration"].eq("base").tolist()
        ranges = [f"{min(m):.0f}–{max(m):.0f}".split("–") for m in means.values()]
        ranges = ["–".join(dict.fromkeys(limits)) for limits in ranges]
        count = f"{sum(kept)} of {len(kept)}"
        lines.append(line(outcome, [", ".join(kinds), *ranges, count]))
    return table("| | shortcut | ERM | chosen | ERM kept |", lines)


def choices_table() -> list[str]:
    """The choice by one test and by the three that it replaces."""
    known = set(ONE_TEST["experiment"])
    names = [name for name in CHOICES if name in known]
    lines = [line(f"`{name}`", list(choice(name).values())) for name in names]
    columns = ("experiment", *choice(names[0]))
    return table(f"| {' | '.join(columns)} |", lines)


def rules_table() -> list[str]:
    """The rule, and variants, on the trials."""
    lines = []
    for name, *values in RULES.drop(columns="files").itertuples(index=False):
        lines.append(line(name, [f"{value:g}" for value in values]))
    return table(f"| {' | '.join(RULES.columns.drop('files'))} |", lines)


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


def controls_table() -> list[str]:
    """Masks by ERM's maps against one for all and three controls, with both fills."""
    names = {
        "by ERM's maps": "by ERM's maps",
        "one mask for all images, by their mean": "one mask for all",
        "the first, handed to other images": "those of other images",
        "patches at random, as large on average": "random patches",
        "nothing masked": "nothing",
    }
    experiments = {
        "6 pixels": "mnist5k",
        "12 pixels": "mnist5k_square_size=12",
        "full MNIST": "mnist_epochs=20",
        "full MNIST, ordered": "mnist_placement=ordered_epochs=20",
    }
    lines = []
    for label, name in names.items():
        values = []
        for experiment in experiments.values():
            of_experiment = CONTROLS[CONTROLS["experiment"] == experiment]
            for fill in ("zero", "resample"):
                is_row = of_experiment["model"] == f"{name}, {fill}"
                values += cells(of_experiment[is_row], "worst_group")
        lines.append(line(label, values))
    columns = [f"{name}: zero | resampled" for name in experiments]
    return table(f"| masks | {' | '.join(columns)} |", lines)


TABLES = (
    main_table,
    shortcuts_table,
    choices_table,
    rules_table,
    authors_table,
    controls_table,
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
