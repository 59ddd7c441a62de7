"""The tables of a part: what is kept, and what it costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study.hypotheses import Verdict
from benchmarks.study.intervals import Estimate
from benchmarks.study.jobs import JOBS
from benchmarks.study.outcomes import (
    DEGENERATE,
    LOG_ODDS,
    OVER_REFUSAL,
    REFUSAL,
    SECOND_JUDGE,
    TASK,
    Measure,
    Outcomes,
    by_block,
    values,
)
from benchmarks.study.paper import PAPER, PaperFigure
from benchmarks.study.plan import Part
from benchmarks.study.preset import Standing

NOT_RUN = "not run"

#: A cell that has nothing to say.
NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells of Markdown, row by row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A table with the first column to the left and the others to the right."""
        lines = [self.header, ["---", *["---:"] * (len(self.header) - 1)], *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def estimate_cell(estimate: Estimate, rate: bool) -> str:
    """A mean and, on a second line, its 95% interval."""
    if rate:
        low, high = estimate.rate_interval
        return f"{100 * estimate.mean:.0f}%<br>{100 * low:.0f} to {100 * high:.0f}"
    low, high = estimate.interval
    return f"{estimate.mean:.1f}<br>{low:.1f} to {high:.1f}"


def _measured(measure: Measure) -> Callable[[dict[int, dict]], str]:
    return lambda runs: estimate_cell(Estimate.of(values(runs, measure)), measure.rate)


def kept_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Refusal, over-refusal, degenerate replies and task, with the paper's figures beside them."""
    paper = _paper(part, job)

    def from_paper(cell: Callable[[PaperFigure], float]) -> Callable[[str], str]:
        return lambda name: f"{cell(paper[name]):.0f}%" if name in paper else NONE

    columns: list[tuple[str, Callable]] = [
        ("refuses malicious", _measured(REFUSAL)),
        ("paper", from_paper(lambda figure: figure.refusal)),
        ("second judge", _measured(SECOND_JUDGE)),
        ("log-odds", _measured(LOG_ODDS)),
        ("refuses benign", _measured(OVER_REFUSAL)),
        ("degenerate", lambda runs: f"{100 * values(runs, DEGENERATE).mean():.0f}%"),
        ("task", _measured(TASK)),
        ("paper", from_paper(lambda figure: figure.task)),
    ]
    columns = [(header, cell) for header, cell in columns if header != "paper" or paper]
    rows = []
    for method in part.methods:
        runs = outcomes.of(part, job, method.name)
        cells = [cell(method.name) if header == "paper" else cell(runs) if runs else NONE for header, cell in columns]
        rows.append([method.label, *(cells if runs else [NOT_RUN, *cells[1:]])])
    return Table(["method", *(header for header, _ in columns)], rows)


def _paper(part: Part, job: str) -> dict[str, PaperFigure]:
    """The paper's figures on a part's methods; a part that serves for choices is not compared."""
    known = PAPER.get(job, {}) if part.split == "held_out" else {}
    found = {method.name: known[method.name] for method in part.methods if method.name in known}
    return found if len(found) > 1 else {}


def paper_tables(part: Part, job: str) -> list[str]:
    """The tables of the paper that the figures beside a part's are from."""
    return sorted({figure.table for figure in _paper(part, job).values()})


def cost_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Perplexity, drift, displacement, time, memory and seeds."""
    columns: list[tuple[str, Callable[[dict[int, dict]], str]]] = [
        ("perplexity", lambda runs: f"{_mean(run['perplexity'] for run in runs.values()):.1f}"),
        ("cosine", lambda runs: over_blocks(runs, "drift", "cosine", "{:.3f}")),
        ("shift", lambda runs: over_blocks(runs, "drift", "malicious_shift", "{:+.2f}")),
        ("off r", lambda runs: over_blocks(runs, "displacement", "off", "{:.2f}")),
        ("share along r", lambda runs: over_blocks(runs, "displacement", "direction_share", "{:.1%}")),
        ("time", time_cell),
        ("memory", _memory),
        ("seeds", lambda runs: seeds_cell(runs, part)),
    ]
    return by_method(part, job, outcomes, columns)


def by_method(
    part: Part, job: str, outcomes: Outcomes, columns: Sequence[tuple[str, Callable[[dict[int, dict]], str]]]
) -> Table:
    """One row per method of a part; a column is a header, and what it says of a method's runs."""
    rows = []
    for method in part.methods:
        runs = outcomes.of(part, job, method.name)
        rows.append(
            [method.label, *([cell(runs) for _, cell in columns] if runs else [NOT_RUN, *[NONE] * (len(columns) - 1)])]
        )
    return Table(["method", *(header for header, _ in columns)], rows)


def seeds_cell(runs: dict[int, dict], part: Part) -> str:
    """How many of a part's seeds have a run."""
    if any(run["train_seconds"] for run in runs.values()):
        return f"{len(runs)} of {len(part.seeds)}"
    return NONE


def _mean(numbers) -> float:
    return float(np.mean(list(numbers)))


def over_blocks(runs: dict[int, dict], group: str, name: str, form: str) -> str:
    """The mean over the blocks that have a direction."""
    known = [value for value in by_block(runs, group, name) if not np.isnan(value)]
    return form.format(np.mean(known)) if known else NONE


def time_cell(runs: dict[int, dict]) -> str:
    """From the shortest to the longest: runs are not timed in turns, and other work on the machine shows."""
    known = [run["train_seconds"] for run in runs.values() if run["train_seconds"]]
    if not known:
        return NONE
    shortest, longest = f"{min(known):.0f}", f"{max(known):.0f}"
    return f"{shortest} s" if shortest == longest else f"{shortest} to {longest} s"


def _memory(runs: dict[int, dict]) -> str:
    known = [peak for run in runs.values() if (peak := run.get("peak_memory_mb"))]
    return f"{np.mean(known) / 1024:.2f} GB" if known else NONE


def verdict_table(verdicts: Sequence[Verdict]) -> Table:
    """One row per hypothesis and measure."""
    return Table(
        ["hypothesis", "measure", "difference", "by seed", "p", "verdict"],
        [[verdict.hypothesis.claim, verdict.measure.label, *_verdict_cells(verdict)] for verdict in verdicts],
    )


def preset_table(candidates: Sequence[Standing], chosen: Standing | None, confirmed: Sequence[Standing]) -> Table:
    """One row per candidate, and then the chosen one on held-out prompts, one row per job."""

    def row(standing: Standing) -> list[str]:
        label = f"**{standing.method.label}**" if chosen and standing.method == chosen.method else standing.method.label
        return [
            label,
            f"{standing.part.split.replace('_', '-')}, {JOBS[standing.job].label}",
            f"{standing.kept:.0%}",
            f"{100 * standing.task:+.0f}",
            "yes" if standing.meets_both else "no",
        ]

    return Table(
        ["settings", "measured on", "refusals, of the start's", "task, minus plain's", "meets both criteria"],
        [row(standing) for standing in (*candidates, *confirmed)],
    )


def _verdict_cells(verdict: Verdict) -> list[str]:
    if verdict.difference is None:
        return [NONE, NONE, NONE, f"{verdict}"]
    low, high = verdict.difference.interval
    scale, form = (100, "{:+.0f}") if verdict.measure.rate else (1, "{:+.2f}")
    difference, *ends = (form.format(scale * value) for value in (verdict.difference.mean, low, high))
    return [
        f"{difference}<br>{ends[0]} to {ends[1]}",
        ", ".join(form.format(scale * value) for value in verdict.by_seed),
        "< 0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}",
        f"**{verdict}**",
    ]
