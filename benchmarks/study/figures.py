"""The plots of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, PercentFormatter

from benchmarks.study.displacement import MASSIVE, PRINCIPAL
from benchmarks.study.intervals import Estimate
from benchmarks.study.methods import Method
from benchmarks.study.outcomes import REFUSAL, TASK, Measure, Outcomes, by_block, values
from benchmarks.study.plan import Part
from benchmarks.study.sweep import Sweep, find_sweeps
from procon.report.page import COLOURS, DASHES, INK, RULE, draw_svg, legend_above, new_figure, to_svg, whole_numbers

_MARKERS = "osD^vP*<>phdX"

#: Kinds of directions in a sweep.
_KINDS = {
    "refusal": "refusal direction",
    "random": "random directions",
    "within": "random, within the spread of the states",
    "shuffled": "refusal directions of other blocks",
    "k": "several refusal directions",
}

_Runs = dict[int, dict]


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
        """A whole SVG file, dark on white, so that it can be read wherever it is shown."""
        svg = draw_svg(partial(_on_white, self.plot))
        return f'<?xml version="1.0" encoding="utf-8"?>\n{svg.replace(INK, "#1b1f24").replace(RULE, "#c4cad1")}'

    def element(self) -> str:
        """An ``<svg>`` element for a page of :mod:`procon.report.page`."""
        return to_svg(self.plot, self.name, self.alt)


def _on_white(plot: partial[Figure]) -> Figure:
    figure = plot()
    figure.set_facecolor("white")
    return figure


def part_drawings(part: Part, job: str, outcomes: Outcomes) -> list[Drawing]:
    """What a part has data for on a job: a sweep by strength, otherwise its methods against each other."""
    runs = {method.name: found for method in part.methods if (found := outcomes.of(part, job, method.name))}
    methods = [method for method in part.methods if method.name in runs]
    name = f"{part.name}-{job}"
    if sweeps := find_sweeps(methods):
        return [_sweep_drawing(f"{name}-strength", sweeps, runs, outcomes.of(part, job, "plain"))]
    if len(methods) < 2:
        return []
    drawings = [_scatter_drawing(f"{name}-front", methods, runs)]
    # A part that only serves for choices has one figure.
    return drawings if part.split != "held_out" else [*drawings, _drift_drawing(f"{name}-drift", methods, runs)]


def _style(place: int) -> dict:
    return {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.8}


# Refusal against task


def _scatter_drawing(name: str, methods: Sequence[Method], runs: dict[str, _Runs]) -> Drawing:
    points = {
        method.label: tuple(Estimate.of(values(runs[method.name], measure)) for measure in (TASK, REFUSAL))
        for method in methods
    }
    words = "; ".join(
        f"{label}: task {task.mean:.0%}, refuses {refusal.mean:.0%}" for label, (task, refusal) in points.items()
    )
    return Drawing(
        name,
        "Refusal of malicious prompts against task accuracy, with 95% intervals. Points on the dotted line are the "
        "Pareto front: no other method is as good at both.",
        f"Scatter plot. {words}.",
        partial(plot_front, points),
    )


def plot_front(points: dict[str, tuple[Estimate, Estimate]]) -> Figure:
    """Task accuracy (x) and refusal (y) by label, one marker each, and the front of those that none beats at both."""
    figure = new_figure(4.8)
    axes = figure.subplots()
    for place, (label, (task, refusal)) in enumerate(points.items()):
        colour = COLOURS[place % len(COLOURS)]
        axes.errorbar(
            task.mean,
            refusal.mean,
            xerr=_whiskers(task),
            yerr=_whiskers(refusal),
            fmt=_MARKERS[place % len(_MARKERS)],
            color=colour,
            elinewidth=0.8,
            label=label,
        )
    front = pareto_front([(task.mean, refusal.mean) for task, refusal in points.values()])
    axes.plot(*zip(*front, strict=True), color=INK, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_xlabel("task accuracy")
    axes.set_ylabel("refusal of malicious prompts")
    axes.set_ylim(-0.03, 1.03)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_above(figure)
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


def plot_by_block(lines: dict[str, np.ndarray], label: str, chance: float | None = None) -> Figure:
    """``[L]`` values by name, and a level line at ``chance``."""
    figure = new_figure(4.0)
    axes = figure.subplots()
    for place, (name, line) in enumerate(lines.items()):
        axes.plot(range(len(line)), line, label=name, **_style(place))
    if chance is not None:
        axes.axhline(chance, color=INK, linewidth=0.8, linestyle=":", label="a random direction (1/D)")
    axes.set_xlabel("decoder block (its input)")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(whole_numbers())
    legend_above(figure)
    return figure


def drift_place_drawing(runs: _Runs) -> Drawing:
    """Where plain fine-tuning moves the hidden states."""
    shares = {
        label: by_block(runs, "displacement", name)
        for label, name in (
            ("along the refusal direction", "direction_share"),
            (f"within the first {PRINCIPAL} principal directions", "principal_share"),
            (f"within the {MASSIVE} largest dimensions", "massive_share"),
        )
    }
    chance = 1 / next(iter(runs.values()))["hidden_size"]
    words = "; ".join(f"{label}: mean {np.nanmean(share):.1%}" for label, share in shares.items())
    return Drawing(
        "where-drift-lies",
        "Shares of the squared displacement of hidden states at the last prompt token under plain fine-tuning, mean "
        "over seeds. The dotted line is the share that one random direction would have.",
        f"Line chart by block, logarithmic. {words}; a random direction: {chance:.2%}.",
        partial(_plot_shares, shares, chance),
    )


def _plot_shares(shares: dict[str, np.ndarray], chance: float) -> Figure:
    figure = plot_by_block(shares, "share of the squared displacement", chance)
    (axes,) = figure.axes
    axes.set_yscale("log")
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
    """Both measures by alpha, and one against the other: a row of panels per recipe, a line per kind of directions."""
    figure = new_figure(0.8 + 2.6 * len(sweeps))
    grid = figure.subplots(len(sweeps), 3, squeeze=False, sharey=True)
    kinds = list(dict.fromkeys(kind for sweep in sweeps for kind in sweep.methods))
    for (refusal, task, exchange), sweep in zip(grid, sweeps, strict=True):
        for place, kind in enumerate(kinds):
            if kind in sweep.methods:
                style = {"marker": "o", "markersize": 3, "label": _KINDS[kind], **_style(place)}
                alphas, refusals = _curve(sweep, kind, runs, REFUSAL)
                _, tasks = _curve(sweep, kind, runs, TASK)
                refusal.plot(alphas, refusals, **style)
                task.plot(alphas, tasks, **style)
                exchange.plot(tasks, refusals, **style)
        title = sweep.title_among(sweeps)
        for axes, measure, name in ((refusal, REFUSAL, "refusal of malicious"), (task, TASK, "task accuracy")):
            if plain:
                axes.axhline(values(plain, measure).mean(), color=INK, linewidth=0.8, linestyle=":", label="IFT")
            _by_alpha(axes, f"{name}, {title}" if title else name, sweep.alphas)
        exchange.set_title("refusal by task accuracy")
        exchange.set_xlabel("task accuracy")
        exchange.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        refusal.set_ylim(-0.03, 1.03)
        refusal.yaxis.set_major_formatter(PercentFormatter(1))
    legend_above(figure)
    return figure


def _by_alpha(axes: Axes, title: str, alphas: Sequence[float]) -> None:
    axes.set_title(title)
    axes.set_xscale("log")
    axes.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("alpha")
