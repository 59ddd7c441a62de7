"""The study's pages, from a study that is half done."""

import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
from made_up_runs import BUDGET, PLAIN, SAFE, START, Echo, load_runs, write_strengths, writer

from benchmarks.study import report
from benchmarks.study.outcomes import Outcomes


@pytest.fixture(scope="module")
def half_done(tmp_path_factory) -> Path:
    """The runs of a study that is half done, and its report."""
    folder = tmp_path_factory.mktemp("half_done")
    write = writer(folder / "runs")
    write("arithmetic", START, 0, 1.0)
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5)
        write("arithmetic", SAFE, seed, 0.75, task=0.25)
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.25, 0.75])
    stale = folder / "docs" / report.FIGURES / "stale.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "DISCUSSION", folder / "discussion.md")
        report.write_report(BUDGET, "table", load_runs(folder / "runs"), folder / "docs", "by an echo")
    return folder


@pytest.fixture
def pages(half_done, tmp_path, monkeypatch) -> Path:
    """The report, and beside it the runs, in folders that a test may change."""
    shutil.copytree(half_done, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(report, "DISCUSSION", tmp_path / "discussion.md")
    return tmp_path / "docs"


def test_page_has_each_part_that_was_run(pages):
    text = (pages / "results.md").read_text()
    assert "## What is kept\n" in text
    assert "## By strength\n" in text
    assert "Measured on the validation prompts" in text
    assert "## The control\n" not in text
    assert "### Arithmetic with 3% compliant answers" not in text
    assert (
        f"Of the {len(BUDGET.cells())} runs that the budget `table` plans, 16 are there, made from 2026-01-01" in text
    )
    assert "box (16 runs)" in text
    assert "judged by an echo" in text
    # 16 runs of 100 s of training, but for the start, each 200 s in all.
    assert f"Hours: {16 * 200 / 3600:.1f}, of which {15 * 100 / 3600:.1f} were training" in text


def test_pages_say_that_they_are_generated(pages):
    assert (pages / "results.md").read_text().startswith(f"# Results\n\n{report.GENERATED}\n\n")
    assert (pages / "report.html").read_text().count(report.GENERATED) == 1
    assert re.fullmatch("<!-- .*python -m benchmarks.study.report.* -->", report.GENERATED)


def test_page_has_the_verdicts(pages):
    text = (pages / "results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| plain fine-tuning loses refusals |")]
    assert len(lines) == 4  # by two measures, and the same seed by seed
    assert all(line.endswith("| **held** |") for line in lines[:2])
    assert "+50<br>" in lines[0]
    assert "+50, +50, +50" in lines[2]
    assert re.search(r"\| the refusal direction keeps more .*: alpha 0\.1 \| refusals \| .* \| not run \|", text)


def test_page_begins_with_what_a_user_should_know(pages, write, load):
    """Then a figure, then what it means and what it does not show; tables come after."""
    text = (pages / "results.md").read_text()
    first = text.split("\n\n")[2]
    assert first.startswith("A small chat model that refuses 100% of malicious prompts refuses **50%** after plain")
    assert "ProCon, at its defaults" not in first  # not run
    marks = [first, f"({report.FIGURES}/headline.svg)", "## What this does not show", "| hypothesis |", "### Benign"]
    assert sorted(marks, key=text.index) == marks
    for seed in range(3):
        write("arithmetic", replace(PLAIN, name="procon_s"), seed, 0.875, task=0.75)
    assert "it still refuses **88%**, and it solves 75% of the task, against 50%" in report.headline(
        Outcomes((*load().runs, *_runs_of(pages.parent, "procon_s")))
    )


def _runs_of(folder: Path, method: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in (folder / "runs").rglob("*.json") if method in str(path)]


def test_every_figure_is_a_file_and_nothing_else(pages):
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (pages / "results.md").read_text())
    there = sorted(str(path.relative_to(pages)) for path in (pages / report.FIGURES).iterdir())
    assert sorted(shown) == there
    assert [Path(name).stem for name in there] == [
        "headline",
        "prediction",
        "strength-arithmetic-strength",
        "table-arithmetic-drift",
        "table-arithmetic-front",
        "where-drift-lies",
    ]
    for name in there:
        svg = (pages / name).read_text()
        assert ElementTree.fromstring(svg).tag == "{http://www.w3.org/2000/svg}svg"
        assert "#010203" not in svg
        assert "#040506" not in svg
        assert len(svg) < 100_000


def test_html_needs_nothing_from_elsewhere(pages):
    html = (pages / "report.html").read_text()
    assert html.count("<svg") == 6
    assert "<img" not in html
    assert "<script" not in html
    # Verdicts twice; of two parts what is kept, judged, moved and what it costs; of one the paper's; what predicts.
    assert html.count("<table") == 2 + 2 * 4 + 1 + 1
    assert "<td" in html
    assert re.findall(r'(?:href|src)="(?!#)([^"]+)"', html) == ["https://arxiv.org/abs/2509.06795"]
    identifiers = re.findall(r'\bid="([^"]+)"', html)
    assert len(identifiers) == len(set(identifiers))


def test_words_of_links_stay_where_the_pages_are_not(pages, load):
    text = "## What it means\n\n[The cost page](cost.md#timed), [below](#there), ![a plot](a/b.svg).\n"
    html = report.to_html(text, [])
    assert '<p>The cost page, <a href="#there">below</a>, <img' in html


def test_columns_of_words_are_to_the_left(pages):
    text = (pages / "results.md").read_text()
    assert "| hypothesis | measure | difference | verdict |\n| --- | --- | ---: | --- |" in text
    assert "| method | refuses malicious | refuses benign | task |\n| --- | ---: | ---: | ---: |" in text


def test_two_reports_are_equal(pages, load, tmp_path):
    report.write_report(BUDGET, "table", load(), tmp_path / "again", "by an echo")
    for path in pages.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(pages)).read_bytes()


def test_discussion_stands_in_the_page_as_it_is(pages, load):
    text = "## What it means\n\nSomething *else*, at 5 < 6.\n"
    assert "## What it means" not in (pages / "results.md").read_text()
    report.DISCUSSION.write_text(text)
    written, _ = report.compose(BUDGET, "table", load(), "by an echo")
    assert written.index(text.strip()) < written.index("## What this does not show")


def test_command(pages, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report, "load_judge", lambda endpoint, model: Echo())
    monkeypatch.setitem(report.BUDGETS, "table", BUDGET)
    assert report.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("results.md", "report.html")]
    assert report.main(["--runs", str(tmp_path / "empty"), "--output", str(tmp_path / "out")]) == 2
    assert "there are no runs in" in capsys.readouterr().err
    assert report.main(["--budget", "tabel"]) == 2
    assert "budget is 'tabel': choose one of" in capsys.readouterr().err
