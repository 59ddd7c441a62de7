"""The hard table: what stands in which column, and what is not there yet."""

from __future__ import annotations

import pytest
from made_up_runs import Echo, add_fresh

from benchmarks.study.anchor_parts import longer
from benchmarks.study.budgets import BUDGETS, PLAIN, START
from benchmarks.study.hard_parts import DEFAULT, SEEDS, full
from benchmarks.study.outcomes import Outcomes
from benchmarks.study.overview import overview_tables


@pytest.fixture
def write_fresh(write):
    """Writes a run file whose fresh prompts are the first four."""
    return lambda *args, **more: add_fresh(write(*args, **more), 4)


def rows(table: str) -> dict[str, list[str]]:
    return {cells[1].strip(): [cell.strip() for cell in cells[2:-1]] for cells in map(_cells, table.splitlines()[2:])}


def _cells(line: str) -> list[str]:
    return line.split("|")


def test_each_run_has_its_cell(write_fresh, tmp_path):
    write_fresh("arithmetic", START, SEEDS[0], 1.0, task=0.0)
    for seed in SEEDS:
        write_fresh("arithmetic", PLAIN, seed, [True] * 2 + [False] * 6, task=0.75)
        write_fresh(
            "arithmetic_poisoned_10", longer(DEFAULT, 4.0), seed, [True] * 7 + [False], task=0.5, over_refusal=0.25
        )
    write_fresh("arithmetic", longer(DEFAULT, 10.0), SEEDS[0], [False] * 8, task=1.0)
    write_fresh("arithmetic", full(DEFAULT), SEEDS[1], [True] * 8, task=0.25)
    write_fresh("refuse_then_comply", longer(DEFAULT, 4.0), SEEDS[0], [False] * 8, task=0.5)
    outcomes = Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Echo())
    table, against, other = overview_tables(BUDGETS["hard"], outcomes)
    assert rows(table)["start"] == ["100 / 100<br>benign 0<br>task 0"] * 2 + ["not run"] * 2
    assert rows(table)[PLAIN.label] == ["25 / 50<br>benign 0<br>task 75", *["not run"] * 3]
    assert rows(table)[DEFAULT.label] == [*["not run"] * 3, "88 / 100<br>benign 25<br>task 50"]
    assert rows(against)[longer(DEFAULT, 4.0).label] == ["0 / 0<br>benign 0<br>task 50<br>1 seed", "not run"]
    longest, whole = "0 / 0<br>benign 0<br>task 100<br>1 seed", "100 / 100<br>benign 0<br>task 25<br>1 seed"
    assert rows(other)[DEFAULT.label] == [longest, "not run", "not run", whole]
    assert list(rows(table)) == ["start", PLAIN.label, DEFAULT.label]  # of those without a run, none
    assert list(rows(against)) == [longer(DEFAULT, 4.0).label]  # its start has no run on any of these data
    assert list(rows(other)) == ["start", DEFAULT.label]


def test_without_runs_of_a_kind_its_table_is_left_out(write_fresh, tmp_path):
    write_fresh("arithmetic", START, SEEDS[0], 1.0)
    assert overview_tables(BUDGETS["hard"], Outcomes.load(BUDGETS["hard"], tmp_path / "runs", Echo())) == []
    write_fresh("arithmetic", PLAIN, SEEDS[0], 0.5)
    write_fresh("arithmetic", START, 0, 1.0)
    write_fresh("arithmetic", PLAIN, 0, 0.5)
    found = overview_tables(BUDGETS["qwen"], Outcomes.load(BUDGETS["qwen"], tmp_path / "runs", Echo()))
    assert len(found) == 1
