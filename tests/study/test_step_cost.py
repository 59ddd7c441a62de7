"""What a step costs is timed on real trainers, in turns, and read by the page from a file."""

import pytest

from benchmarks.study.budgets import BUDGETS, PLAIN
from benchmarks.study.hard_parts import DEFAULT, TRIED
from benchmarks.study.plan import Size
from benchmarks.study.start import Start, contrast_means
from benchmarks.study.step_cost import cost_sections, time_steps
from procon.chat import builtin_prompts
from procon.directions import RefusalDirections
from procon.files import save_json
from procon.models import load_model

SIZE = Size(train=16, test=1, prompts=2, extraction=2, pairs=2)
METHODS = (PLAIN, DEFAULT, TRIED["kl"][0], TRIED["safegrad"][0])


@pytest.fixture
def start(tiny_model, tokenizer, tmp_path) -> Start:
    for part in (tiny_model(), tokenizer):
        part.save_pretrained(tmp_path / "start")
    model, own = load_model(tmp_path / "start")
    prompts = builtin_prompts("extraction").first(2)
    states = model(**own(["one two"] * 4, return_tensors="pt"), output_hidden_states=True).hidden_states[:3]
    states = states[0].new_tensor([[layer[row, -1].tolist() for layer in states] for row in range(4)])
    states[:2] += 1
    directions = RefusalDirections.from_means(contrast_means(states))
    return Start(tmp_path / "start", own, directions, directions, prompts, states, [7], "")


def test_methods_are_timed_in_turns(start):
    samples = time_steps(start, METHODS, SIZE, 3)
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
