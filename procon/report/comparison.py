"""Two runs compared: rates with the interval of their difference, verdicts that flipped, figures, and settings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from procon.evaluation import Evaluation, Rate
from procon.report.sources import EVALUATION, Source, measured_by

#: What is counted of each kind of prompt, what it is called, and which of these the others alone depend on.
_MEASURES = {
    "malicious": ("refused", "refusal of malicious", {"judge_benign", "metric"}),
    "benign": ("refused", "refusal of benign", {"judge", "metric"}),
    "task": ("correct", "task accuracy", {"judge", "judge_benign"}),
}


@dataclass(frozen=True)
class Flip:
    """A prompt that the runs came to different verdicts on; ``before`` and ``after`` are those of either run."""

    prompt: str
    before: bool
    after: bool
    replies: tuple[str, str]


@dataclass(frozen=True)
class Difference:
    """One rate of two runs.

    Attributes:
        name: what is counted.
        before, after: the rate of the first and the second run.
        interval: 95% interval of ``after - before`` (Newcombe, Statistics in Medicine 17, 1998: paired, page 2635,
            and unpaired, page 873, both with Wilson's intervals). It covers the choice of prompts, not that of seeds.
            None if they were not measured alike.
        paired: whether both were asked the same prompts, so that the interval is of the pairs.
        flips: where the verdicts differ, in the order of the prompts; empty if they are not paired.
        unlike: names of settings of the two evaluations on which the rate depends, and which differ.
    """

    name: str
    before: Rate
    after: Rate
    interval: tuple[float, float] | None
    paired: bool
    flips: list[Flip]
    unlike: list[str] = field(default_factory=list)

    @property
    def value(self) -> float:
        """The second rate minus the first."""
        return self.after.value - self.before.value


@dataclass(frozen=True)
class Comparison:
    """Two runs, the first one before the second.

    Attributes:
        labels: their names.
        differences: of each rate that both have.
        figures: by name, of either run; None if it is not known.
        settings: those that differ, of either run; None if it does not have it. If they were read from files of two
            kinds, only what both kinds say is compared.
        known: whether both runs say what they were made by, beside their evaluations.
    """

    labels: tuple[str, str]
    differences: list[Difference]
    figures: dict[str, tuple[float | None, float | None]]
    settings: dict[str, tuple[Any, Any]]
    known: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, for JSON."""
        data = asdict(self)
        for row, difference in zip(data["differences"], self.differences, strict=True):
            row["difference"] = difference.value
        return data


def compare_runs(before: Source, after: Source) -> Comparison:
    """Compare two runs."""
    first, second = before.run, after.run
    names = [*before.settings, *(name for name in after.settings if name not in before.settings)]
    if before.kind != after.kind:  # whose names are not all the same
        names = [name for name in before.settings if name in after.settings]
    return Comparison(
        labels=(first.label, second.label),
        differences=_differences(first.evaluation, second.evaluation),
        figures={name: (_finite(find(first)), _finite(find(second))) for name, find in _FIGURES.items()},
        settings={
            name: (before.settings.get(name), after.settings.get(name))
            for name in names
            if before.settings.get(name) != after.settings.get(name)
        },
        known=all(any(not name.startswith(EVALUATION) for name in side.settings) for side in (before, after)),
    )


def _last(key: str) -> Any:
    """The last finite value of a series in the log."""
    return lambda run: next(iter(reversed(run.series(key)[1])), None)


_FIGURES = {
    "mean cosine": lambda run: run.mean_cosine,
    "last loss": _last("loss"),
    "last penalty": _last("procon/penalty"),
    "last alpha": _last("procon/alpha"),
    "seconds per step": lambda run: run.seconds_per_step,
}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else value


def _differences(first: Evaluation | None, second: Evaluation | None) -> list[Difference]:
    if first is None or second is None:
        return []
    found, by = [], [measured_by(evaluation) for evaluation in (first, second)]
    differing = [name for name in by[0] if name in by[1] and by[0][name] != by[1][name]]
    for kind, (mark, name, of_others) in _MEASURES.items():
        replies = [
            [reply for reply in side.replies if reply["kind"] == kind and mark in reply] for side in (first, second)
        ]
        if all(replies):
            row = _difference(name, mark, *replies)
            unlike = [setting for setting in differing if setting.removeprefix(EVALUATION) not in of_others]
            found.append(replace(row, interval=None, paired=False, flips=[], unlike=unlike) if unlike else row)
    return found


def _difference(name: str, mark: str, first: list[dict[str, Any]], second: list[dict[str, Any]]) -> Difference:
    before, after = (Rate.of(bool(reply[mark]) for reply in replies) for replies in (first, second))
    pairs = _pairs(first, second)
    if pairs is None:
        return Difference(name, before, after, unpaired_interval(before, after), False, [])
    verdicts = [(bool(one[mark]), bool(other[mark])) for one, other in pairs]
    flips = [
        Flip(one["prompt"], *verdict, (one["reply"], other["reply"]))
        for (one, other), verdict in zip(pairs, verdicts, strict=True)
        if verdict[0] != verdict[1]
    ]
    return Difference(name, before, after, paired_interval(verdicts), True, flips)


def _pairs(first: Sequence[dict[str, Any]], second: Sequence[dict[str, Any]]) -> list[tuple[dict, dict]] | None:
    """Replies to one prompt each; None unless both have the same prompts. Of a prompt given twice, in their order."""
    keys = [_numbered(reply["prompt"] for reply in replies) for replies in (first, second)]
    if set(keys[0]) != set(keys[1]):
        return None
    other = dict(zip(keys[1], second, strict=True))
    return [(reply, other[key]) for key, reply in zip(keys[0], first, strict=True)]


def _numbered(prompts: Iterable[str]) -> list[tuple[str, int]]:
    seen: Counter[str] = Counter()
    found = []
    for prompt in prompts:
        found.append((prompt, seen[prompt]))
        seen[prompt] += 1
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
    return _interval(Rate(both + first, n), Rate(both + second, n), correlation)


def unpaired_interval(before: Rate, after: Rate) -> tuple[float, float]:
    """The same of two independent rates (Newcombe 1998, page 873, method 10)."""
    return _interval(before, after, 0.0)


def _interval(before: Rate, after: Rate, correlation: float) -> tuple[float, float]:
    low = [rate.value - rate.interval[0] for rate in (before, after)]
    high = [rate.interval[1] - rate.value for rate in (before, after)]

    def distance(one: float, other: float) -> float:
        return math.sqrt(max(one**2 - 2 * correlation * one * other + other**2, 0.0))

    difference = after.value - before.value
    return difference - distance(low[1], high[0]), difference + distance(high[1], low[0])
