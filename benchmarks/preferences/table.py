"""What each method learned, and what it did to the model."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.preferences.learned import PROGRESS, REWARD
from benchmarks.study.intervals import Estimate
from benchmarks.study.outcomes import Outcomes, values
from benchmarks.study.plan import Part
from benchmarks.study.table import NONE, NOT_RUN, Table, by_method, over_blocks, seeds_cell, time_cell

_Runs = dict[int, dict]


def learned_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Progress by the log, and on held-out problems and pairs; no column that has nothing to say."""
    progress = PROGRESS[job]
    columns: list[tuple[str, Callable[[_Runs], str]]] = [
        (f"{progress.label} in training", lambda runs: f"{progress.final(runs):.2f}" if _trained(runs) else NONE),
        ("reward, held-out", _reward),
        ("pairs right, held-out", lambda runs: _of_pairs(runs, "accuracies", "{:.0%}")),
        ("margin, held-out", lambda runs: _of_pairs(runs, "margins", "{:.1f}")),
        ("KL in training", lambda runs: _logged(runs, "kl")),
    ]
    table = by_method(part, job, outcomes, columns)
    # What no method of this algorithm has is left out.
    shown = [i for i in range(len(columns) + 1) if i == 0 or any(row[i] not in (NONE, NOT_RUN) for row in table.rows)]
    return Table([table.header[i] for i in shown], [[row[i] for i in shown] for row in table.rows])


def moved_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Drift, time and seeds."""
    columns: list[tuple[str, Callable[[_Runs], str]]] = [
        ("cosine", lambda runs: over_blocks(runs, "drift", "cosine", "{:.3f}")),
        ("shift", lambda runs: over_blocks(runs, "drift", "malicious_shift", "{:+.2f}")),
        ("time", time_cell),
        ("seeds", lambda runs: seeds_cell(runs, part)),
    ]
    return by_method(part, job, outcomes, columns)


def _trained(runs: _Runs) -> bool:
    return all("history" in run for run in runs.values())


def _reward(runs: _Runs) -> str:
    found = Estimate.of(values(runs, REWARD))
    low, high = found.interval
    return f"{found.mean:.2f}<br>{low:.2f} to {high:.2f}"


def _of_pairs(runs: _Runs, name: str, form: str) -> str:
    found = [run["pairs"][name] for run in runs.values() if "pairs" in run]
    return form.format(np.mean(found)) if found else NONE


def _logged(runs: _Runs, key: str) -> str:
    """Over the seeds, what the log has last."""
    found = [run["history"][-1][key] for run in runs.values() if key in run.get("history", [{}])[-1]]
    return f"{np.mean(found):.2f}" if found else NONE
