"""Contenders timed in turn, and the ratios of their times.

The speed of a machine varies by more than the differences that are looked for here. So every round times each
contender once, in an order that rotates, and a ratio is taken within its round.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

_RESAMPLES = 10_000


class Ratio(NamedTuple):
    """Median of the paired ratios, and its 95% bootstrap interval."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Samples:
    """Seconds per call: one number per contender and round."""

    seconds: dict[str, list[float]]

    def ratio(self, contender: str, baseline: str) -> Ratio:
        """Time of ``contender`` over that of ``baseline``."""
        ratios = np.array(self.seconds[contender]) / np.array(self.seconds[baseline])
        draws = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
        low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
        return Ratio(float(np.median(ratios)), float(low), float(high))


def interleave(
    contenders: Mapping[str, Callable[[], object]],
    timer: Callable[[Callable[[], object], int], float],
    *,
    rounds: int,
    warmup: int = 2,
    sample_seconds: float = 0.0,
    most_calls: int = 1000,
) -> Samples:
    """Time every contender ``rounds`` times.

    Args:
        contenders: functions to call, by name.
        timer: seconds per call, from the function and a number of calls (see :mod:`benchmarks.harness.timers`).
        warmup: samples of each contender that are thrown away.
        sample_seconds: how long a sample should take at least; a short function is called several times per sample.
        most_calls: the most calls per sample.
    """
    calls = {}
    for name, call in contenders.items():
        timer(call, 1)
        seconds = min(timer(call, 1) for _ in range(max(warmup, 1)))
        calls[name] = int(min(max(sample_seconds / seconds, 1), most_calls))
    names = list(contenders)
    samples = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds):
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                samples[name].append(timer(contenders[name], calls[name]))
    finally:
        if collecting:
            gc.enable()
    return Samples(samples)
