"""Intervals and tests over seeds and prompts, both taken as drawn at random.

An outcome ``y[s, p]`` of seed ``s`` on prompt ``p`` is read as a mean, an effect of the seed, one of the prompt, and
the rest: crossed random effects (Searle, Casella and McCulloch, Variance Components, 1992, chapter 4). With the mean
squares of the two-way table without replication, the variance of the grand mean is
``(MS_seed + MS_prompt - MS_rest) / (S P)``; its degrees of freedom are Satterthwaite's (Biometrics Bulletin 2, 1946).

Why not resample? Three seeds are too few. With 64 prompts (effects of standard deviation 0.35) and a rest (0.4), a
test at 5% rejected a true null hypothesis in 3% to 6% of cases this way, whatever the seeds' spread, and 95%
intervals contained the mean in 93% to 97%. At seeds' effects of 0.2, a bootstrap of seeds and prompts rejected 9%, and
flipping the signs of whole prompts, which takes the seeds as given, 22%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and prompts.

    Attributes:
        mean: over all outcomes.
        error: its standard error, for other seeds and other prompts; for other prompts alone if there is one seed.
        freedom: degrees of freedom of ``error``.
        prompts: how many.
    """

    mean: float
    error: float
    freedom: float
    prompts: int

    @classmethod
    def of(cls, outcomes: np.ndarray) -> Estimate:
        """Of ``outcomes [S, P]``, at least two prompts."""
        seeds, prompts = outcomes.shape
        mean = outcomes.mean()
        by_seed, by_prompt = outcomes.mean(1, keepdims=True), outcomes.mean(0, keepdims=True)
        prompt_square = seeds * np.square(by_prompt - mean).sum() / (prompts - 1)
        if seeds == 1:
            return cls(float(mean), float(np.sqrt(prompt_square / prompts)), prompts - 1, prompts)
        seed_square = prompts * np.square(by_seed - mean).sum() / (seeds - 1)
        rest_freedom = (seeds - 1) * (prompts - 1)
        rest_square = np.square(outcomes - by_seed - by_prompt + mean).sum() / rest_freedom
        # No effect has a variance below zero, though its estimate may.
        seed_square, prompt_square = max(seed_square, rest_square), max(prompt_square, rest_square)
        square = seed_square + prompt_square - rest_square
        spread = seed_square**2 / (seeds - 1) + prompt_square**2 / (prompts - 1) + rest_square**2 / rest_freedom
        return cls(
            float(mean),
            float(np.sqrt(square / outcomes.size)),
            float(square**2 / spread) if square > 0 else prompts - 1,
            prompts,
        )

    @property
    def interval(self) -> tuple[float, float]:
        """Student's 95% interval."""
        half = _quantile(self.freedom) * self.error
        return self.mean - half, self.mean + half

    @property
    def rate_interval(self) -> tuple[float, float]:
        """Wilson's 95% interval of a share, at the sample size that has its standard error.

        As Korn and Graubard (Survey Methodology 24, 1998) do for clustered samples. A share of 0 or 1 shows no spread:
        it counts as many outcomes as prompts, as the same prompt under another seed adds little.
        """
        p, n = self.mean, self.prompts
        if self.error > 0:
            n = p * (1 - p) / self.error**2
        square = _quantile(self.freedom) ** 2 / n
        centre = (p + square / 2) / (1 + square)
        half = np.sqrt(square * (p * (1 - p) + square / 4)) / (1 + square)
        return (0.0 if p == 0 else float(centre - half)), (1.0 if p == 1 else float(centre + half))


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values corrected for their number (Holm, Scandinavian Journal of Statistics 6, 1979): at most one in twenty
    families has a true null hypothesis with a corrected p below 5%, however the tests depend on each other."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, least = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        least = max(least, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = least
    return corrected


def _quantile(freedom: float) -> float:
    return float(stats.t.ppf(0.5 + LEVEL / 2, freedom))


def p_value(differences: np.ndarray, margin: float = 0.0) -> float:
    """One-sided paired test that the mean of ``differences [S, P]`` is not above ``-margin``, on the same seeds and
    prompts.

    Student's t of the mean to its standard error, as of :class:`Estimate`. It covers other prompts and other seeds of
    the same kind, but not other models, tasks or training data; with few seeds it has little power against an effect
    that differs from seed to seed.

    Of differences between true and false, whose mean is at a ``margin`` below 0, at least so many are not 0. So the
    error is at least that of as many under every seed: few prompts that agree are no proof that nothing is lost.
    """
    found = Estimate.of(differences)
    least = float(np.sqrt(margin * (1 - margin) / found.prompts))
    error, freedom = (found.error, found.freedom) if found.error > least else (least, found.prompts - 1)
    if error == 0:
        return 0.0 if found.mean > 0 else 1.0
    return float(stats.t.sf((found.mean + margin) / error, freedom))
