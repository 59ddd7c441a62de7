"""``python -m benchmarks.study.anchors_report``: the page of sources of anchors, from the runs that are there."""

from __future__ import annotations

import sys

from benchmarks.study.anchor_parts import SBR, longer
from benchmarks.study.budget_page import BudgetPage

PAGE = BudgetPage(
    "anchors",
    "anchors_report",
    "Results: where anchors come from",
    "What is kept when the anchors are those of the training tokens, of a few probes, or of both, at the length of "
    "[the study](results.md) and at four times that.",
    rivals={
        "sources_long": longer(SBR).name,
        "sources": SBR.name,
        "sources_poisoned": SBR.name,
        "settings": longer(SBR).name,
    },
)

if __name__ == "__main__":
    sys.exit(PAGE.main())
