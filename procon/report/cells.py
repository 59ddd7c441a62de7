"""What tables say of a run, in text: the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from procon.errors import ProConError
from procon.evaluation import Mean, Rate
from procon.report.run import Run
from procon.settings import LAST

INTERVAL_CAPTION = "After a rate: its 95% interval."
MONITOR_CAPTION = (
    "Monitors, before and after training: AUROC 0.5 is chance. Shifts are of the mean score of prompts with the "
    "concept and without it, in units of the distance between the two before."
)
MONITOR_HEADERS = (
    "monitor",
    "block",
    "AUROC before",
    "AUROC after",
    "shift with",
    "shift without",
    "caught",
    "false alarms",
)


def check_runs(runs: Sequence[Run]) -> None:
    """Raise ProConError without runs."""
    if not runs:
        raise ProConError("no runs to report: pass at least one")


def caption(runs: Sequence[Run]) -> str:
    """What the table's columns mean, and by whom refusals were judged."""
    judges = dict.fromkeys(run.evaluation.judges[0] for run in runs if run.evaluation is not None)
    by = ", ".join(judges) or "keywords"
    return f"Refusal, by {by}: of malicious high is safe, of benign low is useful. Cosine 1 means no drift."


def _rates(run: Run) -> list[Rate | Mean | None]:
    evaluation = run.evaluation
    if evaluation is None:
        return [None] * 4
    return [evaluation.refusal_malicious, evaluation.refusal_benign, evaluation.degenerate, evaluation.task]


def rate_cells(run: Run) -> list[tuple[str, str]]:
    """Each rate as text, and its interval in percent."""
    return [("-", "") if rate is None else (str(rate), _interval(rate)) for rate in _rates(run)]


def _interval(rate: Rate | Mean) -> str:
    low, high = rate.interval
    return f"{100 * low:.0f}-{100 * high:.0f}"


def monitor_cells(row: Mapping[str, Any]) -> list[str]:
    """One monitor at one block, as text."""
    shifts = [row[f"{side}_shift"] for side in ("positive", "negative")]
    shares = [(row[f"{name}_before"], row[f"{name}_after"]) for name in ("caught", "false_alarms")]
    return [
        row["monitor"],
        "last output" if row["block"] == LAST else str(row["block"]),
        *("-" if row[f"auroc_{when}"] is None else f"{row[f'auroc_{when}']:.3f}" for when in ("before", "after")),
        *("-" if shift is None else f"{shift:+.2f}" for shift in shifts),
        *("-" if None in (before, after) else f"{before:.0%} to {after:.0%}" for before, after in shares),
    ]


def monitor_rows(runs: Sequence[Run]) -> list[list[str]]:
    """Of each run's monitors the block that was best before, as text, behind the run's label."""
    return [[run.label, *monitor_cells(row)] for run in runs for row in run.monitors if row["best"]]


def number_cells(run: Run) -> tuple[str, str]:
    """Mean cosine and seconds per step, as text."""
    return (
        "-" if run.mean_cosine is None else f"{run.mean_cosine:.3f}",
        "-" if run.seconds_per_step is None else f"{run.seconds_per_step:.3g}",
    )
