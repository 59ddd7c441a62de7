"""The tables of a part: what is kept, and what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.study.hypotheses import Verdict
from benchmarks.study.intervals import Estimate
from benchmarks.study.outcomes import (
    COMPLIES,
    DEGENERATE,
    FRESH_OVER_REFUSAL,
    FRESH_REFUSAL,
    LOG_ODDS,
    OVER_REFUSAL,
    REFUSAL,
    SECOND_JUDGE,
    TASK,
    Measure,
    Outcomes,
    are_of,
    by_block,
    values,
)
from benchmarks.study.paper import PAPER, PaperFigure
from benchmarks.study.plan import Part

#: In what methods are compared with one of them.
BESIDE = {"refuses malicious": REFUSAL, "log-odds": LOG_ODDS, "task": TASK}

#: A cell that has nothing to say.
NONE = "-"


@dataclass(frozen=True)
class Table:
    """Cells of Markdown, row by row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """A table with its numbers to the right, and all else to the left."""
        columns = range(len(self.header))
        rule = ["---:" if column and self._has_numbers(column) else "---" for column in columns]
        lines = [self.header, rule, *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def _has_numbers(self, column: int) -> bool:
        return all(row[column] in (NONE, "") or _NUMBER.match(row[column]) for row in self.rows)


#: What a cell with a number begins with.
_NUMBER = re.compile(r"[*<+-]* ?[\d.]*\d")


def folded(summary: str, *parts: str) -> str:
    """What a reader opens, as Markdown within a tag of HTML; nothing without parts."""
    there = [part for part in parts if part]
    return "\n\n".join([f"<details markdown><summary>{summary}</summary>", *there, "</details>"]) if there else ""


def estimate_cell(estimate: Estimate, rate: bool) -> str:
    """A mean and, on a second line, its 95% interval."""
    if rate:
        low, high = estimate.rate_interval
        return f"{100 * estimate.mean:.0f}%<br>[{100 * low:.0f}, {100 * high:.0f}]"
    low, high = estimate.interval
    return f"{estimate.mean:.1f}<br>[{low:.1f}, {high:.1f}]"


def measured(measure: Measure) -> Callable[[dict[int, dict]], str]:
    """What a cell says of a method's runs; nothing if they have no such measure."""
    return lambda runs: (
        estimate_cell(Estimate.of(values(runs, measure)), measure.rate) if are_of(runs, measure) else NONE
    )


def kept_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """What counts: refusals, over-refusals and the task."""
    measures = {"refuses malicious": REFUSAL, "refuses benign": OVER_REFUSAL, "task": TASK}
    return by_method(part, job, outcomes, [(header, measured(measure)) for header, measure in measures.items()])


def fresh_table(part: Part, job: str, outcomes: Outcomes) -> Table | None:
    """What is kept on the second set of prompts, and what is served in spite of a refusal; None without either."""
    measures = {
        "second set malicious": FRESH_REFUSAL,
        "second set benign": FRESH_OVER_REFUSAL,
        "complies": COMPLIES,
    }
    found = [outcomes.of(part, job, method.name) for method in part.methods]
    known = {
        header: measure for header, measure in measures.items() if any(runs and are_of(runs, measure) for runs in found)
    }
    if not known:
        return None

    return by_method(part, job, outcomes, [(header, measured(measure)) for header, measure in known.items()])


def judged_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """What else is known of the replies."""
    columns = [("second judge", measured(SECOND_JUDGE)), ("log-odds", measured(LOG_ODDS))]
    columns.append(("degenerate", lambda runs: f"{100 * values(runs, DEGENERATE).mean():.0f}%"))
    return by_method(part, job, outcomes, columns)


def paper_table(part: Part, job: str) -> Table | None:
    """The paper's figures on a part's methods; None if it has none."""
    paper = _paper(part, job)
    rows = [
        [method.label, f"{paper[method.name].refusal:.0f}%", f"{paper[method.name].task:.0f}%"]
        for method in part.methods
        if method.name in paper
    ]
    return Table(["in the paper", "refuses malicious", "task"], rows) if rows else None


def _paper(part: Part, job: str) -> dict[str, PaperFigure]:
    """The paper's figures on a part's methods; a part that serves for choices is not compared."""
    known = PAPER.get(job, {}) if part.split == "held_out" else {}
    found = {method.name: known[method.name] for method in part.methods if method.name in known}
    return found if len(found) > 1 else {}


def paper_sources(part: Part, job: str) -> list[str]:
    """The tables of the paper that the figures beside a part's are from."""
    return sorted({figure.table for figure in _paper(part, job).values()})


def moved_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Drift and displacement."""
    columns: list[tuple[str, Callable[[dict[int, dict]], str]]] = [
        ("cosine", lambda runs: over_blocks(runs, "drift", "cosine", "{:.3f}")),
        ("shift", lambda runs: over_blocks(runs, "drift", "malicious_shift", "{:+.2f}")),
        ("off r", lambda runs: over_blocks(runs, "displacement", "off", "{:.2f}")),
        ("share along r", lambda runs: over_blocks(runs, "displacement", "direction_share", "{:.1%}")),
    ]
    return by_method(part, job, outcomes, columns)


def cost_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Perplexity, time, memory and seeds."""
    columns: list[tuple[str, Callable[[dict[int, dict]], str]]] = [
        ("perplexity", lambda runs: f"{_mean(run['perplexity'] for run in runs.values()):.1f}"),
        ("time", time_cell),
        ("memory", _memory),
        ("seeds", seeds_cell),
    ]
    return by_method(part, job, outcomes, columns)


def by_method(
    part: Part, job: str, outcomes: Outcomes, columns: Sequence[tuple[str, Callable[[dict[int, dict]], str]]]
) -> Table:
    """One row per method of a part that has runs; a column is a header, and what it says of a method's runs."""
    rows = [
        [method.label, *(cell(runs) for _, cell in columns)]
        for method in part.methods
        if (runs := outcomes.of(part, job, method.name))
    ]
    return Table(["method", *(header for header, _ in columns)], rows)


def seeds_cell(runs: dict[int, dict]) -> str:
    """How many seeds; an untrained model has none."""
    return f"{len(runs)}" if any(run["train_seconds"] for run in runs.values()) else NONE


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
    return _of_verdicts(verdicts, "difference", "verdict")


def evidence_table(verdicts: Sequence[Verdict]) -> Table:
    """What the verdicts rest on."""
    return _of_verdicts(verdicts, "by seed", "p")


def _of_verdicts(verdicts: Sequence[Verdict], *headers: str) -> Table:
    rows = []
    for verdict in verdicts:
        cells = _verdict_cells(verdict)
        rows.append([verdict.hypothesis.claim, verdict.measure.label, *(cells[header] for header in headers)])
    return Table(["hypothesis", "measure", *headers], rows)


def _verdict_cells(verdict: Verdict) -> dict[str, str]:
    if verdict.difference is None:
        return {"difference": NONE, "by seed": NONE, "p": NONE, "verdict": f"{verdict}"}
    cells = {
        "difference": difference_cell(verdict.difference, verdict.measure),
        "by seed": ", ".join(_signed(value, verdict.measure) for value in verdict.by_seed),
    }
    if verdict.p is None:
        return {**cells, "p": NONE, "verdict": f"{verdict}"}
    return {**cells, "p": "< 0.001" if verdict.p < 0.001 else f"{verdict.p:.3f}", "verdict": f"**{verdict}**"}


def difference_cell(difference: Estimate, measure: Measure) -> str:
    """A difference and, on a second line, its 95% interval; of rates, in percentage points."""
    mean, low, high = (_signed(value, measure) for value in (difference.mean, *difference.interval))
    return f"{mean}<br>[{low}, {high}]"


def _signed(value: float, measure: Measure) -> str:
    return f"{100 * value:+.0f}" if measure.rate else f"{value:+.2f}"


def beside_table(part: Part, job: str, outcomes: Outcomes, rival: str) -> Table:
    """What each trained method keeps beyond ``rival``, on the same prompts and the seeds that both have."""
    other = outcomes.of(part, job, rival)
    rows = []
    for method in part.methods:
        runs = outcomes.of(part, job, method.name)
        seeds = sorted(set(runs) & set(other))
        if not method.length or method.name == rival or not seeds:
            continue
        cells = []
        for measure in BESIDE.values():
            ours, theirs = (values({seed: side[seed] for seed in seeds}, measure) for side in (runs, other))
            cells.append(difference_cell(Estimate.of(ours - theirs), measure))
        rows.append([method.label, *cells])
    return Table(["method", *BESIDE], rows)
