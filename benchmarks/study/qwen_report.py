"""``python -m benchmarks.study.qwen_report``: the page of a model that others aligned, from the runs that are there."""

from __future__ import annotations

import sys
from functools import partial

from benchmarks.study.budget_page import BudgetPage
from benchmarks.study.budgets import BUDGETS
from benchmarks.study.hard_report import evidence

PAGE = BudgetPage(
    "qwen",
    "qwen_report",
    "Results: a model that others aligned",
    "Qwen2.5-Coder-0.5B-Instruct as its makers published it, trained as in [the hard parts](hard-results.md).",
    more=partial(evidence, BUDGETS["qwen"]),
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
