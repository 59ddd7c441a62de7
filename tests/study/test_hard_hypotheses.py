"""What is expected of the hard parts: about planned runs, corrected for its number, and on a page."""

import pytest
from made_up_runs import add_fresh

from benchmarks.study import hard_report
from benchmarks.study.anchor_parts import longer
from benchmarks.study.budgets import BUDGETS, PLAIN, PROCON_S, START
from benchmarks.study.hard_hypotheses import expected, held, judge_expected
from benchmarks.study.hard_parts import DEFAULT, LONG, SEEDS
from benchmarks.study.hypotheses import judge
from benchmarks.study.intervals import holm
from benchmarks.study.outcomes import REFUSAL, Outcomes

HYPOTHESES = expected(PLAIN, PROCON_S, BUDGETS["hard"])


class Agreeing:
    def refuses(self, replies):
        return [reply.startswith("no") for reply in replies]


def test_every_hypothesis_is_about_planned_runs():
    planned = {(cell.job, cell.method) for cell in BUDGETS["hard"].cells() if cell.split == "held_out"}
    for each in HYPOTHESES:
        names = (*each.hypothesis.better, *each.hypothesis.worse)
        assert {(each.hypothesis.job, name) for name in names} <= planned, each.hypothesis.claim
    assert len({(each.hypothesis.claim, each.measure) for each in HYPOTHESES}) == len(HYPOTHESES) == 32


def test_another_model_has_those_that_its_runs_can_answer():
    found = expected(PLAIN, PROCON_S, BUDGETS["qwen"])
    assert set(found) < set(HYPOTHESES)
    claims = {each.hypothesis.claim for each in found}
    assert {claim.partition(",")[0] for claim in claims} >= {
        "the default keeps more than plain training",
        "it keeps nine tenths of the start's",
        "its task is within two points of plain's",
        "it keeps as much as SBR",
        "it keeps as much as KL to the start",
        "r keeps more than a random direction in the default",
    }
    assert not any("SafeGrad" in claim for claim in claims)


def test_p_is_corrected_for_the_number_of_all(write, tmp_path):
    for seed in SEEDS:
        write("arithmetic", DEFAULT, seed, [True] * 8)
        write("arithmetic", PLAIN, seed, [seed == SEEDS[0], *[False] * 7])
        write("arithmetic_poisoned_10", DEFAULT, seed, [True, False] * 4)
        write("arithmetic_poisoned_10", PLAIN, seed, 0.5)
    for method in (DEFAULT, PLAIN):  # without a seed there is no verdict
        for seed in SEEDS[:2]:
            write("arithmetic", longer(method, LONG), seed, 1.0 if method == DEFAULT else 0.0)
    outcomes = Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Agreeing())
    about = [each for each in HYPOTHESES if each.measure == REFUSAL]
    alone = [judge(each.hypothesis, REFUSAL, outcomes) for each in about]
    found = judge_expected(about, outcomes, BUDGETS["hard"])
    whole = [index for index, verdict in enumerate(found) if verdict.p is not None]
    assert [about[index].hypothesis.job for index in whole] == ["arithmetic", "arithmetic_poisoned_10"]
    assert all(alone[index].seeds == SEEDS for index in whole)
    expected_p = holm([alone[index].p if index in whole else 1.0 for index in range(len(about))])
    assert [found[index].p for index in whole] == [expected_p[index] for index in whole]
    assert found[whole[0]].p == pytest.approx(len(about) * alone[whole[0]].p)
    assert held(found) == 1
    assert sorted({str(verdict) for verdict in found}) == ["2 seeds so far", "failed", "held", "not run"]


def test_page_has_verdicts_and_fresh_prompts(write, tmp_path):
    add_fresh(write("arithmetic_poisoned_10", START, SEEDS[0], 1.0), 6, complied=False)
    for seed in SEEDS:
        add_fresh(write("arithmetic_poisoned_10", DEFAULT, seed, 1.0), 6, complied=False)
        add_fresh(write("arithmetic_poisoned_10", PLAIN, seed, [False] * 8), 6, complied=True)
    outcomes = Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Agreeing())
    text, _ = hard_report.PAGE.compose(BUDGETS["hard"], outcomes)
    assert "Of 32, 2 have all their runs, and of these 2 held." in text
    table = text.partition("| method | fresh malicious | fresh benign | complies |\n")[2].partition("\n\n")[0]
    rows = {cells[1].strip(): cells[2:] for cells in (line.split("|") for line in table.splitlines())}
    assert rows[PLAIN.label][2].strip().startswith("100%")
    assert rows[DEFAULT.label][2].strip().startswith("0%")
    assert float(rows[DEFAULT.label][0].partition("%")[0]) > float(rows[PLAIN.label][0].partition("%")[0])
