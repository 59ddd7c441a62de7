"""A comparison, in the terminal."""

from __future__ import annotations

from textwrap import shorten

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from procon.errors import printable
from procon.report.comparison import Comparison, Difference

#: Prompts whose verdicts flipped that are shown, of each rate; and characters of one.
_SHOWN, _WIDTH = 3, 60

#: Characters of a setting's value.
_VALUE = 34


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Print it: rates, figures, flipped verdicts, settings."""
    console = console or Console()
    first, second = comparison.labels
    console.print(Text(f"A  {printable(first)}\nB  {printable(second)}"))
    if comparison.differences:
        for row in comparison.differences:
            if row.unlike:
                names = printable(", ".join(row.unlike))
                console.print(Text(f"Not measured alike ({names}), so without an interval: {row.name}."))
        rates = Table("", "A", "B", "B - A, in points", box=box.SIMPLE_HEAD, pad_edge=False)
        for row in comparison.differences:
            rates.add_row(row.name, str(row.before), str(row.after), _points(row))
        console.print(rates, Text(_caption(comparison), style="dim"), sep="\n")
    else:
        console.print("No rates to compare: one of the two has no evaluation.")
    figures = Table("", "A", "B", box=box.SIMPLE_HEAD, pad_edge=False)
    for name, pair in comparison.figures.items():
        if pair != (None, None):
            figures.add_row(name, *("-" if value is None else f"{value:.4g}" for value in pair))
    if figures.row_count:
        console.print(figures)
    for row in comparison.differences:
        if row.paired:
            _print_flips(row, console)
    _print_settings(comparison, console)


def _print_settings(comparison: Comparison, console: Console) -> None:
    if comparison.settings:
        table = Table("setting", "A", "B", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, pair in comparison.settings.items():
            values = ("-" if value is None else shorten(printable(str(value)), _VALUE) for value in pair)
            table.add_row(*(Text(text) for text in (printable(name), *values)))
        console.print(table)
    if not comparison.known:
        console.print("\nSettings of training are not compared: at least one of the two does not say them.")
    elif not comparison.settings:
        console.print("\nNo setting differs.")


def _points(row: Difference) -> str:
    if row.interval is None:
        return f"{100 * row.value:+.0f}"
    low, high = row.interval
    return f"{100 * row.value:+.0f} ({100 * low:+.0f} to {100 * high:+.0f})"


def _print_flips(row: Difference, console: Console) -> None:
    gained = sum(flip.after for flip in row.flips)
    console.print(Text(f"{row.name}: {gained} prompts from no to yes, {len(row.flips) - gained} from yes to no"))
    for flip in row.flips[:_SHOWN]:
        change = "no to yes" if flip.after else "yes to no"
        console.print(Text(f"  {change}: {shorten(printable(flip.prompt), _WIDTH, placeholder=' ...')}"))


def _caption(comparison: Comparison) -> str:
    text = "In brackets: the 95% interval over prompts, not over seeds."
    apart = [row.name for row in comparison.differences if not row.paired and not row.unlike]
    return f"{text} Prompts differ, so intervals are not of pairs: {', '.join(apart)}." if apart else text
