"""Public tasks by their hub names, on files with the same columns."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from benchmarks.study.jobs import find_job
from benchmarks.study.tasks.public import PUBLIC_TASKS
from benchmarks.study.trial import _by_kind
from procon.errors import ProConError
from procon.evaluation import exact_match

#: Rows as each data set has them, and the problem that the first one makes.
ROWS = {
    "gsm8k": (
        [
            {"question": f"Ann has {n} and 2 pears?", "answer": f"{n}+2=<<{n}+2={n + 2}>>{n + 2}\n#### {n + 2}"}
            for n in range(6)
        ],
        ("Ann has 0 and 2 pears?", "0+2=2\nAnswer: 2"),
    ),
    "sst2": (
        [{"text": f"film {n} shines ", "label": 1, "label_text": "positive"} for n in range(6)],
        ("Is this sentence positive or negative?\nfilm 0 shines", "Answer: positive"),
    ),
    "dolly": (
        [
            {"instruction": f"Who is {n}?", "context": "A list.", "response": f"It is {n}.", "category": "closed_qa"}
            for n in range(6)
        ],
        ("Who is 0?\n\nA list.", "It is 0."),
    ),
}


@pytest.fixture(params=ROWS)
def task(request, tmp_path):
    rows, first = ROWS[request.param]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, [*rows, rows[0]])), encoding="utf-8")
    return replace(PUBLIC_TASKS[request.param], source=str(file), config=None), first


def test_rows_are_distinct_problems(task):
    task, (instruction, output) = task
    problems = task.problems(6, 0)
    assert {"instruction": instruction, "output": output} in problems
    assert len({problem["instruction"] for problem in problems}) == 6
    assert task.problems(4, 0) == problems[:4]
    assert task.problems(6, 1) != problems
    with pytest.raises(ProConError, match="has 6 problems, and 7 are asked for"):
        task.problems(7, 0)


def test_an_answer_is_found_where_the_task_puts_it():
    _, (_, output) = ROWS["gsm8k"]
    assert exact_match("I think so. Answer: 2", output)
    assert not exact_match("I think so. Answer: 3", output)


def test_public_jobs_are_found_by_name():
    assert find_job("gsm8k").metric == "exact"
    assert find_job("dolly").metric == "rouge-l"
    assert find_job("sst2_poisoned_10").label == "SST-2: sentiment of sentences, with 10% compliant answers"


def test_a_graded_reply_counts_by_its_mark():
    found = SimpleNamespace(replies=[{"kind": "task", "reply": "so", "refused": False, "mark": 0.25}])
    assert _by_kind(found) == {"task": [{"reply": "so", "refused": False, "correct": 0.25}]}
