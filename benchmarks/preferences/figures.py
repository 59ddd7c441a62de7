"""The plot of an algorithm: progress over training, and refusals against what was learned."""

from __future__ import annotations

from functools import partial

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.preferences.learned import PROGRESS, REWARD
from benchmarks.study.figures import Drawing
from benchmarks.study.intervals import Estimate
from benchmarks.study.outcomes import REFUSAL, Outcomes, values
from benchmarks.study.plan import Part
from procon.report.page import COLOURS, DASHES, legend_above, new_figure, whole_numbers

_MARKERS = "osD^vP*"

#: A method's steps and progress; and its held-out reward and refusals.
_Line = tuple[list[int], np.ndarray]
_Point = tuple[Estimate, Estimate]


def drawing(part: Part, job: str, outcomes: Outcomes) -> Drawing:
    """Of the methods of a part that were run."""
    found = {method.label: runs for method in part.methods if (runs := outcomes.of(part, job, method.name))}
    trained = {method.label for method in part.methods if method.length}
    progress = PROGRESS[job]
    lines = {label: progress.curve(runs) for label, runs in found.items() if label in trained}
    points = {
        label: (Estimate.of(values(runs, REWARD)), Estimate.of(values(runs, REFUSAL))) for label, runs in found.items()
    }
    words = "; ".join(
        f"{label}: reward {reward.mean:.2f}, refuses {refusal.mean:.0%}" for label, (reward, refusal) in points.items()
    )
    return Drawing(
        part.name,
        f"Above: the {progress.label} over training, as logged, mean over seeds. Below: refusals of malicious prompts "
        "against the reward of replies to held-out problems, with 95% intervals.",
        f"Line chart and scatter plot. {words}.",
        partial(plot, lines, points, progress.label),
    )


def plot(lines: dict[str, _Line], points: dict[str, _Point], label: str) -> Figure:
    """Progress by step (above), refusal by reward (below); a method has one colour in both."""
    figure = new_figure(6.6)
    above, below = figure.subplots(2)
    for place, (name, (reward, refusal)) in enumerate(points.items()):
        colour = COLOURS[place % len(COLOURS)]
        if name in lines:
            above.plot(*lines[name], color=colour, linestyle=DASHES[place % len(DASHES)], linewidth=1.8)
        below.errorbar(
            reward.mean,
            refusal.mean,
            xerr=_whiskers(reward.mean, reward.interval),
            yerr=_whiskers(refusal.mean, refusal.rate_interval),
            fmt=_MARKERS[place % len(_MARKERS)],
            color=colour,
            elinewidth=0.8,
            label=name,
        )
    above.set_xlabel("optimiser step")
    above.set_ylabel(label)
    above.xaxis.set_major_locator(whole_numbers())
    below.set_xlabel("reward of replies to held-out problems")
    below.set_ylabel("refusal of malicious prompts")
    below.set_ylim(-0.03, 1.03)
    below.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_above(figure)
    return figure


def _whiskers(mean: float, interval: tuple[float, float]) -> list[list[float]]:
    return [[mean - interval[0]], [interval[1] - mean]]
