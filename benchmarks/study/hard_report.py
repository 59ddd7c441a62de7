"""``python -m benchmarks.study.hard_report``: the page of the hard parts, from the runs that are there."""

from __future__ import annotations

import sys

from benchmarks.study.budget_page import BudgetPage
from benchmarks.study.budgets import BUDGETS, PLAIN, PROCON_S
from benchmarks.study.gallery import Gallery
from benchmarks.study.hard_hypotheses import expected, held, judge_expected
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.prediction import prediction_sections
from benchmarks.study.step_cost import cost_sections
from benchmarks.study.table import evidence_table, folded, verdict_table
from benchmarks.study.wording import HOLM


def hard_sections(outcomes: Outcomes, figure: Gallery) -> list[str]:
    """Hypotheses with their verdicts, what a step costs, and whether drift predicts refusals."""
    verdicts = judge_expected(expected(PLAIN, PROCON_S), outcomes)
    run = sum(verdict.p is not None for verdict in verdicts)
    return [
        "## Hypotheses",
        f"Written down before the runs. Of {len(verdicts)}, {run} could be tested so far, and {held(verdicts)} held.",
        verdict_table(verdicts).markdown(),
        HOLM,
        folded("Seed by seed, and p", evidence_table(verdicts).markdown()),
        *cost_sections([method for part in BUDGETS["hard"].parts for method in part.methods]),
        *prediction_sections(outcomes, figure),
    ]


PAGE = BudgetPage(
    "hard",
    "hard_report",
    "Results: where it is hard",
    "Rivals of 2025 and 2026, long training, poison, other tasks, and a task against the start's habits.",
    more=hard_sections,
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
