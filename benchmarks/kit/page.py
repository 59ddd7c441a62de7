"""The kit's page of results, from the runs that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from benchmarks.study.gallery import Gallery, save_drawings
from benchmarks.study.judge import load_judge
from benchmarks.study.made import how_made
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Budget
from benchmarks.study.report import part_sections
from procon.files import write_text

_FIGURES = "figures"


class Described(Protocol):
    """What the page says of how it was made."""

    model: str
    prompts: str | None
    judges: str | None


def write_page(asked: Described, budget: Budget, folder: Path) -> Path:
    """``results.md`` and its figures, in ``folder``.

    Raises:
        ProConError: if no run is there.
    """
    outcomes = Outcomes.load(budget, folder / "runs", load_judge(None, None), "python -m benchmarks.kit")
    figure = Gallery(_FIGURES)
    sections = [
        f"# {asked.model}: what defences keep",
        f"Prompts: {asked.prompts or 'the built-in held-out ones'}. Refusals are judged by "
        f"{asked.judges or 'keywords'}. Of the {len(budget.cells())} runs that are planned, {len(outcomes.runs)} are "
        "there. Below a mean is its 95% interval: for other seeds and prompts, or, of one seed, for other prompts "
        "alone.",
    ]
    for part in budget.parts:
        sections += part_sections(part, outcomes, figure, beside_paper=False)
    sections += ["## How this was made", how_made(outcomes.runs, ["python -m benchmarks.kit"])]
    save_drawings(figure.drawings, folder / _FIGURES)
    return write_text("\n\n".join(filter(None, sections)) + "\n", folder / "results.md")
