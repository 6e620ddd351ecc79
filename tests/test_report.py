"""The report: an executed notebook without its code, which opens offline."""

import re

from tiny_runs import tiny

from masktune_utils import results

pytest_plugins = ["tiny_runs"]


def test_a_run_writes_a_page_of_what_was_chosen_and_why(whole_run):
    folder = tiny(whole_run.directory).folder("results")
    path = folder / "report.html"
    assert f"report: {path}" in whole_run.printed
    page = path.read_text()
    choice = results.read_choice(folder / "chosen.json")
    start = choice["reason"].split(" of ")[0]
    assert f"{start} of " in page
    for name in ("top_k 0.1", "top_k 0.3", "Accuracy by class"):
        assert name in page
    assert "experiment.from_notebook" not in page  # no code


def test_the_page_needs_no_other_file_and_no_script(whole_run):
    path = tiny(whole_run.directory).folder("results") / "report.html"
    page = path.read_text()
    assert "<script" not in page
    sources = re.findall('src="(.*?)[,"]', page)
    assert {*sources} == {"data:image/png;base64"}
    assert not re.findall('<link [^>]*href="http', page)
    assert not re.findall(r"@import|url\(.?http", page)
