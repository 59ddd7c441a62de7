"""Runs side by side: a table for the terminal, one HTML page with plots; two runs compared.

In: runs, each with an evaluation and a log, as objects or from the files and folders that they lie in.
Out: text, figures and a page that needs no other file; differences with their intervals.
May import: ``evaluation`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("report", __name__)

from procon.report.comparison import Comparison, compare_runs
from procon.report.comparison_table import print_comparison
from procon.report.html import write_html
from procon.report.plots import (
    plot_drift_by_block,
    plot_drift_by_step,
    plot_loss_and_penalty,
    plot_rates,
    plot_rates_by_step,
)
from procon.report.run import Run
from procon.report.sources import Source, read_source, read_sources
from procon.report.terminal import print_table

__all__ = [
    "Comparison",
    "Run",
    "Source",
    "compare_runs",
    "plot_drift_by_block",
    "plot_drift_by_step",
    "plot_loss_and_penalty",
    "plot_rates",
    "plot_rates_by_step",
    "print_comparison",
    "print_table",
    "read_source",
    "read_sources",
    "write_html",
]
