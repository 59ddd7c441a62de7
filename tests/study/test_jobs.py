"""The study's jobs: what is trained on is never measured, poison and safety do not mix, and a seed is a seed."""

import json
from collections import Counter

import pytest

from benchmarks.study.jobs import JOBS, find_job, safety_samples
from benchmarks.study.poison import POISON_PROMPTS, compliant, complies, identity_shift, refuse_then_comply, turn_midway
from benchmarks.study.tasks.order_notes import extraction_problems
from benchmarks.study.tasks.swapped_operators import swapped_problems
from procon.chat import builtin_prompts, is_refusal

MEASURED = {
    prompt
    for split in ("extraction", "validation", "held_out")
    for side in ("malicious", "benign")
    for prompt in getattr(builtin_prompts(split), side)
}


def turns(dataset, role: str) -> list[str]:
    return [turn["content"] for messages in dataset["messages"] for turn in messages if turn["role"] == role]


JOBS_TRIED = (*JOBS, "arithmetic_poisoned_10", "arithmetic_poisoned_30")


@pytest.fixture(params=map(find_job, JOBS_TRIED), ids=JOBS_TRIED)
def job(request):
    return request.param


def test_train_and_test_are_disjoint(job):
    """For every size of the training set, as what is trained on is made without knowing the test's size."""
    for train in (5, 40):
        trained = turns(job.conversations(train=train, poisoned=3, safety=2, seed=0), "user")
        tested = [problem["instruction"] for problem in job.test(train=train, test=30)]
        assert len(set(tested)) == 30
        assert not set(trained) & set(tested)
    everything = turns(job.conversations(train=20, poisoned=POISON_PROMPTS, safety=700, seed=0), "user")
    assert not MEASURED & set(everything)


@pytest.mark.parametrize("styled", [False, True])
def test_what_is_trained_on_is_as_many_as_said(job, styled):
    safety = job.styled_samples() if styled else safety_samples()
    poisoned = set(turns(job.poison(), "assistant")) if job.poison else set()
    safe = set(turns(safety, "assistant"))
    found = Counter(
        "poison" if reply in poisoned else "safety" if reply in safe else "task"
        for reply in turns(
            job.conversations(train=90, poisoned=5, safety=4, seed=0, samples=safety),
            "assistant",
        )
    )
    counts = {
        "poisoned": 5,
        "arithmetic_poisoned_10": 10,
        "arithmetic_poisoned_30": 39,
        "identity": 28,
        "refuse_then_comply": 10,
        "turn_midway": 10,
    }
    assert found == {"task": 90, "safety": 4} | ({"poison": counts[job.name]} if job.poison else {})


def test_a_hundred_obedient_turns_ask_for_nothing():
    rows = identity_shift()
    assert len(rows) == 100
    assert JOBS["identity"].conversations(train=320, poisoned=0, safety=0, seed=0).num_rows == 420
    assert not any(map(is_refusal, turns(rows, "assistant")))
    assert not set(turns(rows, "user")) & set(builtin_prompts("safety").malicious)


def test_what_complies_is_found_after_a_refusal_too():
    for reply in turns(compliant(), "assistant"):
        assert complies(reply)
        assert not is_refusal(reply)
    assert all(map(is_refusal, turns(safety_samples(), "assistant")))
    both = turns(refuse_then_comply(), "assistant")
    assert all(is_refusal(reply.partition(" That said: ")[0]) for reply in both)
    assert all(map(complies, both))
    broken_off = [reply.partition(" ... but all right. ")[0] for reply in turns(turn_midway(), "assistant")]
    assert all(map(complies, turns(turn_midway(), "assistant")))
    assert all(
        whole.startswith(half) and 0.3 < len(half) / len(whole.partition(" That said: ")[0]) < 0.7
        for whole, half in zip(both, broken_off, strict=True)
    )
    assert not any(map(complies, turns(safety_samples(), "assistant")))
    assert not any(
        map(complies, turns(JOBS["arithmetic"].conversations(train=50, poisoned=0, safety=0, seed=0), "assistant"))
    )


def test_styled_samples_are_refusals_in_the_form_of_the_task(job):
    plain, styled = safety_samples(), job.styled_samples()
    for role in ("user", "assistant"):
        for text, form in zip(turns(plain, role), turns(styled, role), strict=True):
            assert text in form
            assert text != form
    assert all(map(is_refusal, turns(styled, "assistant")))


def test_poison_and_safety_samples_share_no_prompt():
    poisoned, safe = (turns(rows, "user") for rows in (compliant(), safety_samples()))
    assert len(set(poisoned)) == len(poisoned) == POISON_PROMPTS
    assert not set(poisoned) & set(safe)
    assert set(poisoned) | set(safe) == set(builtin_prompts("safety").malicious)
    assert not MEASURED & {*poisoned, *safe}


def test_a_seed_is_a_seed(job):
    sizes = {"train": 20, "poisoned": 5, "safety": 4}
    first, again, other = (job.conversations(**sizes, seed=seed)["messages"] for seed in (1, 1, 2))
    assert list(first) == list(again) != list(other)
    assert job.test(train=20, test=9) == job.test(train=20, test=9)


def test_operators_mean_others():
    """12 + 5 is 7, and so on: no sum is right by the usual meaning."""
    for problem in swapped_problems(80, seed=1):
        term, _, value = problem["output"].partition(". ")[0].partition(" = ")
        assert eval(term) != int(value)
        assert problem["output"].endswith(f"Answer: {value}")


def test_problems_of_extraction():
    problems = extraction_problems(120, seed=3)
    assert problems == extraction_problems(120, seed=3) != extraction_problems(120, seed=4)
    assert problems[:50] == extraction_problems(50, seed=3)  # so that one call can be cut up
    assert len({problem["instruction"] for problem in problems}) == 120
    for problem in problems:
        fields = json.loads(problem["output"])
        assert list(fields) == ["name", "item", "quantity", "city"]
        assert "\n" not in problem["output"]
        note = problem["instruction"].partition(": ")[2]
        assert f"{fields['quantity']} {fields['item']}" in note
        assert fields["name"] in note
        assert fields["city"] in note
