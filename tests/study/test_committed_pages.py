"""The pages of results are, byte for byte, what their commands make of the run files that are there."""

from pathlib import Path

import pytest

from benchmarks.study import anchors_report, hard_report, hold_report, qwen_report, report
from benchmarks.study.budget_page import BudgetPage

DOCS = Path(__file__).parents[2] / "docs"
RUNS = Path(__file__).parents[2] / "benchmarks" / "study" / "runs"


def differing(made: Path) -> list[str]:
    """What is not in the documentation as it is in ``made``."""
    files = {path.relative_to(made) for path in made.rglob("*") if path.is_file()}
    assert files
    return [str(name) for name in sorted(files) if (made / name).read_bytes() != (DOCS / name).read_bytes()]


def test_results(tmp_path):
    assert report.main(["--output", str(tmp_path)]) == 0
    assert differing(tmp_path) == []
    assert {path.name for path in (tmp_path / report.FIGURES).iterdir()} == {
        path.name for path in (DOCS / report.FIGURES).iterdir()
    }


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
        for module in (anchors_report, hold_report, hard_report, qwen_report)
    ],
)
def test_pages_of_budgets(page: BudgetPage, tmp_path):
    assert page.main(["--output", str(tmp_path)]) == 0
    assert differing(tmp_path) == []
    assert {path.name for path in (tmp_path / page.figures).iterdir()} == {
        path.name for path in (DOCS / page.figures).iterdir()
    }
