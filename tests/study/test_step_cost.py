"""What a step costs is timed on real trainers, in turns, and read by the page from a file."""

from benchmarks.study.budgets import BUDGETS, PLAIN
from benchmarks.study.hard_parts import DEFAULT, TRIED
from benchmarks.study.plan import Size
from benchmarks.study.step_cost import cost_sections, time_steps
from procon.files import save_json

SIZE = Size(train=16, test=1, prompts=2, extraction=2, pairs=2)
METHODS = (PLAIN, DEFAULT, TRIED["kl"][0], TRIED["safegrad"][0])


def test_methods_are_timed_in_turns(tiny_start):
    samples = time_steps(tiny_start, METHODS, SIZE, 3)
    assert {name: len(values) for name, values in samples.seconds.items()} == {method.name: 3 for method in METHODS}
    assert all(value > 0 for values in samples.seconds.values() for value in values)


def test_the_page_has_ratios_cheapest_first(tmp_path):
    seconds = {"plain": [1.0, 2.0, 4.0], "kl_0.1": [3.0, 6.0, 12.0], DEFAULT.name: [1.5, 3.0, 6.0], "gone": [1.0] * 3}
    made = {"machine": "a machine", "torch": "2", "transformers": "5", "date": "2026-11-27T00:00:00"}
    file = save_json({"made": made, "seconds": seconds}, tmp_path / "cost.json")
    _, text, table = cost_sections([method for part in BUDGETS["hard"].parts for method in part.methods], file)
    assert "median of 3 pairs" in text
    assert [row.split(" | ")[1].rstrip(" |") for row in table.splitlines()[2:]] == [
        "1.50 [1.50, 1.50]",
        "3.00 [3.00, 3.00]",
    ]
    assert cost_sections([PLAIN], tmp_path / "none.json") == []
