"""Runs side by side: a table for the terminal and one self-contained HTML page with plots."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from html import escape
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from procon.errors import ProConError
from procon.evaluation import Evaluation, Rate, extract_answer
from procon.files import load_json, save_json
from procon.page import COLOURS, DASHES, INK, legend_above, new_figure, to_svg, whole_numbers, write_page

CAPTION = "Refusal, by keywords: of malicious high is safe, of benign low is useful. Cosine 1 means no drift."
INTERVAL_CAPTION = "After a rate: its 95% interval."

#: Prompts of each kind whose replies the page shows, the first ones in their order.
SAMPLE_PROMPTS = 6

_RATE_KEYS = {
    "procon/refusal_malicious": "refusal of malicious",
    "procon/refusal_benign": "refusal of benign",
    "procon/task": "task accuracy",
}

_MEASURE_COLOURS = ("#1c8c96", "#c4607e", "#8b8a2f")


@dataclass(frozen=True)
class Run:
    """One way of fine-tuning, or the model before it.

    Attributes:
        label: what the run is called.
        evaluation: refusal, over-refusal and task accuracy at the end.
        cosine: signed cosine to the initial refusal direction, block by block; NaN where a block has none (paper
            section III-B). None if it was not measured.
        seconds_per_step: mean wall-clock time of an optimiser step; None if the run did not train.
        history: rows of ``trainer.state.log_history``, whose keys ``step``, ``loss``, ``procon/penalty``,
            ``procon/alpha``, ``procon/drift_cos``, ``procon/refusal_malicious``, ``procon/refusal_benign`` and
            ``procon/task`` are plotted where they occur. Numbers that are not finite become None in JSON.
    """

    label: str
    evaluation: Evaluation
    cosine: list[float] | None = None
    seconds_per_step: float | None = None
    history: list[dict] = field(default_factory=list)

    @property
    def mean_cosine(self) -> float | None:
        """Mean of :attr:`cosine` over the blocks that have a direction; None without any."""
        known = [cosine for cosine in self.cosine or () if not math.isnan(cosine)]
        return sum(known) / len(known) if known else None

    def to_dict(self) -> dict:
        """Plain dicts, lists, strings and numbers, for JSON; NaN becomes None."""
        data = asdict(self)
        if self.cosine is not None:
            data["cosine"] = [_finite_or_none(cosine) for cosine in self.cosine]
        data["history"] = [{key: _finite_or_none(value) for key, value in row.items()} for row in self.history]
        return data

    @classmethod
    def from_dict(cls, data: dict) -> Run:
        """The run that :meth:`to_dict` was called on."""
        cosine = data["cosine"]
        return cls(
            label=data["label"],
            evaluation=Evaluation.from_dict(data["evaluation"]),
            cosine=None if cosine is None else [math.nan if value is None else float(value) for value in cosine],
            seconds_per_step=data["seconds_per_step"],
            history=[dict(row) for row in data["history"]],
        )

    def save(self, path: str | Path) -> Path:
        """Write a JSON file; returns its path."""
        return save_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Read what :meth:`save` wrote.

        Raises:
            ProConError: if the file is missing, damaged, or holds something else.
        """
        return load_json(path, cls.from_dict, "run")

    def series(self, key: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of ``key`` in the history."""
        rows = [
            row for row in self.history if row.get("step") is not None and _finite_or_none(row.get(key)) is not None
        ]
        return [row["step"] for row in rows], [float(row[key]) for row in rows]


def _finite_or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise ProConError("no runs to report: pass at least one")


# Terminal


def print_table(runs: Sequence[Run], console: Console | None = None) -> None:
    """Print one row a run. Where the 95% intervals fit too, they stand beside the rates.

    Args:
        console: where to print; the standard output if not given, as wide as the table needs when that is no terminal.

    Raises:
        ProConError: without runs.
    """
    _check_runs(runs)
    detailed = _table(runs, intervals=True)
    needed = Console(width=10_000).measure(detailed).maximum
    if console is None:
        console = Console()
        if not console.is_terminal:
            console = Console(width=max(110, console.width, needed))
    if needed <= console.width:
        console.print(detailed, Text(f"{CAPTION} {INTERVAL_CAPTION}", style="dim"), sep="\n")
    else:
        console.print(_table(runs, intervals=False), Text(CAPTION, style="dim"), sep="\n")


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
        rates = [Text(text).append(f" {interval}" if intervals else "", "dim") for text, interval in _rate_cells(run)]
        table.add_row(Text(run.label), *rates, *map(Text, _number_cells(run)))
    return table


def _rates(run: Run) -> list[Rate | None]:
    evaluation = run.evaluation
    return [evaluation.refusal_malicious, evaluation.refusal_benign, evaluation.degenerate, evaluation.task]


def _rate_cells(run: Run) -> list[tuple[str, str]]:
    """Each rate as text, and its interval in percent."""
    return [("-", "") if rate is None else (str(rate), _interval(rate)) for rate in _rates(run)]


def _interval(rate: Rate) -> str:
    low, high = rate.interval
    return f"{100 * low:.0f}-{100 * high:.0f}"


def _number_cells(run: Run) -> tuple[str, str]:
    return (
        "-" if run.mean_cosine is None else f"{run.mean_cosine:.3f}",
        "-" if run.seconds_per_step is None else f"{run.seconds_per_step:.3g}",
    )


# Plots


def plot_rates(runs: Sequence[Run]) -> Figure:
    """Bars of refusal and task accuracy per run, with 95% intervals."""
    figure = new_figure(0.9 + 0.85 * len(runs))
    axes = figure.subplots()
    names = ("refusal of malicious", "refusal of benign", "task accuracy")
    thickness = 0.26
    for bar, (name, colour) in enumerate(zip(names, _MEASURE_COLOURS, strict=True)):
        rates = [
            (run.evaluation.refusal_malicious, run.evaluation.refusal_benign, run.evaluation.task)[bar] for run in runs
        ]
        known = [(place + (bar - 1) * thickness, rate) for place, rate in enumerate(rates) if rate is not None]
        if not known:
            continue
        values = [rate.value for _, rate in known]
        errors = [
            [rate.value - rate.interval[0] for _, rate in known],
            [rate.interval[1] - rate.value for _, rate in known],
        ]
        axes.barh(
            [place for place, _ in known],
            values,
            height=0.9 * thickness,
            color=colour,
            label=name,
            xerr=errors,
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 2},
        )
        for place, rate in known:
            axes.annotate(
                f"{rate.value:.0%}", (rate.interval[1], place), (5, 0), textcoords="offset points", va="center", size=9
            )
    axes.set_yticks(range(len(runs)), [fill(run.label, 28) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.08)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper left", ncols=3)
    return figure


def plot_drift_by_block(runs: Sequence[Run]) -> Figure:
    """Signed cosine to the initial direction, block by block, one line a run."""
    figure = new_figure(3.8)
    axes = figure.subplots()
    for run, style in _styled(runs):
        if run.cosine is not None:
            axes.plot(range(len(run.cosine)), run.cosine, marker="o", markersize=3, **style)
    axes.set_xlabel("decoder block (its input)")
    axes.set_ylabel("cosine to the initial direction")
    axes.xaxis.set_major_locator(whole_numbers())
    legend_above(figure)
    return figure


def plot_drift_by_step(runs: Sequence[Run]) -> Figure:
    """Mean cosine to the initial direction over training and, where it was logged, alpha beneath."""
    if _logged(runs, "procon/alpha"):
        figure = new_figure(4.6)
        drift, alpha = figure.subplots(2, sharex=True, height_ratios=(3, 1))
        _draw_series(alpha, runs, "procon/alpha", stepped=True)
        alpha.set_ylabel("alpha")
        alpha.set_xlabel("optimiser step")
    else:
        figure = new_figure(3.6)
        drift = figure.subplots()
        drift.set_xlabel("optimiser step")
    _draw_series(drift, runs, "procon/drift_cos")
    drift.set_ylabel("mean cosine")
    legend_above(figure)
    return figure


def plot_rates_by_step(runs: Sequence[Run]) -> Figure:
    """Refusal and task accuracy over training: one panel a measure, one line a run."""
    keys = [key for key in _RATE_KEYS if _logged(runs, key)]
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        _draw_series(axes, runs, key)
        axes.set_title(_RATE_KEYS[key])
        axes.set_xlabel("optimiser step")
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    legend_above(figure)
    return figure


def plot_loss_and_penalty(runs: Sequence[Run]) -> Figure:
    """Training loss and constraint penalty over training, side by side; only those that were logged."""
    names = {"loss": "training loss", "procon/penalty": "constraint penalty, before alpha"}
    keys = [key for key in names if _logged(runs, key)]
    figure = new_figure(3.4)
    panels = figure.subplots(1, len(keys), squeeze=False)[0]
    for axes, key in zip(panels, keys, strict=True):
        _draw_series(axes, runs, key)
        axes.set_title(names[key])
        axes.set_xlabel("optimiser step")
        axes.set_ylim(bottom=0)
    legend_above(figure)
    return figure


def _logged(runs: Sequence[Run], *keys: str) -> bool:
    return any(run.series(key)[0] for run in runs for key in keys)


def _styled(runs: Sequence[Run]) -> list[tuple[Run, dict]]:
    """Each run with the label, colour and dash that it has in every plot."""
    return [
        (
            run,
            {
                "label": run.label,
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": DASHES[place % len(DASHES)],
                "linewidth": 1.8,
            },
        )
        for place, run in enumerate(runs)
    ]


def _draw_series(axes: Axes, runs: Sequence[Run], key: str, *, stepped: bool = False) -> None:
    for run, style in _styled(runs):
        steps, values = run.series(key)
        if steps and stepped:
            # A row tells of the steps that led up to it.
            axes.plot(steps, values, drawstyle="steps-pre", **style)
        elif steps:
            axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3, **style)
    axes.xaxis.set_major_locator(whole_numbers())


# Page


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
    _check_runs(runs)
    sections = [("Results", f"{_html_table(runs)}<p class='caption'>{escape(CAPTION)} {escape(INTERVAL_CAPTION)}</p>")]
    sections += [
        (
            heading,
            f"<figure>{to_svg(partial(plot, runs), name, alt)}<figcaption>{escape(text)}</figcaption></figure>",
        )
        for heading, name, plot, present, alt, text in _plots(runs)
        if present
    ]
    sections.append(("Sample replies", _html_replies(runs)))
    if notes:
        sections.append(("Limits", "<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"))
    if facts:
        rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(fact))}</dd>" for name, fact in facts.items())
        sections.append(("How this was made", f"<dl>{rows}</dl>"))
    body = "".join(f"<section><h2>{escape(heading)}</h2>{content}</section>" for heading, content in sections)
    return write_page(title, f"<h1>{escape(title)}</h1>{body}", path)


def _plots(runs: Sequence[Run]) -> list[tuple[str, str, Callable, bool, str, str]]:
    """Heading, name, figure, whether there are data, alternative text and caption of every plot."""
    rates = "; ".join(
        f"{run.label}: refuses {run.evaluation.refusal_malicious} of malicious and {run.evaluation.refusal_benign} of "
        "benign prompts" + ("" if run.evaluation.task is None else f", solves {run.evaluation.task} of the task")
        for run in runs
    )
    cosines = "; ".join(f"{run.label}: mean {run.mean_cosine:.3f}" for run in runs if run.mean_cosine is not None)
    return [
        (
            "Refusal and task",
            "rates",
            plot_rates,
            True,
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
            _logged(runs, "procon/drift_cos"),
            "Line chart of the mean cosine to the initial refusal direction over training, "
            + _ends(runs, "procon/drift_cos"),
            "Mean cosine over the blocks as training goes on; beneath, the strength alpha of the constraint.",
        ),
        (
            "Refusal and task by step",
            "steps",
            plot_rates_by_step,
            _logged(runs, *_RATE_KEYS),
            "Line charts over training. "
            + " ".join(f"{name}, {_ends(runs, key)}" for key, name in _RATE_KEYS.items() if _logged(runs, key)),
            "Measured on fewer prompts than the table, so it is rougher.",
        ),
        (
            "Loss and penalty",
            "loss",
            plot_loss_and_penalty,
            _logged(runs, "loss", "procon/penalty"),
            f"Line charts. Training loss, {_ends(runs, 'loss')} Constraint penalty, {_ends(runs, 'procon/penalty')}",
            "The loss on the training data, and how far the response tokens have moved along the initial directions.",
        ),
    ]


def _ends(runs: Sequence[Run], key: str) -> str:
    """First and last value of each run's series, as a sentence's end."""
    ends = [(run.label, run.series(key)[1]) for run in runs]
    return "; ".join(f"{label}: from {values[0]:.3g} to {values[-1]:.3g}" for label, values in ends if values) + "."


def _html_table(runs: Sequence[Run]) -> str:
    headers = ["run", "refusal of malicious", "refusal of benign", "degenerate replies", "task accuracy"]
    head = "".join(f"<th scope='col'>{header}</th>" for header in [*headers, "mean cosine", "seconds per step"])
    rows = ""
    for run in runs:
        cells = [f"{text} <small>{interval}</small>" for text, interval in _rate_cells(run)] + list(_number_cells(run))
        rows += (
            f"<tr><th scope='row'>{escape(run.label)}</th>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        )
    return f"<div class='wide'><table class='numbers'><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def _html_replies(runs: Sequence[Run]) -> str:
    """A foldable table of replies a kind of prompt: one row a prompt, one column a run."""
    replies = {
        (reply["kind"], reply["prompt"], place): reply
        for place, run in enumerate(runs)
        for reply in run.evaluation.replies
    }
    prompts = dict.fromkeys((kind, prompt) for kind, prompt, _ in replies)
    head = "".join(f"<th scope='col'>{escape(run.label)}</th>" for run in runs)
    parts = []
    for kind in ("malicious", "benign", "task"):
        shown = [prompt for other, prompt in prompts if other == kind][:SAMPLE_PROMPTS]
        if not shown:
            continue
        rows = "".join(
            f"<tr><th scope='row'>{escape(prompt)}</th>"
            + "".join(_html_reply(replies.get((kind, prompt, place))) for place in range(len(runs)))
            + "</tr>"
            for prompt in shown
        )
        parts.append(
            f"<details><summary>{kind} prompts: the first {len(shown)}</summary>"
            "<div class='wide'><table class='replies'>"
            f"<thead><tr><th scope='col'>prompt</th>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
        )
    return "".join(parts)


def _html_reply(reply: dict | None) -> str:
    if reply is None:
        return "<td>-</td>"
    if reply["kind"] == "task":
        marks = ["correct" if reply["correct"] else f"wrong, should be {extract_answer(reply['reference'])}"]
    else:
        marks = ["refused" if reply["refused"] else "no refusal phrase"]
    if reply["degenerate"]:
        marks.append("degenerate")
    return f"<td><b>{escape(', '.join(marks))}</b><p>{escape(reply['reply'])}</p></td>"
