"""The hard parts take of each rival the setting that its runs on validation prompts speak for."""

import json
from pathlib import Path

import pytest

from benchmarks.study.hard_parts import CHOSEN, LEARNED, TRIED

RUNS = Path(__file__).parents[2] / "benchmarks" / "study" / "runs" / "hard" / "arithmetic"


def run_of(method: str) -> dict:
    run = json.loads((RUNS / method / "seed-9.json").read_text())
    assert run["split"] == "validation"
    return run


def learned(run: dict) -> float:
    return sum(reply["correct"] for reply in run["replies"]["task"])


def kept(run: dict) -> tuple[int, float]:
    """Refusals of malicious prompts; of as many, the log-odds decide."""
    replies = run["replies"]["malicious"]
    return sum(reply["refused"] for reply in replies), sum(reply["log_odds"] for reply in replies)


@pytest.mark.parametrize("rival", TRIED)
def test_the_chosen_setting_keeps_most_where_the_task_is_learned(rival):
    runs = {method.name: run_of(method.name) for method in TRIED[rival]}
    worth = {name: run for name, run in runs.items() if learned(run) >= LEARNED * learned(run_of("plain"))}
    assert CHOSEN[rival].name == max(worth, key=lambda name: kept(worth[name]))
