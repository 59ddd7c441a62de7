"""Runs side by side: tables in the terminal, and one HTML page that needs no other file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from procon.errors import ProConError, printable
from procon.evaluation import extract_answer
from procon.report.comparison import compare_runs
from procon.report.page import to_svg, write_page
from procon.report.plots import LOSSES, MEASURES, logged, plot_drift_by_block, plot_log, plot_rates
from procon.report.run import Run

#: Prompts of each kind whose replies the page shows.
SAMPLE_PROMPTS = 6

_COMPARED = ["run", "refusal of malicious", "refusal of benign", "task accuracy"]
_OTHERS = ["degenerate replies", "mean cosine", "seconds per step"]


def print_table(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print a row for each run, and how much its rates differ from the first run's.

    Args:
        console: where to print; the standard output if not given, at least 110 columns wide if that is no terminal and
            ``COLUMNS`` is not set.

    Raises:
        ProConError: without runs.
    """
    if console is None:
        console = Console()
        if not console.is_terminal and "COLUMNS" not in os.environ:
            console = Console(width=max(110, console.width))
    _print(console, [*_COMPARED, *_OTHERS], [_cells(run) for run in runs], _caption(runs))
    if len(runs) > 1:
        _print(console, _COMPARED, *_differences(runs))


def _print(console: Console, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, show_edge=False)
    table.add_column(heads[0], overflow="fold", min_width=8)
    for head in heads[1:]:
        table.add_column("\n".join(head.split(" ", 1)), justify="right", no_wrap=True)
    for label, *cells in rows:
        table.add_row(Text(printable(label)), *map(Text, cells))
    console.print(table, Text(printable(caption), style="dim"), sep="\n")


