"""Shares of replies with their intervals, and whether a task reply is right: exact match, ROUGE-L, or a function."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from procon.errors import ProConError

#: Two-sided 95% quantile of the standard normal distribution.
Z_95 = 1.959963984540054

#: From a reply and its reference, whether it is right, or how good it is, 0 to 1.
Metric = Callable[[str, str], bool | float]


@dataclass(frozen=True)
class Rate:
    """A share of replies, with the counts that it comes from; or a mean mark, with the sum of the marks as ``hits``.

    Raises:
        ProConError: unless ``0 <= hits <= total`` and ``total > 0``: a share of nothing has no value.
    """

    hits: int | float
    total: int

    def __post_init__(self) -> None:
        if type(self.hits) not in (int, float) or type(self.total) is not int or not 0 < self.total < 2**53:
            raise ProConError(f"{self.hits!r:.40} hits among {self.total!r:.40} replies is no rate: give one at least")
        if not 0 <= self.hits <= self.total:
            raise ProConError(f"{self.hits} hits among {self.total} replies is no rate: at most all can be hits")

    @classmethod
    def of(cls, outcomes: Iterable[bool | float]) -> Rate:
        """The share of ``outcomes`` that are true, or the mean of marks.

        Raises:
            ProConError: without any; for a mark that is not from 0 to 1.
        """
        outcomes = list(outcomes)
        for outcome in outcomes:
            if not 0 <= outcome <= 1:
                raise ProConError(f"mark {outcome!r:.40} is not from 0 to 1: give true, false or such a number")
        graded = any(type(outcome) is float for outcome in outcomes)
        return cls(math.fsum(outcomes) if graded else sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """``hits / total``, 0 to 1."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval (JASA 22, 1927): unlike ``p +- 2 se`` it stays within 0 to 1 and has width at 0 and 1.

        It covers the choice of prompts alone, not the spread between training seeds. Of marks it is wide: their
        variance is at most that of a share.
        """
        n, p = self.total, self.value
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        return (0.0 if self.hits == 0 else centre - half), (1.0 if self.hits == n else centre + half)

    def __str__(self) -> str:
        return f"{self.value:.0%} ({round(self.hits, 1)}/{self.total})"


def extract_answer(text: str) -> str:
    """The final answer of ``text``: what follows its last "Answer:" on that line, or else the whole text.

    Normalised for comparison: lower case, single spaces, no full stop at the end, no commas between thousands.
    """
    marked = re.findall(r"answer:[^\S\n]*([^\n]*)", text, flags=re.IGNORECASE)
    answer = " ".join((marked[-1] if marked else text).casefold().split()).rstrip(". ")
    return re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", answer)


def exact_match(reply: str, reference: str) -> bool:
    """Whether ``reply`` and ``reference`` come to the same final answer."""
    return extract_answer(reply) == extract_answer(reference)


def rouge_l(reply: str, reference: str) -> float:
    """ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, 0 to 1; two texts without words give 0.

    Words are runs of a to z and 0 to 9 in lower case, without stemming, as in Google's ``rouge-score``.
    """
    words, known = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reply, reference))
    common = _common_subsequence(words, known)
    return 2 * common / (len(words) + len(known)) if common else 0.0


def _common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0
        for place, other in enumerate(second, 1):
            before, lengths[place] = (
                lengths[place],
                before + 1 if word == other else max(lengths[place], lengths[place - 1]),
            )
    return lengths[-1]


#: Metrics by name.
METRICS: dict[str, Metric] = {"exact": exact_match, "rouge-l": rouge_l}


def find_metric(metric: str | Metric) -> tuple[str, Metric]:
    """A metric and its name.

    Raises:
        ProConError: if there is none of that name.
    """
    if callable(metric):
        return getattr(metric, "__name__", type(metric).__name__), metric
    if metric not in METRICS:
        raise ProConError(f"there is no task metric {metric!r:.60}: choose {', '.join(METRICS)}, or pass a function")
    return metric, METRICS[metric]
