"""``python -m benchmarks.study.hold_report``: the page of a strength that sets itself, from the runs that are there."""

from __future__ import annotations

import sys

from benchmarks.study.budget_page import BudgetPage
from benchmarks.study.trace import trace_drawings

PAGE = BudgetPage(
    "hold",
    "hold_report",
    "Results: a strength that sets itself",
    "What is kept under `hold`, which sets alpha by how far the training tokens have moved, beside the fixed alpha of "
    "the defaults, at one, two and four times the length of [the study](results.md).",
    drawings=trace_drawings,
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
