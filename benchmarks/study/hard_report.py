"""``python -m benchmarks.study.hard_report``: the page of the hard parts, from the runs that are there."""

from __future__ import annotations

import sys

from benchmarks.study.anchor_parts import longer
from benchmarks.study.budget_page import BudgetPage
from benchmarks.study.budgets import BUDGETS, PLAIN, PROCON_S
from benchmarks.study.gallery import Gallery
from benchmarks.study.hard_hypotheses import expected, held, judge_expected
from benchmarks.study.hard_parts import LONG
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.overview import overview_tables
from benchmarks.study.plan import Budget
from benchmarks.study.prediction import prediction_sections
from benchmarks.study.step_cost import cost_sections
from benchmarks.study.table import evidence_table, folded, verdict_table
from benchmarks.study.wording import HOLM, KNOWN, OVERVIEW


def evidence(budget: Budget, outcomes: Outcomes, figure: Gallery) -> list[str]:
    """The hard table, hypotheses with their verdicts, and whether drift predicts refusals."""
    verdicts = judge_expected(expected(PLAIN, PROCON_S, budget), outcomes, budget)
    whole = sum(verdict.p is not None for verdict in verdicts)
    begun = [verdict for verdict in verdicts if verdict.seeds]
    waiting = [verdict for verdict in verdicts if not verdict.seeds]
    tables = overview_tables(budget, outcomes)
    return [
        *(["## The hard table in short", OVERVIEW, *tables] if tables else []),
        "## Hypotheses",
        f"Written down before the runs of this page. Of {len(verdicts)}, {whole} have all their runs, and of these "
        f"{held(verdicts)} held.",
        verdict_table(begun).markdown() if begun else "",
        HOLM,
        KNOWN[budget.model],
        folded("Seed by seed, and p", evidence_table(begun).markdown()) if begun else "",
        folded("Those that have no run yet", verdict_table(waiting).markdown()) if waiting else "",
        *prediction_sections(outcomes, figure),
    ]


def _with_cost(outcomes: Outcomes, figure: Gallery) -> list[str]:
    hard = BUDGETS["hard"]
    cost = cost_sections([method for part in hard.parts for method in part.methods])
    return [*evidence(hard, outcomes, figure), *cost]


PAGE = BudgetPage(
    "hard",
    "hard_report",
    "Results: where it is hard",
    "Rivals of 2025 and 2026, long training, poison, other tasks, and a task against the start's habits.",
    rivals={"habit": longer(PLAIN, LONG).name},
    more=_with_cost,
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
