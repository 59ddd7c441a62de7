"""The long page of DPO and GRPO: what was learned, by the log and on problems that were not seen, and what was kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from benchmarks.preferences.data import ENDS_WITH_NUMBER, FAR, HAS_NUMBER, IS_RIGHT
from benchmarks.preferences.trial import ALGORITHMS, DPO, GRPO
from benchmarks.study.figures import Drawing
from benchmarks.study.intervals import Estimate
from benchmarks.study.outcomes import REFUSAL, Measure, Outcomes, values
from benchmarks.study.plan import Budget, Part
from benchmarks.study.sections import Gallery
from benchmarks.study.table import (
    NONE,
    Table,
    by_method,
    folded,
    judged_table,
    kept_table,
    over_blocks,
    seeds_cell,
    time_cell,
)
from procon.report.page import COLOURS, DASHES, legend_above, new_figure, whole_numbers

READING = f"""\
Refusals and task are measured by greedy replies to malicious prompts that served neither for training nor for
choices, and to their benign twins. Below a mean is its 95% interval: for other seeds and other prompts, or, if one
seed was run, for other prompts alone.

- *second judge*: a small classifier trained on replies labelled by hand.
- *log-odds*: the readiness to refuse, by the first token of the reply.
- *task*: replies to held-out problems whose last number is the right one.
- *reward*: {HAS_NUMBER} for a number, {ENDS_WITH_NUMBER} for a finished reply that ends with one, and up to {IS_RIGHT}
  for how near it is to the right one: all if it is right, nothing if it is wrong by {FAR} or more. GRPO is paid by it;
  *in training* it is the mean over the last ten steps' samples.
- *margin*: how much more the log-probability of the chosen reply has risen than that of the rejected one, times DPO's
  beta; *pairs right* is the share of held-out pairs in which it has.
- *KL*: to the starting model, as GRPO logs it if it has a beta.
- *cosine* and *shift*: of refusal directions, and along them, in units of the gap between malicious and benign.
- *time*: of training, on a machine that had other work; it separates long from short, and no more.

The starting model over-refuses: it takes many of the arithmetic problems for something that it should not help with. So
both algorithms are paid for unlearning refusals of these prompts."""

#: Of each reply to a held-out problem.
REWARD = Measure("reward", ("task",), "reward", rate=False)


@dataclass(frozen=True)
class Progress:
    """What the log has of an algorithm's progress.

    Attributes:
        key: in the log.
        label: in tables and on axes.
    """

    key: str
    label: str

    def curve(self, runs: dict[int, dict]) -> tuple[list[int], np.ndarray]:
        """Steps, and the mean over seeds at each."""
        histories = [run["history"] for run in runs.values()]
        return [row["step"] for row in histories[0]], np.mean([[row[self.key] for row in h] for h in histories], 0)

    def final(self, runs: dict[int, dict], rows: int = 2) -> float:
        """The mean over seeds and the last rows of the log."""
        return float(self.curve(runs)[1][-rows:].mean())


PROGRESS = {
    DPO.name: Progress("rewards/margins", "margin"),
    GRPO.name: Progress("reward", "reward"),
}

_MARKERS = "osD^vP*"

_Runs = dict[int, dict]

#: A method's steps and progress; and its held-out reward and refusals.
_Line = tuple[list[int], np.ndarray]
_Point = tuple[Estimate, Estimate]


def preferences_sections(plan: Budget, outcomes: Outcomes, figure: Gallery) -> list[str]:
    """The page's sections, as Markdown. Parts without runs are left out."""
    sections = ["## How to read the tables", READING]
    for part in plan.parts:
        (job,) = part.jobs
        if not outcomes.has(part, job):
            continue
        sections += [f"## {part.title}", _question(part, ALGORITHMS[job].recipe)]
        sections += [kept_table(part, job, outcomes).markdown(), learned_table(part, job, outcomes).markdown()]
        sections.append(figure(drawing(part, job, outcomes)))
        sections.append(
            folded("Second judge, log-odds, degenerate replies", judged_table(part, job, outcomes).markdown())
        )
        sections.append(folded("Drift, time, seeds", moved_table(part, job, outcomes).markdown()))
    return sections


def _question(part: Part, recipe: dict[str, Any]) -> str:
    settings = ", ".join(f"`{name}={value}`" for name, value in recipe.items())
    split = "" if part.split == "held_out" else f" Measured on the {part.split} prompts, which serve for choices."
    return f"{part.question}{split} All methods: {settings}; the rest is TRL's default."


def learned_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Progress by the log, and on held-out problems and pairs; no column that has nothing to say."""
    progress = PROGRESS[job]
    columns: list[tuple[str, Callable[[_Runs], str]]] = [
        (f"{progress.label} in training", lambda runs: f"{progress.final(runs):.2f}" if _trained(runs) else NONE),
        ("reward, held-out", _reward),
        ("pairs right, held-out", lambda runs: _of_pairs(runs, "accuracies", "{:.0%}")),
        ("margin, held-out", lambda runs: _of_pairs(runs, "margins", "{:.1f}")),
        ("KL in training", lambda runs: _logged(runs, "kl")),
    ]
    table = by_method(part, job, outcomes, columns)
    # What no method of this algorithm has is left out.
    shown = [i for i in range(len(columns) + 1) if i == 0 or any(row[i] != NONE for row in table.rows)]
    return Table([table.header[i] for i in shown], [[row[i] for i in shown] for row in table.rows])


def moved_table(part: Part, job: str, outcomes: Outcomes) -> Table:
    """Drift, time and seeds."""
    columns: list[tuple[str, Callable[[_Runs], str]]] = [
        ("cosine", lambda runs: over_blocks(runs, "drift", "cosine", "{:.3f}")),
        ("shift", lambda runs: over_blocks(runs, "drift", "malicious_shift", "{:+.2f}")),
        ("time", time_cell),
        ("seeds", seeds_cell),
    ]
    return by_method(part, job, outcomes, columns)


def _trained(runs: _Runs) -> bool:
    return all("history" in run for run in runs.values())


def _reward(runs: _Runs) -> str:
    found = Estimate.of(values(runs, REWARD))
    low, high = found.interval
    return f"{found.mean:.2f}<br>{low:.2f} to {high:.2f}"


def _of_pairs(runs: _Runs, name: str, form: str) -> str:
    found = [run["pairs"][name] for run in runs.values() if "pairs" in run]
    return form.format(np.mean(found)) if found else NONE


def _logged(runs: _Runs, key: str) -> str:
    """Over the seeds, what the log has last."""
    found = [run["history"][-1][key] for run in runs.values() if key in run.get("history", [{}])[-1]]
    return f"{np.mean(found):.2f}" if found else NONE


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
