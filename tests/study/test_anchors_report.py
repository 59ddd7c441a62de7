"""The page of a budget, from a study that is half done: sources of anchors."""

import re

import pytest

from benchmarks.study import anchors_report
from benchmarks.study.anchor_parts import BOTH, SBR, longer
from benchmarks.study.budgets import BUDGETS, PLAIN, START
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.table import beside_table

BUDGET = BUDGETS["anchors"]


@pytest.fixture
def outcomes(write, tmp_path) -> Outcomes:
    """Of the part at the study's length: two seeds of a rival, of which the others have one."""
    write("arithmetic", START, 0, 1.0, split="validation")
    for seed in (0, 1):
        write("arithmetic", SBR, seed, 0.75, split="validation", task=0.5)
    write("arithmetic", PLAIN, 0, 0.25, split="validation", task=0.75)
    write("arithmetic", BOTH, 1, 0.875, split="validation", task=0.5)

    class Agreeing:
        def refuses(self, replies):
            return [reply.startswith("no") for reply in replies]

    return Outcomes.load(BUDGET, tmp_path / "runs", Agreeing())


def test_methods_stand_beside_their_rival(outcomes):
    (part,) = (part for part in BUDGET.parts if part.name == "sources")
    rows = {row[0]: row[1:] for row in beside_table(part, "arithmetic", outcomes, SBR.name).rows}
    # The same prompts and seeds: neither the start nor what was not run is there.
    assert set(rows) == {PLAIN.label, BOTH.label}
    refusals, log_odds, task = rows[PLAIN.label]
    assert refusals.startswith("-50<br>")
    assert log_odds.startswith("-1.00<br>")
    assert task.startswith("+25<br>")
    assert rows[BOTH.label][0].startswith("+12<br>")


def test_page_has_what_was_run(outcomes, tmp_path):
    stale = tmp_path / "docs" / anchors_report.PAGE.figures / "stale.svg"
    stale.parent.mkdir(parents=True)
    stale.write_text("<svg/>")
    page = anchors_report.PAGE.write(BUDGET, outcomes, tmp_path / "docs")
    text = page.read_text()
    assert text.startswith(f"# Results: where anchors come from\n\n{anchors_report.PAGE.generated}\n\n")
    assert f"Of the {len(BUDGET.cells())} runs that are planned, 5 are there" in text
    assert "## Where anchors come from\n" in text
    assert "## Where anchors come from, four times the steps" not in text
    assert f"Beside {SBR.label}, on the seeds that both have; rates in percentage points:" in text
    assert longer(PLAIN).label not in text
    (figure, *_) = re.findall(r"\((assets/anchors/[^)]+)\)", text)
    assert (page.parent / figure).is_file()
    assert not stale.exists()


def test_without_runs_the_command_is_named(tmp_path, capsys):
    report = anchors_report
    assert report.PAGE.main(["--runs", str(tmp_path)]) == 2
    assert f"make them with '{report.PAGE.runs_command}'" in capsys.readouterr().err
    assert report.PAGE.runs_command == f"python -m benchmarks.study --budget {report.PAGE.budget}"
    assert report.__name__ == f"benchmarks.study.{report.PAGE.module}"


def test_every_rival_is_in_its_part():
    parts = {part.name: {method.name for method in part.methods} for part in BUDGET.parts}
    assert set(anchors_report.PAGE.rivals) == set(parts)
    assert all(rival in parts[part] for part, rival in anchors_report.PAGE.rivals.items())
