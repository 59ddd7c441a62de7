"""How a strength that sets itself went through training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from benchmarks.study.figures import Drawing
from benchmarks.study.methods import Method
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.plan import Part
from procon.report.page import COLOURS, DASHES, INK, legend_above, new_figure
from procon.schedule import AlphaSchedule


@dataclass(frozen=True)
class Trace:
    """One run under ``hold``.

    Attributes:
        label: of its method.
        budget: that it keeps to.
        steps, alphas, shifts: by row of the log.
    """

    label: str
    budget: float
    steps: list[int]
    alphas: list[float]
    shifts: list[float]

    @classmethod
    def of(cls, method: Method, run: dict) -> Trace:
        """From a run file."""
        rows = [row for row in run["history"] if "procon/shift" in row]
        columns = ([row[key] for row in rows] for key in ("step", "procon/alpha", "procon/shift"))
        return cls(method.label, budget_of(method) or 0.0, *columns)


def budget_of(method: Method) -> float | None:
    """What ``hold`` keeps to; None if the strength of the method is fixed."""
    schedule = method.config.get("procon_schedule")
    return None if schedule is None else AlphaSchedule.parse(schedule).hold


def trace_drawings(part: Part, job: str, outcomes: Outcomes) -> list[Drawing]:
    """Alpha and shift of each method under ``hold``, one line a run; no figure without such runs."""
    held = [method for method in part.methods if budget_of(method) is not None]
    traces = [Trace.of(method, run) for method in held for run in outcomes.of(part, job, method.name).values()]
    if not traces:
        return []
    words = "; ".join(
        f"{trace.label}: alpha {trace.alphas[0]:.3g} to {trace.alphas[-1]:.3g}, shift {trace.shifts[-1]:.3g} at the end"
        for trace in traces
    )
    caption = (
        "Left: alpha over the steps. Right: the moving average of the training tokens' shift, over its budget, which "
        "is the dotted line. One line a run."
    )
    alt = f"Two line charts by optimiser step. {words}."
    return [Drawing(f"{part.name}-{job}-trace", caption, alt, partial(plot_traces, traces))]


def plot_traces(traces: Sequence[Trace]) -> Figure:
    """Alpha, and shift over budget, by step; both logarithmic, as is what ``hold`` does."""
    figure = new_figure(3.4)
    left, right = figure.subplots(1, 2)
    labels = list(dict.fromkeys(trace.label for trace in traces))
    for trace in traces:
        place = labels.index(trace.label)
        style = {"color": COLOURS[place % len(COLOURS)], "linestyle": DASHES[place % len(DASHES)], "linewidth": 1.2}
        left.plot(trace.steps, trace.alphas, label=trace.label, **style)
        right.plot(trace.steps, [shift / trace.budget for shift in trace.shifts], **style)
    right.axhline(1, color=INK, linewidth=0.8, linestyle=":")
    for axes, label in ((left, "alpha"), (right, "shift over budget")):
        axes.set_yscale("log")
        # matplotlib's own labels are TeX, which SVG text is not.
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("optimiser step")
        axes.set_ylabel(label)
    legend_above(figure)
    return figure
