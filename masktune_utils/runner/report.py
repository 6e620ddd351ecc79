"""The report: one HTML page of what was run, which opens in any browser, offline."""

import base64
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader

from masktune_utils import results
from masktune_utils.settings import DEFAULTS, REPOSITORY, Settings
from masktune_utils.store import write_bytes

PICTURES = {
    "05_chosen": "image, map of ERM, what was hidden, masked image, map afterwards",
    "05_mistakes": "some of ERM's mistakes among the training images",
    "05_choice": "the candidates: right among the rest, and among ERM's mistakes",
    "05_accuracies": "all configurations",
}
LIBRARIES = ("torch", "torchvision", "numpy", "pandas")


def write_report(bases: list[Settings]) -> Path:
    """Write `results/report.html` from what is saved.

    Args:
        bases: the settings of the base models, all of one directory.

    Returns:
        The file. It needs no other, but for the links to the executed notebooks.
    """
    directory = REPOSITORY / bases[0].directory
    table = results.collect(bases[0].directory)
    experiments = {}
    finished = {*table["experiment"]}
    for settings in bases:
        if settings.experiment in finished:
            experiments.setdefault(settings.experiment, []).append(settings)
    sections = [_section(table, seeds, directory) for seeds in experiments.values()]
    environment = Environment(
        loader=PackageLoader("masktune_utils.runner", "."), autoescape=True
    )
    page = environment.get_template("report.html.jinja").render(
        sections=sections, versions=_versions()
    )
    path = directory / "results" / "report.html"
    write_bytes(path, page.encode())
    return path


def _section(table: pd.DataFrame, seeds: list[Settings], directory: Path) -> dict:
    """What the page says of one experiment."""
    settings = seeds[0]
    rows = results.compare(table, settings)
    groups = [name for name in rows if name.startswith("group ")]
    by_group = results.summarize(rows, ["model"], groups).drop(columns="seeds").T
    by_group.index = by_group.index.str.removeprefix("group ")
    of_experiment = table[table["experiment"] == settings.experiment]
    of_experiment = of_experiment.assign(model=results.names(of_experiment))
    everything = results.summarize(of_experiment, ["configuration", "model"])
    reasons = {}
    notebooks = {}
    for base in seeds:
        choice = results.current_choice(base)
        if choice:
            reasons[base.seed] = choice["reason"]
        for path in sorted(base.folder("runs").glob("*.ipynb")):
            target = path.relative_to(directory).as_posix()
            notebooks[f"seed {base.seed}: {path.stem}"] = f"../{target}"
    return {
        "title": settings.title,
        "reasons": reasons,
        "headline": _html(results.summarize(rows, ["model"])),
        "groups": _html(by_group),
        "pictures": _pictures(settings),
        "everything": _html(everything.droplevel("configuration")),
        "settings": _unusual(settings),
        "notebooks": notebooks,
    }


def _html(table: pd.DataFrame) -> str:
    """A table as HTML, in which names are escaped."""
    return table.rename_axis(index=None, columns=None).to_html(escape=True, border=0)


def _pictures(settings: Settings) -> list[dict[str, str]]:
    pictures = []
    for name, caption in PICTURES.items():
        path = settings.folder("figures") / f"{name}.png"
        if path.exists():
            content = base64.b64encode(path.read_bytes()).decode()
            pictures.append({"caption": caption, "content": content})
    return pictures


def _unusual(settings: Settings) -> dict[str, Any]:
    """The settings of the base models, but for the seed, that are not the defaults."""
    unusual = {}
    for name, value in settings.identity(base=True).items():
        if name != "seed" and value != DEFAULTS[name]:
            unusual[name] = value
    return unusual


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = version(name)
    return versions
