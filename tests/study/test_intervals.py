"""The study's intervals and tests: by their definitions written out, and by how often they are right."""

import math

import numpy as np
import pytest
from made_up_runs import pattern
from scipy import stats

from benchmarks.study.intervals import Estimate, holm, p_value
from benchmarks.study.prediction import Prediction


def test_standard_error_is_that_of_crossed_random_effects():
    """Mean squares by their definition, summed in loops."""
    y = np.random.default_rng(0).normal(size=(3, 5)) + np.arange(5) + 2 * np.arange(3)[:, None]
    mean = sum(y[s, p] for s in range(3) for p in range(5)) / 15
    row = [sum(y[s]) / 5 for s in range(3)]
    column = [sum(y[:, p]) / 3 for p in range(5)]
    of_seeds = sum(5 * (value - mean) ** 2 for value in row) / 2
    of_prompts = sum(3 * (value - mean) ** 2 for value in column) / 4
    of_rest = sum((y[s, p] - row[s] - column[p] + mean) ** 2 for s in range(3) for p in range(5)) / 8
    assert of_seeds > of_rest
    assert of_prompts > of_rest
    square = of_seeds + of_prompts - of_rest

    found = Estimate.of(y)
    assert found.mean == pytest.approx(mean)
    assert found.error**2 == pytest.approx(square / 15)
    assert found.freedom == pytest.approx(square**2 / (of_seeds**2 / 2 + of_prompts**2 / 4 + of_rest**2 / 8))
    half = stats.t.ppf(0.975, found.freedom) * found.error
    assert found.interval == pytest.approx((mean - half, mean + half))
    assert p_value(y) == pytest.approx(1 - stats.t.cdf(mean / found.error, found.freedom))
    assert p_value(-y) == pytest.approx(1 - p_value(y))


def test_one_seed_is_the_usual_test_over_prompts():
    y = np.random.default_rng(1).normal(0.3, 1, size=(1, 20))
    assert p_value(y) == pytest.approx(stats.ttest_1samp(y[0], 0, alternative="greater").pvalue)
    assert Estimate.of(y).interval == pytest.approx(tuple(stats.t.interval(0.95, 19, y.mean(), stats.sem(y[0]))))


def test_repeating_the_same_outcomes_under_more_seeds_adds_nothing():
    y = np.random.default_rng(2).normal(size=(1, 20))
    assert Estimate.of(np.repeat(y, 3, 0)).error == pytest.approx(Estimate.of(y).error)


@pytest.mark.parametrize("seed_effect", [0.0, 0.2])
def test_level_and_coverage(seed_effect):
    """A true null hypothesis is rejected as often as the module says, and the intervals contain the mean as often.

    Three standard errors of 1000 draws around its 6% and 93%. A test over prompts alone, the seeds taken as given, is
    far from it as soon as the seeds differ.
    """
    rng = np.random.default_rng(3)
    rejected, alone, covered = [], [], []
    for _ in range(1000):
        y = rng.normal(0, seed_effect, (3, 1)) + rng.normal(0, 0.35, (1, 64)) + rng.normal(0, 0.4, (3, 64))
        found = Estimate.of(y)
        rejected.append(p_value(y) < 0.05)
        alone.append(p_value(y.mean(0, keepdims=True)) < 0.05)
        covered.append(found.interval[0] <= 0 <= found.interval[1])
    assert np.mean(rejected) < 0.06 + 3 * math.sqrt(0.06 * 0.94 / 1000)
    assert np.mean(covered) > 0.93 - 3 * math.sqrt(0.93 * 0.07 / 1000)
    assert (np.mean(alone) > 0.15) == (seed_effect > 0)


@pytest.mark.parametrize(("margin", "prompts"), [(0.02, 128), (0.05, 128), (0.05, 64)])
def test_as_much_is_not_shown_by_prompts_that_happen_to_agree(margin, prompts):
    """A method that loses just the margin, the same prompts under each seed, loses none of a set of prompts often."""
    rng = np.random.default_rng(4)
    lost = rng.random((1000, 1, prompts)) < margin
    rejected = [p_value(-np.repeat(one, 3, 0).astype(float), margin=margin) < 0.05 for one in lost]
    assert np.mean(rejected) < 0.06 + 3 * math.sqrt(0.06 * 0.94 / 1000)
    assert p_value(np.zeros((3, prompts)), margin=margin) == pytest.approx(
        stats.t.sf(math.sqrt(margin * prompts / (1 - margin)), prompts - 1)
    )


def test_no_spread():
    assert p_value(np.zeros((3, 8))) == 1
    assert p_value(np.ones((3, 8))) == 0
    # Wilson's bound at as many outcomes as prompts, with Student's quantile.
    square = stats.t.ppf(0.975, 7) ** 2
    assert Estimate.of(np.ones((3, 8))).rate_interval == pytest.approx((1 / (1 + square / 8), 1.0))
    assert Estimate.of(np.zeros((3, 8))).rate_interval == pytest.approx((0.0, square / (8 + square)))


def test_rate_interval_is_wilsons_at_the_sample_size_of_the_error():
    y = np.array([pattern(0.75, seed) for seed in range(3)], float)
    found = Estimate.of(y)
    low, high = found.rate_interval
    t = stats.t.ppf(0.975, found.freedom)
    n = 0.75 * 0.25 / found.error**2
    # Its ends are the shares from which 0.75 is t standard errors away.
    for end in (low, high):
        assert abs(0.75 - end) == pytest.approx(t * math.sqrt(end * (1 - end) / n))
    assert 0 < low < 0.75 < high < 1


def test_holm_by_hand():
    """The smallest counts four times, the next three times, and none less than the one before it."""
    assert holm([0.03, 0.01, 0.4, 0.012]) == pytest.approx([0.06, 0.04, 0.4, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def _trained(name: str, kept: float, cosine: float) -> dict:
    replies = [{"refused": place < round(kept * 20)} for place in range(20)]
    method = {"job": "arithmetic", "method": {"name": name}, "seed": 0}
    return {**method, "replies": {"malicious": replies}, "drift": {"cosine": [None, cosine]}}


def test_how_drift_goes_with_refusals():
    """Spearman's rank correlation, and the runs where a measure is wrong."""
    good = [_trained(f"good{n}", 0.9 + n / 100, 0.95 + n / 1000) for n in range(5)]
    bad = [_trained(f"bad{n}", 0.1 * n, 0.5 + 0.05 * n) for n in range(5)]
    found = Prediction.of("cosine", [*good, *bad, _trained("hidden", 0.2, 0.99), _trained("harmless", 0.95, 0.5)])
    assert found.rank[0] == pytest.approx(stats.spearmanr(found.values, found.kept).statistic)
    assert found.rank[1] < found.rank[0] < found.rank[2]
    assert found.missed == ("arithmetic/hidden/seed-0",)
    assert found.alarms == ("arithmetic/harmless/seed-0",)
    assert math.isnan(Prediction.of("cosine", [_trained(str(n), 1.0, 1.0) for n in range(4)]).rank[0])
