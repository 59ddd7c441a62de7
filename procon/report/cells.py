"""What tables say of a run, in text: the same in the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence

from procon.errors import ProConError
from procon.evaluation import Mean, Rate
from procon.report.run import Run

INTERVAL_CAPTION = "After a rate: its 95% interval."


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


def number_cells(run: Run) -> tuple[str, str]:
    """Mean cosine and seconds per step, as text."""
    return (
        "-" if run.mean_cosine is None else f"{run.mean_cosine:.3f}",
        "-" if run.seconds_per_step is None else f"{run.seconds_per_step:.3g}",
    )
