"""The report: one HTML page, which opens in any browser, offline."""

import json
import re
from urllib.parse import unquote

from conftest import TINY
from tiny_runs import tiny

from masktune_utils import results
from masktune_utils.runner import command
from masktune_utils.runner.report import write_report
from masktune_utils.settings import Settings

pytest_plugins = ["tiny_runs"]


def test_a_run_writes_a_report_of_what_was_chosen_and_why(whole_run):
    path = whole_run.directory / "results" / "report.html"
    assert f"report: {path}" in whole_run.printed
    page = path.read_text()
    folder = tiny(whole_run.directory).folder("results")
    choice = results.read_choice(folder / "chosen.json")
    assert choice["reason"].replace("'", "&#39;") in page
    for name in ("top_k 0.1", "top_k 0.3", "class 1, no shortcut"):
        assert name in page
    assert "limit = 200" in page


def test_the_report_needs_no_other_file_and_no_network(whole_run):
    page = (whole_run.directory / "results" / "report.html").read_text()
    assert "http" not in page
    sources = re.findall('src="(.*?)[,"]', page)
    assert {*sources} <= {"data:image/png;base64"}


def test_the_links_of_the_report_lead_to_the_executed_notebooks(whole_run):
    path = whole_run.directory / "results" / "report.html"
    links = re.findall('href="(.*?)"', path.read_text())
    copies = {path.resolve() for path in whole_run.directory.glob("runs/*/*/*.ipynb")}
    targets = {(path.parent / unquote(link)).resolve() for link in links}
    assert len(targets) == len(links) > 5
    assert targets <= copies


def test_a_script_in_a_name_is_shown_as_text(tmp_path):
    settings = Settings(**TINY, directory=str(tmp_path))
    script = "<script>alert(1)</script>"
    row = dict.fromkeys(results.RESULT_KEYS, 0.5)
    row |= {"experiment": settings.experiment, "seed": 0, "configuration": "base"}
    row |= {"sha256": "of base", "base_sha256": "of base", f"group {script}": 0.5}
    folder = settings.folder("results")
    results.write_json(folder / "base.json", row)
    choice = dict.fromkeys([*results.CHOICE_KEYS, "accuracy"], script) | {
        "base_sha256": "of base"
    }
    (folder / "chosen.json").write_text(json.dumps(choice))
    page = write_report([settings]).read_text()
    assert script not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") == 2


def test_the_report_needs_no_images_and_is_of_all_seeds(tmp_path, monkeypatch):
    def gone(*_arguments):
        raise FileNotFoundError("images")

    monkeypatch.setattr("masktune_utils.data.load", gone)
    settings = Settings(**TINY, directory=str(tmp_path), seed=3)
    row = dict.fromkeys(results.RESULT_KEYS, 0.5)
    row |= {"experiment": settings.experiment, "seed": 3, "configuration": "base"}
    results.write_json(settings.folder("results") / "base.json", row)
    options = [f"--{name}={value}" for name, value in TINY.items()]
    directory = f"--directory={tmp_path}"
    assert command.main(["report", *options, directory, "--seed=3"]) == 0
    page = (tmp_path / "results" / "report.html").read_text()
    assert settings.title in page
    assert "limit = " in page
    assert "seed = 3" not in page


def test_the_report_of_nothing_is_a_page_too(tmp_path, capsys):
    options = ["--dataset", "mnist5k", "--directory", str(tmp_path)]
    assert command.main(["report", *options]) == 0
    path = tmp_path / "results" / "report.html"
    assert f"report: {path}" in capsys.readouterr().out
    assert "</html>" in path.read_text()
