"""Runs side by side: tables for the terminal, and one HTML page with plots and replies.

In: runs, each with an evaluation and a log, as objects or from the files and folders that they lie in.
Out: text, and a page that needs no other file.
May import: ``evaluation`` and the leaves.
"""

from procon.errors import require_extra

__extra__ = require_extra("report", __name__)

from procon.report.comparison import Difference, compare_runs
from procon.report.report import print_table, write_html
from procon.report.run import Run, read_runs

__all__ = ["Difference", "Run", "compare_runs", "print_table", "read_runs", "write_html"]
