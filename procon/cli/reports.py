"""``procon report`` and ``procon compare``: runs side by side, whatever wrote them."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.text import Text

from procon.cli.arguments import CompareArguments, ReportArguments
from procon.cli.commands import _output_file
from procon.errors import printable
from procon.files import save_json
from procon.report import Source, compare_runs, print_comparison, print_table, read_sources, write_html


def report(arguments: ReportArguments) -> None:
    """``procon report``"""
    output = _output_file(arguments.output)
    sources = read_sources(arguments.runs)
    runs = [source.run for source in sources]
    title = arguments.title or ", ".join(run.label for run in runs)
    write_html(runs, output, title=title, facts=_facts(sources))
    print_table(runs)
    _say_where(output)


def compare(arguments: CompareArguments) -> None:
    """``procon compare``"""
    output = _output_file(arguments.output) if arguments.output else None
    comparison = compare_runs(*read_sources([arguments.first, arguments.second]))
    if output:
        save_json(comparison.to_dict(), output)
    print_comparison(comparison)
    if output:
        _say_where(output)


def _facts(sources: list[Source]) -> dict[str, str]:
    """Where each run was read, and the settings that they share."""
    facts = {source.run.label: str(source.path) for source in sources}
    first, *others = [source.settings for source in sources]
    for name, value in first.items():
        if value is not None and all(settings.get(name) == value for settings in others):
            facts.setdefault(name, str(value))
    return facts


def _say_where(output: Path) -> None:
    Console().print(Text(f"Written: {printable(str(output))}"))  # a path may look like markup