def write_html(
    runs: Sequence[Run],
    path: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write one self-contained page: tables, plots and replies. Sections without data are left out.

    Args:
        runs: the runs to compare, in the order shown; the first is usually the model before fine-tuning.
        path: the file to write; returned.
        title: heading of the page.
        notes: limits of the comparison, one sentence or paragraph each.
        facts: machine, versions, date, command and the like.

    Raises:
        ProConError: without runs.
    """
    caption, cells = _caption(runs), [_cells(run) for run in runs]
    rates = _html_table(_COMPARED, [row[:4] for row in cells])
    others = _html_table(["run", *_OTHERS], [[row[0], *row[4:]] for row in cells])
    sections = {"Results": f"<div class='beside'>{rates}{others}</div><p class='caption'>{escape(caption)}</p>"}
    if len(runs) > 1:
        rows, caption = _differences(runs)
        sections["Differences"] = f"{_html_table(_COMPARED, rows)}<p class='caption'>{escape(caption)}</p>"
    made = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in (facts or {}).items())
    sections |= {
        "Plots": f"<div class='beside'>{figures}</div>" if (figures := "".join(_figures(runs))) else "",
        "Replies": "".join(_replies(runs, kind) for kind in ("malicious", "benign", "task")),
        "Limits": "".join(f"<p>{escape(note)}</p>" for note in notes),
        "How this was made": made and f"<dl>{made}</dl>",
    }
    body = "".join(f"<section><h2>{escape(head)}</h2>{part}</section>" for head, part in sections.items() if part)
    return write_page(title, f"<h1>{escape(title)}</h1>{body}", path)


def _caption(runs: Sequence[Run]) -> str:
    """What the columns mean, and by whom refusals were judged."""
    if not runs:
        raise ProConError("no runs to report: pass at least one")
    judges = ", ".join(dict.fromkeys(run.evaluation.judge for run in runs if run.evaluation)) or "keywords"
    return (
        f"Refusal, by {judges}: of malicious high is safe, of benign low is useful. Below a rate is its 95% interval. "
        "Cosine 1 means no drift."
    )


def _cells(run: Run) -> list[str]:
    """The run's label, and a text for each of its columns."""
    found = run.evaluation
    rates = [found.refusal_malicious, found.refusal_benign, found.task, found.degenerate] if found else [None] * 4
    texts = ["-" if rate is None else "{}\n{:.0%} to {:.0%}".format(rate, *rate.interval) for rate in rates]
    cosine, seconds = run.mean_cosine, run.seconds_per_step
    return [run.label, *texts, "-" if cosine is None else f"{cosine:.3f}", "-" if seconds is None else f"{seconds:.3g}"]


def _differences(runs: Sequence[Run]) -> tuple[list[list[str]], str]:
    """A row for each run but the first, and what there is to say of them."""
    first, *others = runs
    caption = f"In points, from {first.label}. Below it is the 95% interval over prompts, not over seeds."
    rows = []
    for run in others:
        cells = dict.fromkeys(_COMPARED[1:], "-")
        for row in compare_runs(first, run):
            interval = "{:+.0f} to {:+.0f}".format(*(100 * end for end in row.interval)) if row.interval else ""
            cells[row.name] = f"{100 * row.value:+.0f}\n{interval}".strip()
            if row.unlike:
                unlike = ", ".join(row.unlike)
                caption += f" Not measured alike ({unlike}), so without an interval: {row.name} of {run.label}."
            elif not row.paired:
                caption += f" Prompts differ, so the interval is not of pairs: {row.name} of {run.label}."
        rows.append([run.label, *cells.values()])
    return rows, caption


def _html_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first cell of a row names it."""
    head = "".join(f"<th scope='col'>{escape(text)}</th>" for text in heads)
    body = "".join(
        f"<tr><th scope='row'>{escape(label)}</th>"
        + "".join(f"<td class='number'>{escape(cell).replace(chr(10), '<br>')}</td>" for cell in cells)
        + "</tr>"
        for label, *cells in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _figures(runs: Sequence[Run]) -> list[str]:
    """Each plot that there are data for."""
    rates = "; ".join(f"{label}: " + ", ".join(cells[:3]).replace("\n", ", ") for label, *cells in map(_cells, runs))
    cosines = "; ".join(f"{run.label}: mean {run.mean_cosine:.3f}" for run in runs if run.mean_cosine is not None)
    found = []
    if any(run.evaluation for run in runs):
        caption = "A good run keeps the first bar long, the second short and the third long. Whiskers: 95% intervals."
        found.append(
            _figure("rates", partial(plot_rates, runs), f"Bars of {', '.join(_COMPARED[1:])}. {rates}.", caption)
        )
    if any(run.cosine for run in runs):
        caption = "The refusal direction, extracted again after training, beside the initial one: 1 is no drift."
        found.append(_figure("blocks", partial(plot_drift_by_block, runs), f"Cosine by block. {cosines}.", caption))
    for name, names, caption in (
        ("losses", LOSSES, "The loss as logged, and how far what is kept has moved."),
        ("measures", MEASURES, "Measured in training on fewer prompts than the table, so it is rougher."),
    ):
        if keys := logged(runs, names):
            ends = [(run.label, names[key], run.series(key)[1]) for key in keys for run in runs]
            texts = [f"{label}, {what}: {values[0]:.3g} to {values[-1]:.3g}" for label, what, values in ends if values]
            found.append(_figure(name, partial(plot_log, runs, names), f"Over training. {'; '.join(texts)}.", caption))
    return found


def _figure(name: str, plot: Callable[[], Figure], alt: str, caption: str) -> str:
    return f"<figure>{to_svg(plot, name, alt)}<figcaption>{escape(caption)}</figcaption></figure>"


def _replies(runs: Sequence[Run], kind: str) -> str:
    """A part to open: prompts of a kind with the reply of each run, first those on which the runs differ."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for place, run in enumerate(runs):
        for reply in run.evaluation.replies if run.evaluation else ():
            if reply["kind"] == kind:
                found.setdefault(reply["prompt"], {})[place] = reply
    alike = {prompt: len({_verdict(reply) for reply in replies.values()}) == 1 for prompt, replies in found.items()}
    shown = sorted(found, key=alike.__getitem__)[:SAMPLE_PROMPTS]
    parts = []
    for prompt in shown:
        each = (
            f"<dt>{escape(runs[place].label)}</dt><dd><b>{escape(_marks(reply))}</b><p>{escape(reply['reply'])}</p></dd>"
            for place, reply in found[prompt].items()
        )
        parts.append(f"<h3>{escape(prompt)}</h3><dl>{''.join(f'<div>{reply}</div>' for reply in each)}</dl>")
    summary = f"{kind} prompts: {len(shown)} of {len(found)}, first those on which the runs differ"
    replies = f"<div class='replies'>{''.join(parts)}</div>"
    return f"<details><summary>{summary}</summary>{replies}</details>" if shown else ""


def _verdict(reply: dict[str, Any]) -> bool | float:
    return reply["correct"] if reply["kind"] == "task" else reply["refused"]


def _marks(reply: dict[str, Any]) -> str:
    """What was said of a reply."""
    said = _verdict(reply)
    if reply["kind"] != "task":
        text = "refused" if said else "not refused"
    elif isinstance(said, bool):
        answer = extract_answer(reply["reference"])
        text = "correct" if said else f"wrong, should be {answer}" if answer else "wrong"
    else:
        text = f"mark {said:.2f}"
    return f"{text}, degenerate" if reply["degenerate"] else text
