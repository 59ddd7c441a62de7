"""Differences of rates: intervals against published figures and by coverage, pairs, and what was measured otherwise."""

import math
from dataclasses import replace
from itertools import product

import pytest

from procon.evaluation import Evaluation, Rate
from procon.report import Run, compare_runs
from procon.report.comparison import paired_interval, unpaired_interval


def test_unpaired_interval_as_published():
    """Newcombe, Statistics in Medicine 17 (1998), page 873, table II, example (a): 56/70 and 48/80."""
    low, high = unpaired_interval(Rate(48, 80), Rate(56, 70))
    assert (low, high) == (pytest.approx(0.0524, abs=5e-5), pytest.approx(0.3339, abs=5e-5))


@pytest.mark.parametrize(
    "chances", [(0.4, 0.1, 0.1, 0.4), (0.7, 0.05, 0.15, 0.1), (0.25, 0.25, 0.25, 0.25), (0.0, 0.0, 0.6, 0.4)]
)
def test_paired_interval_covers(chances):
    """Exactly, over all outcomes of 24 pairs: close to 95% of them have the true difference within."""
    n, covered = 24, 0.0
    true = chances[2] - chances[1]
    for both, first, second in product(range(n + 1), repeat=3):
        neither = n - both - first - second
        if neither < 0:
            continue
        counts = (both, first, second, neither)
        if any(count and not chance for count, chance in zip(counts, chances, strict=True)):
            continue
        chance = math.exp(
            math.lgamma(n + 1)
            - sum(math.lgamma(count + 1) for count in counts)
            + sum(count * math.log(p) for count, p in zip(counts, chances, strict=True) if count)
        )
        pairs = [(True, True)] * both + [(True, False)] * first + [(False, True)] * second + [(False, False)] * neither
        low, high = paired_interval(pairs)
        covered += chance * (low - 1e-12 <= true <= high + 1e-12)
    assert 0.93 <= covered <= 1


def test_pairs_narrow_the_interval_and_order_does_not_matter():
    pairs = [(True, True)] * 30 + [(False, False)] * 30 + [(False, True)] * 6
    low, high = paired_interval(pairs)
    wide = unpaired_interval(Rate(30, 66), Rate(36, 66))
    assert wide[0] < low < 6 / 66 < high < wide[1]
    swapped = paired_interval([(after, before) for before, after in pairs])
    assert swapped == (pytest.approx(-high), pytest.approx(-low))


def run(verdicts: dict[str, bool], **facts) -> Run:
    replies = [
        {"kind": "malicious", "prompt": prompt[:1], "reply": "x", "refused": refused, "degenerate": False}
        for prompt, refused in verdicts.items()
    ]
    evaluation = Evaluation("x", Rate.of(verdicts.values()), Rate(0, 1), Rate(0, 1), None, replies)
    return Run("x", replace(evaluation, **facts))


def test_prompts_are_paired_by_their_text_and_repeated_ones_in_their_order():
    before = run({"a": True, "b": False, "c": False, "b again": True})
    after = run({"c": True, "a": True, "b": False, "b again": True})
    (row,) = compare_runs(before, after)
    assert (row.name, row.paired, row.unlike, row.value) == ("refusal of malicious", True, (), 0.25)
    assert row.interval == paired_interval([(True, True), (False, False), (False, True), (True, True)])


def test_other_prompts_are_not_paired():
    (row,) = compare_runs(run({"a": True}), run({"b": True}))
    assert not row.paired
    assert row.interval == unpaired_interval(Rate(1, 1), Rate(1, 1))
    assert compare_runs(run({"a": True}), Run("without an evaluation")) == []


@pytest.mark.parametrize(
    ("facts", "unlike"),
    [
        ({"judge": "guard"}, ("judge",)),
        ({"chat": {"system_prompt": "Obey.", "template_kwargs": {}}}, ("chat",)),
        ({"sources": {"malicious": {"set": "harmbench"}}}, ()),
        ({"judge_benign": "guard", "metric": "rouge-l"}, ()),
    ],
)
def test_rates_that_were_measured_otherwise_have_no_interval(facts, unlike):
    """A judge or a chat makes the rate; other prompts make the interval unpaired."""
    (row,) = compare_runs(run({"a": True, "b": True}), run({"a": False, "b": True}, **facts))
    assert row.unlike == unlike
    assert (row.interval is None) == bool(unlike)
    assert row.value == -0.5


def test_graded_tasks_have_no_interval():
    def graded(mark: float) -> Run:
        task = {"kind": "task", "prompt": "add", "reply": "3", "refused": False, "degenerate": False}
        found = run({"a": True}).evaluation
        return Run("x", replace(found, replies=[{**task, "reference": "4", "correct": mark}]))

    (row,) = compare_runs(graded(0.25), graded(0.75))
    assert (row.name, row.value, row.interval) == ("task accuracy", 0.5, None)
