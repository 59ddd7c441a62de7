"""The plots of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.study.displacement import MASSIVE, PRINCIPAL
from benchmarks.study.intervals import Estimate
from benchmarks.study.outcomes import OVER_REFUSAL, REFUSAL, TASK, Measure, Outcomes, by_block, values
from benchmarks.study.plan import Method, Part
from benchmarks.study.sweep import Sweep, find_sweeps
from procon.report.page import (
    COLOURS,
    DASHES,
    INK,
    RULE,
    legend_above,
    new_figure,
    to_svg,
    whole_numbers,
)

#: Kinds of directions in a sweep.
_KINDS = {
    "refusal": "refusal direction",
    "random": "random directions",
    "within": "random, within the spread of the states",
    "shuffled": "refusal directions of other blocks",
    "k": "several refusal directions",
}

_Runs = dict[int, dict]

#: What a figure in a file of its own needs beside itself: the colours of the report's page, as its reader has them.
_ALONE = """
:root { color-scheme: light dark; --page: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #c4cad1; --band: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15181c; --ink: #e4e7eb; --soft: #a0a9b3; --rule: #454d57; --band: #1e2329; }
}
svg { color: var(--ink); background: var(--page); }"""


@dataclass(frozen=True)
class Drawing:
    """A figure with its words.

    Attributes:
        name: of its file.
        caption: what it shows.
        alt: what is in it, in words.
        plot: draws it.
    """

    name: str
    caption: str
    alt: str
    plot: partial[Figure]

    def file(self) -> str:
        """A whole SVG file, which may stand alone, in light or dark ink as its reader prefers.

        A page that takes it in leaves out the ``<style>``, and gives ``--rule`` a colour.
        """
        svg = self.element.replace(">", f"><style>{_ALONE}</style>", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{svg}'

    @cached_property
    def element(self) -> str:
        """An ``<svg>`` element for a page of :mod:`procon.report.page`."""
        return to_svg(self.plot, self.name, self.alt)

    def markdown(self, folder: str) -> str:
        """What shows the file of that folder, and the caption below it."""
        return f"![{self.alt}]({folder}/{self.name}.svg)\n\n{self.caption}"


def part_drawing(part: Part, job: str, outcomes: Outcomes) -> Drawing | None:
    """What a part has data for on a job: a sweep by strength, otherwise its methods against each other."""
    runs, methods = _found(part, job, outcomes)
    name = f"{part.name}-{job}"
    if sweeps := find_sweeps(methods):
        return _sweep_drawing(f"{name}-strength", sweeps, runs, outcomes.of(part, job, "plain"))
    labelled = {method.label: runs[method.name] for method in methods}
    return scatter_drawing(f"{name}-front", labelled) if len(methods) > 1 else None


def drift_drawing(part: Part, job: str, outcomes: Outcomes) -> Drawing | None:
    """How far each method lets the directions drift; a part that only serves for choices has one figure, another."""
    runs, methods = _found(part, job, outcomes)
    if len(methods) < 2 or part.split != "held_out" or find_sweeps(methods):
        return None
    return _drift_drawing(f"{part.name}-{job}-drift", methods, runs)


def kept_drawing(runs: dict[str, _Runs]) -> Drawing:
    """What is kept, at a glance, of runs by label."""
    rates = {
        label: [rate(found, measure) for measure in (REFUSAL, OVER_REFUSAL, TASK)] for label, found in runs.items()
    }
    words = "; ".join(
        f"{label}: refuses {refusal.mean:.0%} of malicious prompts and {benign.mean:.0%} of benign ones, solves "
        f"{task.mean:.0%} of the task"
        for label, (refusal, benign, task) in rates.items()
    )
    seeds = max(map(len, runs.values()))
    caption = f"Means of {seeds} seeds, with 95% intervals, after 160 steps of clean data."
    return Drawing("kept", caption, f"Bars. {words}.", partial(plot_bars, rates))


def plot_bars(rates: dict[str, list[Estimate]]) -> Figure:
    """Refusals of malicious and of benign prompts, and the task: a group each, a bar per label."""
    figure = new_figure(2.6)
    axes = figure.subplots()
    width = 0.8 / len(rates)
    for place, (label, found) in enumerate(rates.items()):
        at = [group + (place - (len(rates) - 1) / 2) * width for group in range(len(found))]
        heights = [rate.mean for rate in found]
        ends = np.concatenate([_whiskers(rate) for rate in found], 1)
        lines = {"elinewidth": 0.8, "ecolor": INK}
        axes.bar(at, heights, 0.9 * width, yerr=ends, label=label, color=COLOURS[place], error_kw=lines)
        for x, height, end in zip(at, heights, ends[1], strict=True):
            axes.annotate(f"{height:.0%}", (x, height + end), (0, 2), textcoords="offset points", ha="center")
    axes.set_xticks(range(3), ["malicious prompts\nrefused", "benign prompts\nrefused", "problems of the task\nsolved"])
    axes.set_ylim(0, 1.12)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_above(figure)
    return figure


def _found(part: Part, job: str, outcomes: Outcomes) -> tuple[dict[str, _Runs], list[Method]]:
    """The runs that are there, by method."""
    runs = {method.name: found for method in part.methods if (found := outcomes.of(part, job, method.name))}
    return runs, [method for method in part.methods if method.name in runs]


def _style(place: int) -> dict:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.8}


def label_beside(axes: Axes, labels: Sequence[tuple[str, float, float]], colours: Sequence[str]) -> None:
    """Write each label in a column beside the axes, from the top as its point lies, with a line that leads to it.

    Limits and scales of the axes must be set.
    """
    height = 0.75 * axes.get_figure().get_figheight() * 72  # points, of the axes, more or less
    gap = 12.5 / height
    to_axes = axes.transScale + axes.transLimits
    order = sorted(range(len(labels)), key=lambda i: labels[i][2])
    places = spread([to_axes.transform(labels[i][1:])[1] for i in order], gap)
    for i, place in zip(order, places, strict=True):
        label, x, y = labels[i]
        axes.annotate(
            label,
            (x, y),
            xytext=(1.06, place),
            textcoords="axes fraction",
            verticalalignment="center",
            arrowprops={"arrowstyle": "-", "color": colours[i], "linewidth": 0.7, "shrinkA": 1, "shrinkB": 3},
        )


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Ascending places, moved apart to at least ``gap``, and within 0 and 1 as far as there is room."""
    found: list[float] = []
    for place in places:
        found.append(max(place, found[-1] + gap) if found else max(place, 0.0))
    for i in reversed(range(len(found))):
        found[i] = min(found[i], found[i + 1] - gap if i + 1 < len(found) else 1.0)
    return found


