"""Runs side by side, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from procon.errors import printable
from procon.report.cells import (
    INTERVAL_CAPTION,
    caption,
    check_runs,
    number_cells,
    rate_cells,
)
from procon.report.run import Run


def print_table(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print one row per run. If the 95% intervals fit too, they stand beside the rates.

    Args:
        console: where to print; the standard output if not given, as wide as the table needs when that is no terminal.

    Raises:
        ProConError: without runs.
    """
    check_runs(runs)
    detailed = _table(runs, intervals=True)
    needed = Console(width=10_000).measure(detailed).maximum
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=max(110, console.width, needed))
    if needed <= console.width:
        console.print(detailed, Text(printable(f"{caption(runs)} {INTERVAL_CAPTION}"), style="dim"), sep="\n")
    else:
        console.print(_table(runs, intervals=False), Text(printable(caption(runs)), style="dim"), sep="\n")


def _table(runs: Sequence[Run], *, intervals: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold", min_width=8)
    for header in (
        "refusal of\nmalicious",
        "refusal of\nbenign",
        "degenerate\nreplies",
        "task\naccuracy",
        "mean\ncosine",
        "seconds\nper step",
    ):
        table.add_column(header, justify="right", no_wrap=True)
    for run in runs:
        rates = [Text(text).append(f" {interval}" if intervals else "", "dim") for text, interval in rate_cells(run)]
        table.add_row(Text(printable(run.label)), *rates, *map(Text, number_cells(run)))
    return table
