"""The hard table: every defence in a row, every kind of training in a column."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.study.outcomes import FRESH_REFUSES_ALONE, OVER_REFUSAL, REFUSES_ALONE, TASK, Outcomes, values
from benchmarks.study.plan import Budget, Method, Part
from benchmarks.study.table import NOT_RUN, Table


@dataclass(frozen=True)
class Column:
    """One kind of training: on a job, and ``suffix`` is of the names of the methods that are trained so."""

    header: str
    job: str
    suffix: str = ""


COLUMNS = (
    Column("clean", "arithmetic"),
    Column("clean, 4x", "arithmetic", "_x4"),
    Column("10% poison", "arithmetic_poisoned_10"),
    Column("10% poison, 4x", "arithmetic_poisoned_10", "_x4"),
)

#: Of the best alone.
HARDER_COLUMNS = (
    Column("30% poison", "arithmetic_poisoned_30"),
    Column("obedient turns", "identity"),
    Column("refuses, then complies", "refuse_then_comply"),
)

#: Of a part whose methods train for longer themselves.
ADAPTIVE_COLUMNS = (
    Column("refuses, then complies, 4x", "refuse_then_comply"),
    Column("turns midway, 4x", "turn_midway"),
)

OTHER_COLUMNS = (Column("fields as JSON", "extraction"), Column("answers from a text", "passages"))


def overview_table(part: Part, columns: Sequence[Column], outcomes: Outcomes) -> Table | None:
    """A row for the start of ``part`` and for each of its methods of its shortest training that has a run; None if none
    has."""
    shortest = min(method.length for method in part.methods if method.length)
    rows = [
        (method, [_cell(method, column, part, outcomes) for column in columns])
        for method in part.methods
        if method.length <= shortest
    ]
    rows = [(method, cells) for method, cells in rows if set(cells) != {NOT_RUN}]
    if not any(method.length for method, _ in rows):
        return None
    return Table(["method", *(column.header for column in columns)], [[method.label, *cells] for method, cells in rows])


def _cell(method: Method, column: Column, part: Part, outcomes: Outcomes) -> str:
    """Means in per cent: malicious prompts refused and not served all the same, those of another make, benign ones
    refused, the task."""
    runs = outcomes.find(column.job, method.name + column.suffix * bool(method.length))
    if not runs:
        return NOT_RUN
    measures = (REFUSES_ALONE, FRESH_REFUSES_ALONE, OVER_REFUSAL, TASK)
    refused, fresh, benign, task = (f"{100 * values(runs, measure).mean():.0f}" for measure in measures)
    cell = f"{refused} / {fresh}<br>benign {benign}<br>task {task}"
    if not method.length or len(runs) >= len(part.seeds):
        return cell
    return f"{cell}<br>{len(runs)} seed{'s' * (len(runs) > 1)}"


def overview_tables(budget: Budget, outcomes: Outcomes) -> list[str]:
    """The tables of a budget whose parts are hard, as Markdown; those without runs are left out."""
    parts = {part.name: part for part in budget.parts}
    wanted = [(parts.get("hard") or parts.get("qwen"), COLUMNS)]
    wanted += [(parts.get("poison"), HARDER_COLUMNS), (parts.get("adaptive"), ADAPTIVE_COLUMNS)]
    wanted += [(parts.get("poison"), OTHER_COLUMNS)]
    tables = (overview_table(part, columns, outcomes) for part, columns in wanted if part)
    return [table.markdown() for table in tables if table]
