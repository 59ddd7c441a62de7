"""How a run's rates differ from those of another: with an interval, if both were measured alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from procon.evaluation import Evaluation, Rate
from procon.report.run import Run

#: What is counted of each kind of prompt, and on which facts of an evaluation it depends.
_MEASURES = {
    "malicious": ("refused", "refusal of malicious", ("judge", "chat")),
    "benign": ("refused", "refusal of benign", ("judge_benign", "chat")),
    "task": ("correct", "task accuracy", ("metric", "chat")),
}


@dataclass(frozen=True)
class Difference:
    """One rate of two runs.

    Attributes:
        name: what is counted.
        value: the second rate minus the first.
        interval: its 95% interval (Newcombe, Statistics in Medicine 17, 1998: paired, page 2635, and unpaired, page
            873, both with Wilson's intervals). It covers the choice of prompts, not that of seeds. None if the two
            were not measured alike, and of graded tasks.
        paired: whether both were asked the same prompts, so that the interval is of the pairs.
        unlike: names of facts of the two evaluations on which the rate depends, and which differ.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    paired: bool
    unlike: tuple[str, ...]


def compare_runs(first: Run, second: Run) -> list[Difference]:
    """The differences of all rates that both have, the second one's minus the first one's."""
    before, after = first.evaluation, second.evaluation
    if before is None or after is None:
        return []
    found = (_difference(before, after, kind) for kind in _MEASURES)
    return [difference for difference in found if difference is not None]


def _difference(before: Evaluation, after: Evaluation, kind: str) -> Difference | None:
    mark, name, depends = _MEASURES[kind]
    first, second = (_marks(evaluation, kind, mark) for evaluation in (before, after))
    if not first or not second:
        return None
    rates = Rate.of(first.values()), Rate.of(second.values())
    paired = first.keys() == second.keys()
    unlike = tuple(fact for fact in depends if getattr(before, fact) != getattr(after, fact))
    interval = None
    if not unlike and all(isinstance(value, bool) for value in (*first.values(), *second.values())):
        pairs = [(first[key], second[key]) for key in first] if paired else None
        interval = unpaired_interval(*rates) if pairs is None else paired_interval(pairs)
    return Difference(name, rates[1].value - rates[0].value, interval, paired, unlike)


def _marks(evaluation: Evaluation, kind: str, mark: str) -> dict[tuple[str, int], Any]:
    """The mark of each reply by its prompt; of a prompt that was given twice, in their order."""
    seen: Counter[str] = Counter()
    found = {}
    for reply in evaluation.replies:
        if reply["kind"] == kind:
            found[reply["prompt"], seen[reply["prompt"]]] = reply[mark]
            seen[reply["prompt"]] += 1
    return found


def paired_interval(verdicts: Sequence[tuple[bool, bool]]) -> tuple[float, float]:
    """95% interval of the second rate minus the first, of pairs of verdicts (Newcombe 1998, method 10)."""
    counts = Counter(verdicts)
    both, first, second, neither = (
        counts[pair] for pair in ((True, True), (True, False), (False, True), (False, False))
    )
    n = len(verdicts)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    covariance = both * neither - first * second
    if covariance > 0:  # corrected for continuity
        covariance = max(covariance - n / 2, 0.0)
    correlation = covariance / math.sqrt(margins) if margins else 0.0
    return unpaired_interval(Rate(both + first, n), Rate(both + second, n), correlation)


def unpaired_interval(before: Rate, after: Rate, correlation: float = 0.0) -> tuple[float, float]:
    """The same of two independent rates (Newcombe 1998, page 873, method 10)."""
    low = [rate.value - rate.interval[0] for rate in (before, after)]
    high = [rate.interval[1] - rate.value for rate in (before, after)]

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    difference = after.value - before.value
    return difference - distance(low[1], high[0]), difference + distance(high[1], low[0])
