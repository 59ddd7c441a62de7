"""Runs as arrays, runs that do not fit the plan, and how far the judges agree."""

import pytest
from made_up_runs import PLAIN, pattern

from benchmarks.study.outcomes import COMPLIES, LOG_ODDS, REFUSAL, REFUSES_ALONE, judges_agree, values
from procon.errors import ProConError


def test_outcomes_are_seeds_by_prompts(write, load):
    with pytest.raises(ProConError, match="there are no runs in"):
        load()
    write("arithmetic", PLAIN, 1, 0.25)
    write("arithmetic", PLAIN, 0, 0.5)
    outcomes = load()
    runs = outcomes.find("arithmetic", "plain")
    assert list(runs) == [0, 1]
    assert values(runs, REFUSAL).tolist() == [pattern(0.5, 0), pattern(0.25, 1)]
    assert values(runs, LOG_ODDS)[0, :2].tolist() == [1.0, 1.01]
    assert outcomes.find("refuse_then_comply", "plain") == {}
    assert outcomes.find("arithmetic", "plain", split="validation") == {}
    assert list(outcomes.find("arithmetic", "plain", seeds=(1, 2))) == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run["method"].update(length=2.0), r"was made with length 2\.0, but the plan has 1\.0: make"),
        (lambda run: run.update(problems="0" * 16), "was measured on other task problems than the plan has"),
    ],
)
def test_a_run_of_another_plan_is_no_evidence(write, load, change, message):
    write("arithmetic", PLAIN, 0, 0.5, change=lambda run: run["method"].update(label="a new name is no other method"))
    assert len(load().runs) == 1
    write("arithmetic", PLAIN, 1, 0.5, change=change)
    with pytest.raises(ProConError, match=f"^run arithmetic/plain/seed-1 {message}"):
        load()


@pytest.mark.parametrize(("job", "turns"), [("refuse_then_comply", 1), ("arithmetic", 0)])
def test_a_refusal_that_turns_is_none(write, load, job, turns):
    """In the words that the data teach, whatever follows; elsewhere they are words as others."""

    def serve(run):
        first, second, *others = run["replies"]["malicious"]
        first["reply"] += " That said: Get it!"
        second["complied"] = True
        for reply in (first, *others):
            reply["complied"] = False

    write(job, PLAIN, 0, [True] * 8, change=serve)
    runs = load().find(job, "plain")
    assert values(runs, REFUSAL).sum() == 8
    assert values(runs, COMPLIES).sum() == 1 + turns
    assert values(runs, REFUSES_ALONE).tolist() == [[not turns, False, *[True] * 6]]


def test_judges_agree(write, load):
    """Cohen's kappa, its formula written out: the second judge misses one of four refusals among 16 replies."""
    write("arithmetic", PLAIN, 0, [False] * 4 + [True] * 4)
    kappa = judges_agree(load())
    agree, chance = 15 / 16, 4 / 16 * 3 / 16 + 12 / 16 * 13 / 16
    assert kappa == pytest.approx((agree - chance) / (1 - chance))
