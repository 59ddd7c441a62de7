"""What the page of results begins with: what a user should do, and what is kept where it is hard."""

from __future__ import annotations

from pathlib import Path

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.judge import load_judge
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.overview import overview_tables
from benchmarks.study.wording import OVERVIEW

#: What to do, in words; stands in the page as it is.
ADVICE = Path(__file__).parent / "advice.md"

#: By the name of its budget: a model, and the page that has all of it.
MODELS = {
    "hard": "SmolLM2-135M, which was taught to refuse for the study: [all of it](hard-results.md). Its start refuses "
    "one prompt less than further below, where another kernel computes attention.",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct, as its makers aligned it: [all of it](qwen-results.md).",
}


def front_sections(runs: Path) -> list[str]:
    """As Markdown; of ``runs``, a folder with one for each budget. A model without runs is left out."""
    tables: list[str] = []
    judge = load_judge(None, None)
    for name, words in MODELS.items():
        if any((runs / name).rglob("*.json")):
            outcomes = Outcomes.load(BUDGETS[name], runs / name, judge)
            tables += [words, *overview_tables(BUDGETS[name], outcomes)]
    advice = ADVICE.read_text(encoding="utf-8").strip()
    return [advice, "## Where it is hard", OVERVIEW, *tables] if tables else [advice]
