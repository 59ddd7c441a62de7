"""Runs side by side: a table for the terminal, one HTML page with plots.

In: runs, each with an evaluation and a log.
Out: text, figures and a page that needs no other file.
May import: ``evaluation`` and the leaves.
"""

from procon.report.html import write_html
from procon.report.plots import (
    plot_drift_by_block,
    plot_drift_by_step,
    plot_loss_and_penalty,
    plot_rates,
    plot_rates_by_step,
)
from procon.report.run import Run
from procon.report.terminal import print_table

__all__ = [
    "Run",
    "plot_drift_by_block",
    "plot_drift_by_step",
    "plot_loss_and_penalty",
    "plot_rates",
    "plot_rates_by_step",
    "print_table",
    "write_html",
]
