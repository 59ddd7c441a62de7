"""Plots of runs: rates, drift, loss and penalty."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import fill, shorten
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from procon.report.page import COLOURS, DASHES, INK, legend_above, new_figure, whole_numbers
from procon.report.run import Run

RATE_KEYS = {
    "procon/refusal_malicious": "refusal of malicious",
    "procon/refusal_benign": "refusal of benign",
    "procon/task": "task accuracy",
}

#: What is drawn of the loss.
PLAIN_LOSS = "training loss without the penalty"

_MEASURE_COLOURS = ("#1c8c96", "#c4607e", "#8b8a2f")


def plot_rates(runs: Sequence[Run]) -> Figure:
    """Bars of refusal and task accuracy per run, with 95% intervals."""
    figure = new_figure(0.9 + 0.8 * len(runs))
    axes = figure.subplots()
    names = ("refusal of malicious", "refusal of benign", "task accuracy")
    thickness = 0.26
    for bar, (name, colour) in enumerate(zip(names, _MEASURE_COLOURS, strict=True)):
        rates = [
            None if found is None else (found.refusal_malicious, found.refusal_benign, found.task)[bar]
            for found in (run.evaluation for run in runs)
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
                f"{rate.value:.0%}", (rate.interval[1], place), (5, 0), textcoords="offset points", va="center"
            )
    axes.set_yticks(range(len(runs)), [fill(shorten(run.label, 60), 15) for run in runs])
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.set_xlim(0, 1.15)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1])
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    legend_above(figure)
    return figure


def plot_drift_by_block(runs: Sequence[Run]) -> Figure:
    """Signed cosine to the initial direction, block by block, one line per run."""
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
    """Mean cosine to the initial direction over training and, if it was logged, alpha beneath."""
    if logged(runs, "procon/alpha"):
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
    """Refusal and task accuracy over training: one panel per measure, one line per run."""
    keys = [key for key in RATE_KEYS if logged(runs, key)]
    figure = new_figure(0.8 + 1.6 * len(keys))
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(panels, keys, strict=True):
        _draw_series(axes, runs, key)
        axes.set_title(RATE_KEYS[key])
        axes.set_ylim(-0.03, 1.03)
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    panels[-1].set_xlabel("optimiser step")
    legend_above(figure)
    return figure


def plot_loss_and_penalty(runs: Sequence[Run]) -> Figure:
    """Loss without the penalty, and the penalty, over training: a panel each; only those that were logged."""
    names = {"loss": PLAIN_LOSS, "procon/penalty": "constraint penalty, before alpha"}
    keys = [key for key in names if logged(runs, key)]
    figure = new_figure(0.8 + 1.8 * len(keys))
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(panels, keys, strict=True):
        _draw_series(axes, runs, key)
        axes.set_title(names[key])
        axes.set_ylim(bottom=0)
    panels[-1].set_xlabel("optimiser step")
    legend_above(figure)
    return figure


def logged(runs: Sequence[Run], *keys: str) -> bool:
    return any(run.series(key)[0] for run in runs for key in keys)


def _styled(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """Each run with the label, colour and dash that it has in every plot."""
    return [
        (
            run,
            {
                # Without a space before it, matplotlib leaves out what is empty or begins with an underscore.
                "label": run.label if run.label[:1] not in ("", "_") else f" {run.label}",
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": DASHES[place % len(DASHES)],
                "linewidth": 1.8,
            },
        )
        for place, run in enumerate(runs)
    ]


def _draw_series(axes: Axes, runs: Sequence[Run], key: str, *, stepped: bool = False) -> None:
    for run, style in _styled(runs):
        steps, values = run.plain_loss() if key == "loss" else run.series(key)
        if steps and stepped:
            # A row is about the steps that led up to it.
            axes.plot(steps, values, drawstyle="steps-pre", **style)
        elif steps:
            axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=3, **style)
    axes.xaxis.set_major_locator(whole_numbers())
