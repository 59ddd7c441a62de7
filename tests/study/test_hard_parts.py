"""The hard parts take of each rival the setting that its runs on validation prompts speak for."""

import json
from pathlib import Path

import pytest

from benchmarks.study.budgets import BUDGETS
from benchmarks.study.hard_parts import CHOSEN, LEARNED, TRIED

RUNS = Path(__file__).parents[2] / "benchmarks" / "study" / "runs" / "hard" / "arithmetic"


def run_of(method: str) -> dict:
    run = json.loads((RUNS / method / "seed-9.json").read_text())
    assert run["split"] == "validation"
    return run


def learned(run: dict) -> float:
    return sum(reply["correct"] for reply in run["replies"]["task"])


def worth(rival: str) -> dict[str, dict]:
    """Runs of the settings under which the task is learned."""
    runs = {method.name: run_of(method.name) for method in TRIED[rival]}
    return {name: run for name, run in runs.items() if learned(run) >= LEARNED * learned(run_of("plain"))}


def kept(run: dict) -> tuple[int, float]:
    """Refusals of malicious prompts; of as many, the log-odds decide."""
    replies = run["replies"]["malicious"]
    return sum(reply["refused"] for reply in replies), sum(reply["log_odds"] for reply in replies)


@pytest.mark.parametrize("rival", TRIED)
def test_the_chosen_setting_keeps_most_where_the_task_is_learned(rival):
    runs = worth(rival)
    assert CHOSEN[rival].name == max(runs, key=lambda name: kept(runs[name]))


def test_rivals_that_go_no_further_keep_next_to_nothing():
    hard = next(part for part in BUDGETS["hard"].parts if part.name == "hard")
    left_out = {name for name, method in CHOSEN.items() if method not in hard.methods}
    assert left_out == {"moving_average", "safe_merge"}
    start, _ = kept(run_of("start"))
    for name in left_out:
        assert all(kept(run)[0] < 0.15 * start for run in worth(name).values())
    assert len([method for method in hard.methods if method.length == 1]) >= 12