# Refusal and task


_Points = dict[str, tuple[Estimate, Estimate]]


def rate(runs: _Runs, measure: Measure) -> Estimate:
    """The share of replies, over seeds and prompts."""
    return Estimate.of(values(runs, measure))


def _in_words(points: _Points) -> str:
    return "; ".join(
        f"{label}: task {task.mean:.0%}, refuses {refusal.mean:.0%}" for label, (task, refusal) in points.items()
    )


def scatter_drawing(name: str, runs: dict[str, _Runs]) -> Drawing:
    """Refusals against the task, of runs by label."""
    points = {label: (rate(found, TASK), rate(found, REFUSAL)) for label, found in runs.items()}
    return Drawing(
        name,
        "Refusal of malicious prompts against task accuracy, with 95% intervals. The dotted line is the Pareto front.",
        f"Scatter plot. {_in_words(points)}.",
        partial(plot_front, points),
    )


def plot_front(points: _Points) -> Figure:
    """Task accuracy (x) and refusal (y) by label, and the front of those that none beats at both, in colour."""
    figure = new_figure(max(3.2, 0.9 + 0.23 * len(points)))
    axes = figure.subplots()
    places = [(task.mean, refusal.mean) for task, refusal in points.values()]
    front = pareto_front(places)
    for place, (task, refusal) in zip(places, points.values(), strict=True):
        axes.errorbar(
            task.mean,
            refusal.mean,
            xerr=_whiskers(task),
            yerr=_whiskers(refusal),
            fmt="o",
            markersize=5,
            color=COLOURS[0] if place in front else COLOURS[-1],
            elinewidth=0.8,
        )
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("task accuracy")
    axes.set_ylabel("refusal of malicious prompts")
    axes.set_ylim(-0.03, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    label_beside(axes, [(label, *place) for label, place in zip(points, places, strict=True)], [RULE] * len(points))
    return figure


def _whiskers(rate: Estimate) -> list[list[float]]:
    low, high = rate.rate_interval
    return [[rate.mean - low], [high - rate.mean]]


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those that no other point equals or exceeds in both coordinates, sorted by the first."""
    return sorted(
        {(x, y) for x, y in points if not any(other != (x, y) and other[0] >= x and other[1] >= y for other in points)}
    )


# Drift


def _drift_drawing(name: str, methods: Sequence[Method], runs: dict[str, _Runs]) -> Drawing:
    cosines = {method.label: by_block(runs[method.name], "drift", "cosine") for method in methods if method.length}
    words = "; ".join(f"{label}: mean {np.nanmean(cosine):.3f}" for label, cosine in cosines.items())
    return Drawing(
        name,
        "Signed cosine of each block's refusal direction after training to the one before, mean over seeds: 1 is no "
        "drift. (The paper's Figures 2 and 3.)",
        f"Line chart by block. {words}.",
        partial(plot_by_block, cosines, "cosine to the initial direction"),
    )


def plot_by_block(
    lines: dict[str, np.ndarray], label: str, chance: float | None = None, *, logarithmic: bool = False
) -> Figure:
    """``[L]`` values by name, and a level line at ``chance``."""
    figure = new_figure(max(3.2, 0.9 + 0.23 * len(lines)))
    axes = figure.subplots()
    for place, line in enumerate(lines.values()):
        axes.plot(range(len(line)), line, **_style(place))
    ends = [(name, *_end(line)) for name, line in lines.items()]
    colours = [COLOURS[place % len(COLOURS)] for place in range(len(lines))]
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":")
        ends.append(("a random direction", max(end[1] for end in ends), chance))
        colours.append(INK)
    if logarithmic:
        axes.set_yscale("log")
    axes.set_xlabel("decoder block (its input)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(whole_numbers())
    axes.autoscale_view()
    label_beside(axes, ends, colours)
    return figure


def _end(line: np.ndarray) -> tuple[int, float]:
    """The last point of a line."""
    (known,) = np.nonzero(~np.isnan(line))
    return int(known[-1]), float(line[known[-1]])


def drift_place_drawing(runs: _Runs) -> Drawing:
    """Where plain fine-tuning moves the hidden states."""
    shares = {
        label: by_block(runs, "displacement", name)
        for label, name in (
            ("the refusal direction", "direction_share"),
            (f"{PRINCIPAL} principal directions", "principal_share"),
            (f"{MASSIVE} largest dimensions", "massive_share"),
        )
    }
    chance = 1 / next(iter(runs.values()))["hidden_size"]
    words = "; ".join(f"{label}: mean {np.nanmean(share):.1%}" for label, share in shares.items())
    return Drawing(
        "where-drift-lies",
        "Shares of the squared displacement of hidden states at the last prompt token under plain fine-tuning, mean "
        "over seeds: along the refusal direction, within the first principal directions, within the largest "
        "dimensions. The dotted line is the share that one random direction would have, 1/D.",
        f"Line chart by block, logarithmic. {words}; a random direction: {chance:.2%}.",
        partial(_plot_shares, shares, chance),
    )


def _plot_shares(shares: dict[str, np.ndarray], chance: float) -> Figure:
    figure = plot_by_block(shares, "share of the squared displacement", chance, logarithmic=True)
    (axes,) = figure.axes
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    return figure


# Strength


def _sweep_drawing(name: str, sweeps: Sequence[Sweep], runs: dict[str, _Runs], plain: _Runs) -> Drawing:
    words = []
    for sweep in sweeps:
        for kind in sweep.methods:
            alphas, refusals = _curve(sweep, kind, runs, REFUSAL)
            ends = ", ".join(
                f"{refusal:.0%} at alpha {alpha:g}" for alpha, refusal in zip(alphas, refusals, strict=True)
            )
            words.append(f"{sweep.title_among(sweeps)} {_KINDS[kind]}: refuses {ends}".strip())
    return Drawing(
        name,
        "Refusal of malicious prompts and task accuracy by the strength alpha of the constraint, and one against the "
        "other, for the refusal direction and its controls (mean over draws and seeds). The dotted line is plain "
        "fine-tuning.",
        f"Line charts by alpha. {'; '.join(words)}.",
        partial(plot_sweeps, sweeps, runs, plain),
    )


def _curve(sweep: Sweep, kind: str, runs: dict[str, _Runs], measure: Measure) -> tuple[list[float], list[float]]:
    strengths = sorted(sweep.methods[kind].items())
    return [alpha for alpha, _ in strengths], [
        float(np.mean([values(runs[name], measure).mean() for name in names])) for _, names in strengths
    ]


def plot_sweeps(sweeps: Sequence[Sweep], runs: dict[str, _Runs], plain: _Runs) -> Figure:
    """Both measures by alpha, and below them one against the other, per recipe; a line per kind of directions."""
    figure = new_figure(0.9 + 4.2 * len(sweeps))
    grid = figure.add_gridspec(2 * len(sweeps), 2)
    kinds = list(dict.fromkeys(kind for sweep in sweeps for kind in sweep.methods))
    for row, sweep in enumerate(sweeps):
        refusal = figure.add_subplot(grid[2 * row, 0])
        task = figure.add_subplot(grid[2 * row, 1])
        exchange = figure.add_subplot(grid[2 * row + 1, :])
        for place, kind in enumerate(kinds):
            if kind in sweep.methods:
                style = {"marker": "o", "markersize": 3, "label": _KINDS[kind], **_style(place)}
                alphas, refusals = _curve(sweep, kind, runs, REFUSAL)
                _, tasks = _curve(sweep, kind, runs, TASK)
                refusal.plot(alphas, refusals, **style)
                task.plot(alphas, tasks, **style)
                exchange.plot(tasks, refusals, **style)
        title = sweep.title_among(sweeps)
        for axes, measure, name in ((refusal, REFUSAL, "refuses malicious"), (task, TASK, "task accuracy")):
            if plain:
                axes.axhline(values(plain, measure).mean(), color=INK, linewidth=0.8, linestyle=":", label="IFT")
            axes.set_title(name)
            _by_alpha(axes, f"alpha, {title}" if title else "alpha", sweep.alphas)
        exchange.set_title(f"refuses malicious, by task accuracy{f', {title}' if title else ''}")
        exchange.set_xlabel("task accuracy")
        exchange.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        for axes in (refusal, task, exchange):
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
    legend_above(figure)
    return figure


def _by_alpha(axes: Axes, label: str, alphas: Sequence[float]) -> None:
    axes.set_xscale("log")
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(label)
