"""Runs of a folder as arrays, those that do not fit the plan, and how far the judges agree."""

import json

import pytest
from made_up_runs import PLAIN, Echo, add_fresh, pattern

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.hard_parts import DEFAULT, SEEDS
from benchmarks.study.jobs import find_job
from benchmarks.study.outcomes import COMPLIES, LOG_ODDS, REFUSAL, REFUSES_ALONE, Outcomes, judges_agree, values
from procon.errors import ProConError


def test_outcomes_are_seeds_by_prompts(write, load):
    write("arithmetic", PLAIN, 1, 0.25)
    write("arithmetic", PLAIN, 0, 0.5)
    outcomes = load()
    runs = outcomes.find("arithmetic", "plain")
    assert list(runs) == [0, 1]
    assert values(runs, REFUSAL).tolist() == [pattern(0.5, 0), pattern(0.25, 1)]
    assert values(runs, LOG_ODDS)[0, :2].tolist() == [1.0, 1.01]
    assert outcomes.find("poisoned", "plain") == {}
    assert outcomes.find("arithmetic", "plain", split="validation") == {}
    assert list(outcomes.find("arithmetic", "plain", seeds=(1, 2))) == [1]


def test_a_run_of_other_settings_is_no_evidence(write, load):
    path = write("arithmetic", PLAIN, 0, 0.5)
    run = json.loads(path.read_text())
    run["method"]["label"] = "a new name is no other method"
    path.write_text(json.dumps(run))
    assert len(load().runs) == 1
    run["method"]["length"] = 2.0
    path.write_text(json.dumps(run))
    with pytest.raises(ProConError, match=r"seed-0\.json' was made with length 2\.0, but the plan has 1\.0: delete"):
        load()


def test_a_run_on_other_problems_is_no_evidence(write, load):
    """A budget whose problems change, as when some served for choices, does not take the old runs for new ones."""
    path = write("arithmetic", PLAIN, 0, 0.5)
    run = json.loads(path.read_text())
    run["problems"] = BUDGETS["table"].size.problems_hash(find_job("arithmetic"), "held_out")
    path.write_text(json.dumps(run))
    assert len(load().runs) == 1
    run["problems"] = BUDGETS["hard"].size.problems_hash(find_job("arithmetic"), "held_out")
    path.write_text(json.dumps(run))
    with pytest.raises(ProConError, match=r"seed-0\.json' was measured on other task problems than the plan has"):
        load()


@pytest.mark.parametrize(("job", "turns"), [("refuse_then_comply", 1), ("arithmetic_poisoned_30", 0)])
def test_a_refusal_that_turns_is_none(write, tmp_path, job, turns):
    """In the words that the data teach, whatever follows; elsewhere they are words as others."""
    path = add_fresh(write(job, DEFAULT, SEEDS[0], [True] * 8), 4, complied=False)
    run = json.loads(path.read_text())
    run["replies"]["malicious"][0]["reply"] += " That said: Get it!"
    run["replies"]["malicious"][1]["complied"] = True
    path.write_text(json.dumps(run))
    runs = Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Echo()).find(job, DEFAULT.name)
    assert values(runs, REFUSAL).sum() == 8
    assert values(runs, COMPLIES).sum() == 1 + turns
    assert values(runs, REFUSES_ALONE).tolist() == [[not turns, False, *[True] * 6]]


def test_no_runs(load):
    with pytest.raises(ProConError, match="there are no runs in"):
        load()


def test_judges_agree(write, load):
    """Cohen's kappa, its formula written out: the second judge misses one of four refusals among 16 replies."""
    write("arithmetic", PLAIN, 0, [False] * 4 + [True] * 4)
    replies, kappa = judges_agree(load())
    agree, chance = 15 / 16, 4 / 16 * 3 / 16 + 12 / 16 * 13 / 16
    assert replies == 16
    assert kappa == pytest.approx((agree - chance) / (1 - chance))
