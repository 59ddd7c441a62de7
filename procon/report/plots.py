"""Plots of runs: rates, drift by block, and what was logged in training."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from textwrap import fill, shorten
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from procon.report.page import COLOURS, DASHES, INK, legend_above, new_figure, whole_numbers
from procon.report.run import Run

#: Panels of what was logged, by key.
LOSSES = {
    "loss": "training loss, with the constraint's part",
    "procon/penalty": "constraint penalty, before alpha",
    "procon/alpha": "alpha",
}
MEASURES = {
    "procon/drift_cos": "mean cosine to the initial directions",
    "procon/refusal_malicious": "refusal of malicious",
    "procon/refusal_benign": "refusal of benign",
    "procon/task": "task accuracy",
}

_BARS = {
    "refusal of malicious": ("refusal_malicious", "#1c8c96"),
    "refusal of benign": ("refusal_benign", "#c4607e"),
    "task accuracy": ("task", "#8b8a2f"),
}


def plot_rates(runs: Sequence[Run]) -> Figure:
    """Bars of refusal and task accuracy per run, with 95% intervals."""
    figure = new_figure(0.9 + 0.8 * len(runs))
    axes = figure.subplots()
    for bar, (name, (field, colour)) in enumerate(_BARS.items()):
        rates = {place: getattr(run.evaluation, field) for place, run in enumerate(runs) if run.evaluation}
        rates = {place + 0.26 * (bar - 1): rate for place, rate in rates.items() if rate is not None}
        if not rates:
            continue
        values = [rate.value for rate in rates.values()]
        low, high = zip(*(rate.interval for rate in rates.values()), strict=True)
        errors = [
            [value - end for value, end in zip(values, low, strict=True)],
            [end - value for value, end in zip(values, high, strict=True)],
        ]
        whiskers = {"ecolor": INK, "elinewidth": 1, "capsize": 2}
        axes.barh(list(rates), values, height=0.23, color=colour, label=name, xerr=errors, error_kw=whiskers)
        for place, rate in rates.items():
            end = (rate.interval[1], place)
            axes.annotate(f"{rate.value:.0%}", end, (5, 0), textcoords="offset points", va="center")
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


def plot_log(runs: Sequence[Run], names: dict[str, str]) -> Figure:
    """What was logged over training: one panel for each key that was, one line per run."""
    keys = logged(runs, names)
    figure = new_figure(0.8 + 1.5 * len(keys))
    panels = figure.subplots(len(keys), sharex=True, squeeze=False)[:, 0]
    for axes, key in zip(panels, keys, strict=True):
        for run, style in _styled(runs):
            steps, values = run.series(key)
            # A row is about the steps that led up to it.
            drawn = "steps-pre" if key == "procon/alpha" else "default"
            if steps:
                axes.plot(steps, values, drawstyle=drawn, marker="." if len(steps) < 30 else None, **style)
        axes.set_title(names[key])
        if key != "procon/drift_cos":
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(whole_numbers())
    panels[-1].set_xlabel("optimiser step")
    legend_above(figure)
    return figure


def logged(runs: Sequence[Run], names: dict[str, str]) -> list[str]:
    """The keys that were logged."""
    return [key for key in names if any(run.series(key)[0] for run in runs)]


def _styled(runs: Sequence[Run]) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Each run with the label, colour and dash that it has in every plot."""
    for place, run in enumerate(runs):
        label = shorten(run.label, 120)
        yield (
            run,
            {
                # Without a space before it, matplotlib leaves out what is empty or begins with an underscore.
                "label": label if label[:1] not in ("", "_") else f" {label}",
                "color": COLOURS[place % len(COLOURS)],
                "linestyle": DASHES[place % len(DASHES)],
                "linewidth": 1.8,
            },
        )
