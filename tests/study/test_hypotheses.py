"""Hypotheses, which prompts and seeds they pair and at which strength."""

from dataclasses import replace

import numpy as np
import pytest
from made_up_runs import BUDGET, PLAIN, RANDOM, SAFE, START, THIRD_DRAW, R, pattern, write_strengths

from benchmarks.study.hard_hypotheses import Expected, judge_expected
from benchmarks.study.hypotheses import CONTROL, Hypothesis, at_chosen_strength, judge
from benchmarks.study.intervals import Estimate, holm, p_value
from benchmarks.study.outcomes import REFUSAL


def test_pairs_prompts_and_seeds(write, load):
    better, worse = [1.0, 0.875, 1.0], [0.125, 0.25, 0.0]
    for seed in range(3):
        write("arithmetic", SAFE, seed, better[seed])
        write("arithmetic", PLAIN, seed, worse[seed])
    hypothesis = Hypothesis("safe keeps more", ("safe",), ("plain",))
    found = judge(hypothesis, REFUSAL, load())
    differences = np.array(
        [
            np.subtract(pattern(b, s), pattern(w, s), dtype=float)
            for s, (b, w) in enumerate(zip(better, worse, strict=True))
        ]
    )
    assert found.seeds == (0, 1, 2)
    assert found.by_seed == (0.875, 0.625, 1.0)
    assert found.p == p_value(differences)
    assert found.difference == Estimate.of(differences)
    assert str(found) == "held"
    other_way = judge(Hypothesis("plain keeps more", ("plain",), ("safe",)), REFUSAL, load())
    assert other_way.p == pytest.approx(1 - found.p)
    assert str(other_way) == "failed"


def test_as_much_is_a_share_less_a_margin(write, load):
    for seed in range(3):
        write("arithmetic", SAFE, seed, 0.75)
        write("arithmetic", PLAIN, seed, 1.0)
    less = Hypothesis("safe keeps as much", ("safe",), ("plain",))
    differences = np.subtract([pattern(0.75, seed) for seed in range(3)], [pattern(1.0)] * 3, dtype=float)
    for hypothesis, p in (
        (less, p_value(differences)),
        (replace(less, share=0.5), p_value(differences + 0.5)),
        (replace(less, margin=0.1), p_value(differences, 0.1)),
        (replace(less, share=0.5, margin=0.1), p_value(differences + 0.5, 0.1)),
    ):
        found = judge(hypothesis, REFUSAL, load())
        assert found.p == pytest.approx(p)
        assert found.difference.mean == pytest.approx(-0.25)  # as it is, wherever the bar is
        assert found.by_seed == pytest.approx((-0.25,) * 3)


def test_seeds_that_one_side_lacks_are_left_out(write, load):
    write("arithmetic", SAFE, 0, 0.5)
    write("arithmetic", SAFE, 1, 1.0)
    write("arithmetic", PLAIN, 1, 0.25)
    hypothesis = Hypothesis("safe keeps more", ("safe",), ("plain",))
    assert judge(hypothesis, REFUSAL, load()).seeds == (1,)
    assert judge(replace(hypothesis, job="refuse_then_comply"), REFUSAL, load()).p is None
    assert str(judge(replace(hypothesis, job="refuse_then_comply"), REFUSAL, load())) == "no verdict"


def test_one_run_of_what_is_not_trained_serves_every_seed(write, load):
    write("arithmetic", START, 0, 1.0)
    for seed in range(3):
        write("arithmetic", PLAIN, seed, 0.5)
    found = judge(Hypothesis("plain loses", ("start",), ("plain",)), REFUSAL, load())
    assert found.seeds == (0, 1, 2)
    assert found.by_seed == (0.5, 0.5, 0.5)


def test_strength_is_chosen_on_validation_prompts(write, load):
    """Where r and the random draws differ most there, whatever the held-out prompts say."""
    write_strengths(write, [0.25, 0.75, 1.0], [0.25, 0.25, 0.75])
    write("arithmetic", R[1], 0, 0.5)
    for method in (*RANDOM[2:4], THIRD_DRAW):
        write("arithmetic", method, 0, 0.625)
    chosen = at_chosen_strength(BUDGET.parts, load())
    assert chosen.better == ("r_0.1",)
    assert chosen.worse == ("random_0.1_1", "random_0.1_2", "random_0.1_3")
    assert chosen.claim == f"{CONTROL.claim}: alpha 0.1"
    verdict = judge(chosen, REFUSAL, load())
    assert verdict.by_seed == (-0.125,)
    assert str(verdict) == "failed"


def test_without_validation_runs_the_control_is_not_run(write, load):
    write("arithmetic", R[1], 0, 0.5)
    write("arithmetic", RANDOM[2], 0, 0.5)
    chosen = at_chosen_strength(BUDGET.parts, load())
    assert chosen == CONTROL
    assert str(judge(chosen, REFUSAL, load())) == "no verdict"


def test_p_is_corrected_for_the_number_of_all(write, load):
    """A hypothesis without a seed that is planned has no p, and counts all the same."""
    for seed in range(3):
        write("arithmetic", SAFE, seed, 1.0)
        write("arithmetic", PLAIN, seed, 0.125)
    write("refuse_then_comply", SAFE, 0, 1.0)
    write("refuse_then_comply", PLAIN, 0, 0.0)
    claims = [Hypothesis("safe keeps more", ("safe",), ("plain",), job) for job in ("arithmetic", "refuse_then_comply")]
    found = judge_expected([Expected(claim, REFUSAL) for claim in claims], load(), BUDGET)
    assert [verdict.p for verdict in found] == [holm([judge(claims[0], REFUSAL, load()).p, 1.0])[0], None]
    assert [str(verdict) for verdict in found] == ["held", "no verdict"]
