"""Shares and means of replies, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from procon.errors import ProConError

#: Two-sided 95% quantile of the standard normal distribution.
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Rate:
    """A share of replies, with the counts that it comes from.

    Raises:
        ProConError: unless ``0 <= hits <= total`` and ``total > 0``: a share of nothing has no value.
    """

    hits: int
    total: int

    def __post_init__(self) -> None:
        if any(type(count) is not int for count in (self.hits, self.total)) or self.total >= 2**53:
            raise ProConError(f"{self.hits!r:.40} hits among {self.total!r:.40} replies is no rate: give whole numbers")
        if not 0 <= self.hits <= self.total or self.total == 0:
            raise ProConError(f"{self.hits} hits among {self.total} replies is no rate: at least one reply is needed")

    @classmethod
    def of(cls, outcomes: Iterable[bool]) -> Rate:
        """The share of ``outcomes`` that are true."""
        outcomes = list(outcomes)
        return cls(sum(outcomes), len(outcomes))

    @property
    def value(self) -> float:
        """``hits / total``, 0 to 1."""
        return self.hits / self.total

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95% interval (JASA 22, 1927): unlike ``p +- 2 se`` it stays within 0 to 1 and has width at 0 and 1.

        It covers the choice of prompts alone, not the spread between training seeds.
        """
        n, p = self.total, self.value
        centre = (p + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * math.sqrt(p * (1 - p) / n + Z_95**2 / (4 * n**2))
        return (0.0 if self.hits == 0 else centre - half), (1.0 if self.hits == n else centre + half)

    def __str__(self) -> str:
        return f"{self.value:.0%} ({self.hits}/{self.total})"


@dataclass(frozen=True)
class Mean:
    """A mean of marks from 0 to 1, as graded metrics give them.

    Attributes:
        value: the mean.
        deviation: the marks' standard deviation (of the sample, by ``total - 1``); 0 of one mark.
        total: how many marks.

    Raises:
        ProConError: unless the numbers are of marks from 0 to 1.
    """

    value: float
    deviation: float
    total: int

    def __post_init__(self) -> None:
        numbers = (self.value, self.deviation)
        if type(self.total) is not int or self.total < 1 or not all(isinstance(n, int | float) for n in numbers):
            raise ProConError(f"a mean of {self.total!r:.40} marks is none: give at least one number")
        if not all(0 <= number <= 1 for number in numbers):
            raise ProConError(
                f"a mean of {self.value!r:.40} with deviation {self.deviation!r:.40} is not of marks "
                "from 0 to 1: give such marks"
            )

    @classmethod
    def of(cls, marks: Iterable[float]) -> Mean:
        """The mean of ``marks``."""
        marks = list(marks)
        n = len(marks)
        mean = math.fsum(marks) / n if n else 0.0
        spread = math.fsum((mark - mean) ** 2 for mark in marks)
        return cls(mean, math.sqrt(spread / (n - 1)) if n > 1 else 0.0, n)

    @property
    def interval(self) -> tuple[float, float]:
        """``mean +- 1.96 deviation / sqrt(total)``, within 0 to 1: the 95% interval of many marks."""
        half = Z_95 * self.deviation / math.sqrt(self.total)
        return max(0.0, self.value - half), min(1.0, self.value + half)

    def __str__(self) -> str:
        return f"{self.value:.1%} (mean of {self.total})"
