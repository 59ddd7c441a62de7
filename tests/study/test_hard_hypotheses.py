"""What is expected of the hard parts can be judged from the runs that are planned, and is corrected for its number."""

import pytest

from benchmarks.study.budgets import BUDGETS, PLAIN, PROCON_S
from benchmarks.study.hard_hypotheses import expected, held, judge_expected
from benchmarks.study.hard_parts import DEFAULT
from benchmarks.study.hypotheses import Verdict
from benchmarks.study.intervals import holm
from benchmarks.study.outcomes import REFUSAL, Outcomes

HYPOTHESES = expected(PLAIN, PROCON_S)


class Agreeing:
    def refuses(self, replies):
        return [reply.startswith("no") for reply in replies]


def test_every_hypothesis_is_about_planned_runs():
    planned = {(cell.job, cell.method) for cell in BUDGETS["hard"].cells() if cell.split == "held_out"}
    for each in HYPOTHESES:
        names = (*each.hypothesis.better, *each.hypothesis.worse)
        assert {(each.hypothesis.job, name) for name in names} <= planned, each.hypothesis.claim
    assert len({(each.hypothesis.claim, each.measure) for each in HYPOTHESES}) == len(HYPOTHESES) == 27


def test_p_is_corrected_for_those_that_were_run(write, tmp_path):
    for seed in range(3):
        write("arithmetic", DEFAULT, seed, [True] * 7 + [seed == 0])
        write("arithmetic", PLAIN, seed, 0.25)
        write("poisoned_10", DEFAULT, seed, [True, False] * 4)
        write("poisoned_10", PLAIN, seed, 0.5)
    outcomes = Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Agreeing())
    about = [each for each in HYPOTHESES if each.measure == REFUSAL]
    found = judge_expected(about, outcomes)
    alone = [judge_expected([each], outcomes)[0] for each in about]
    run = [index for index, verdict in enumerate(alone) if verdict.p is not None]
    assert len(run) == 2
    assert [found[index].p for index in run] == pytest.approx(holm([alone[index].p for index in run]))
    assert held(found) == 1
    assert all(verdict == Verdict(verdict.hypothesis, REFUSAL) for verdict in found if verdict.p is None)
