"""``procon report``: runs side by side, whatever wrote them."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from procon.cli.arguments import ReportArguments
from procon.cli.commands import _output_file
from procon.errors import printable
from procon.report import print_table, read_runs, write_html


def report(arguments: ReportArguments) -> None:
    """``procon report``"""
    output = _output_file(arguments.output)
    runs = read_runs(arguments.runs)
    title = arguments.title or ", ".join(run.label for run in runs)
    write_html(runs, output, title=title, facts=dict(zip((run.label for run in runs), arguments.runs, strict=True)))
    print_table(runs)
    Console().print(Text(f"Written: {printable(str(output))}"))  # a path may look like markup
