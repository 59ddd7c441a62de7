"""The pages of results are, byte for byte, what their commands make of the run files that are there."""

from pathlib import Path

import pytest

from benchmarks.study import anchors_report, hard_report, qwen_report, report
from benchmarks.study.budget_page import BudgetPage

DOCS = Path(__file__).parents[2] / "docs"
RUNS = Path(__file__).parents[2] / "benchmarks" / "study" / "runs"


def check(made: Path, figures: str) -> None:
    """The documentation has what is in ``made`` as it is there, and no other figure beside it."""
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert files
    assert [str(name) for name in files if (made / name).read_bytes() != (DOCS / name).read_bytes()] == []
    assert {path.name for path in (made / figures).iterdir()} == {path.name for path in (DOCS / figures).iterdir()}


def test_results(tmp_path):
    assert report.main(["--output", str(tmp_path)]) == 0
    check(tmp_path, report.FIGURES)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(
            module.PAGE,
            id=module.PAGE.budget,
            marks=pytest.mark.skipif(
                not any((RUNS / module.PAGE.budget).rglob("*.json")), reason="the runs are not made yet"
            ),
        )
        for module in (anchors_report, hard_report, qwen_report)
    ],
)
def test_pages_of_budgets(page: BudgetPage, tmp_path):
    assert page.main(["--output", str(tmp_path)]) == 0
    check(tmp_path, page.figures)
