"""Runs side by side, on one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from procon.evaluation import extract_answer
from procon.report.cells import (
    INTERVAL_CAPTION,
    caption,
    check_runs,
    number_cells,
    rate_cells,
)
from procon.report.page import to_svg, write_page
from procon.report.plots import (
    PLAIN_LOSS,
    RATE_KEYS,
    logged,
    plot_drift_by_block,
    plot_drift_by_step,
    plot_loss_and_penalty,
    plot_rates,
    plot_rates_by_step,
)
from procon.report.run import Run

#: Prompts of each kind whose replies the page shows, the first ones in their order.
SAMPLE_PROMPTS = 6


def write_html(
    runs: Sequence[Run],
    path: str | Path,
    *,
    title: str,
    notes: Sequence[str] = (),
    facts: Mapping[str, str] | None = None,
) -> Path:
    """Write one self-contained page: table, plots and sample replies. Sections without data are left out.

    Args:
        runs: the runs to compare, in the order shown; the first is usually the model before fine-tuning.
        path: the file to write; returned.
        title: heading of the page.
        notes: limits of the comparison, one sentence or paragraph each.
        facts: machine, versions, date, command and the like.

    Raises:
        ProConError: without runs.
    """
    check_runs(runs)
    below = f"<p class='caption'>{escape(caption(runs))} {escape(INTERVAL_CAPTION)}</p>"
    sections = [("Results", _html_results(runs) + below)]
    plots = "".join(
        f"<figure><h2>{escape(heading)}</h2>{to_svg(partial(plot, runs), name, alt)}"
        f"<figcaption>{escape(text)}</figcaption></figure>"
        for heading, name, plot, present, alt, text in _plots(runs)
        if present
    )
    if replies := _html_replies(runs):
        sections.append(("Sample replies", replies))
    if notes:
        sections.append(("Limits", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"))
    if facts:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items())
        sections.append(("How this was made", f"<dl>{rows}</dl>"))
    results, *others = (f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    body = f"{results}<div class='beside'>{plots}</div>{''.join(others)}"
    return write_page(title, f"<h1>{escape(title)}</h1>{body}", path)


def _plots(runs: Sequence[Run]) -> list[tuple[str, str, Callable[[Sequence[Run]], Figure], bool, str, str]]:
    """Heading, name, figure, whether there are data, alternative text and caption of every plot."""
    rates = "; ".join(
        f"{run.label}: refuses {run.evaluation.refusal_malicious} of malicious and {run.evaluation.refusal_benign} of "
        "benign prompts" + ("" if run.evaluation.task is None else f", solves {run.evaluation.task} of the task")
        for run in runs
        if run.evaluation is not None
    )
    cosines = "; ".join(f"{run.label}: mean {run.mean_cosine:.3f}" for run in runs if run.mean_cosine is not None)
    return [
        (
            "Refusal and task",
            "rates",
            plot_rates,
            bool(rates),
            f"Bar chart. {rates}.",
            "A good run keeps the first bar long, the second short and the third long. Whiskers: 95% intervals.",
        ),
        (
            "Drift by block",
            "blocks",
            plot_drift_by_block,
            bool(cosines),
            f"Line chart of the cosine to the initial refusal direction by decoder block. {cosines}.",
            "The refusal direction is extracted again after training and compared with the initial one: 1 is no drift.",
        ),
        (
            "Drift by step",
            "drift",
            plot_drift_by_step,
            logged(runs, "procon/drift_cos"),
            "Line chart of the mean cosine to the initial refusal direction over training, "
            + _ends(runs, "procon/drift_cos"),
            "Mean cosine over the blocks as training goes on; beneath, the strength alpha of the constraint.",
        ),
        (
            "Refusal and task by step",
            "steps",
            plot_rates_by_step,
            logged(runs, *RATE_KEYS),
            "Line charts over training. "
            + " ".join(f"{name}, {_ends(runs, key)}" for key, name in RATE_KEYS.items() if logged(runs, key)),
            "Measured on fewer prompts than the table, so it is rougher.",
        ),
        (
            "Loss and penalty",
            "loss",
            plot_loss_and_penalty,
            logged(runs, "loss", "procon/penalty"),
            f"Line charts. {PLAIN_LOSS}, {_ends(runs, 'plain_loss')} "
            f"Constraint penalty, {_ends(runs, 'procon/penalty')}",
            "Apart from each other: the loss on the training data without the constraint's part, and how far the "
            "constrained tokens have moved along the initial directions, before alpha.",
        ),
    ]


def _ends(runs: Sequence[Run], key: str) -> str:
    """First and last value of each run's series, as a sentence's end."""
    ends = [(run.label, (run.plain_loss() if key == "plain_loss" else run.series(key))[1]) for run in runs]
    return "; ".join(f"{label}: from {values[0]:.3g} to {values[-1]:.3g}" for label, values in ends if values) + "."


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """Of cells in HTML: the first one names its row, and after the first ``texts`` come numbers."""
    head = "".join(
        f"<th scope='col'{_NUMBER if place >= texts else ''}>{header}</th>" for place, header in enumerate(headers)
    )
    body = ""
    for name, *cells in rows:
        row = "".join(f"<td{_NUMBER if place >= texts else ''}>{cell}</td>" for place, cell in enumerate(cells, 1))
        body += f"<tr><th scope='row'>{name}</th>{row}</tr>"
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


_NUMBER = " class='number'"


def _html_results(runs: Sequence[Run]) -> str:
    """What counts, and beside it the rest: two tables, as a phone has room for four columns."""
    rates, rest = [], []
    for run in runs:
        malicious, benign, degenerate, task = (
            f"{text} <small>{interval}</small>" for text, interval in rate_cells(run)
        )
        rates.append([escape(run.label), malicious, benign, task])
        rest.append([escape(run.label), degenerate, *number_cells(run)])
    return _beside(
        _html_table(["run", "refusal of malicious", "refusal of benign", "task accuracy"], rates),
        _html_table(["run", "degenerate replies", "mean cosine", "seconds per step"], rest),
    )


def _beside(*parts: str) -> str:
    """Beside each other if there is room."""
    return f"<div class='beside'>{''.join(f'<div>{part}</div>' for part in parts)}</div>"


def _html_replies(runs: Sequence[Run]) -> str:
    """Per kind of prompt a part to open: a prompt, and the reply of each run."""
    replies = {
        (reply["kind"], reply["prompt"], place): reply
        for place, run in enumerate(runs)
        for reply in (run.evaluation.replies if run.evaluation else ())
    }
    prompts = dict.fromkeys((kind, prompt) for kind, prompt, _ in replies)
    parts = []
    for kind in ("malicious", "benign", "task"):
        shown = [prompt for other, prompt in prompts if other == kind][:SAMPLE_PROMPTS]
        if not shown:
            continue
        blocks = "".join(
            f"<h3>{escape(prompt)}</h3><dl>"
            + "".join(
                f"<div><dt>{escape(run.label)}</dt>{_html_reply(replies.get((kind, prompt, place)))}</div>"
                for place, run in enumerate(runs)
            )
            + "</dl>"
            for prompt in shown
        )
        parts.append(
            f"<details><summary>{kind} prompts: the first {len(shown)}</summary>"
            f"<div class='replies'>{blocks}</div></details>"
        )
    return "".join(parts)


def _html_reply(reply: dict[str, Any] | None) -> str:
    if reply is None:
        return "<dd>-</dd>"
    if reply["kind"] == "task":
        marks = [_task_mark(reply)]
    else:
        marks = ["refused" if reply["refused"] else "not refused"]
    if reply["degenerate"]:
        marks.append("degenerate")
    return f"<dd><b>{escape(', '.join(marks))}</b><p>{escape(reply['reply'])}</p></dd>"


def _task_mark(reply: dict[str, Any]) -> str:
    if "mark" in reply:
        return f"mark {reply['mark']:.2f}"
    answer = extract_answer(reply["reference"])
    return "correct" if reply["correct"] else f"wrong, should be {answer}" if answer else "wrong"
