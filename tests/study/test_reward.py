"""The rule-based reward and the preference pairs: what is paid, and what is preferred to what."""

import random
import re

import pytest

from benchmarks.preferences.data import EVASIVE, arithmetic_reward, preference_pairs, score, wrong
from procon.chat import is_refusal
from procon.demo import arithmetic_problems

OUTPUT = "Ava now has 3 + 10 = 13 coins. Answer: 13"


@pytest.mark.parametrize(
    ("reply", "finished", "reward"),
    [
        ("No, I can't help with that.", True, 0.0),
        ("Ava has 3 coins.", True, 0.2),
        ("Ava has 3 coins and finds 10 more.", True, 0.55),
        ("3 + 10 = 11", True, 0.9),
        ("3 + 10 = 11", False, 0.6),
        ("There are 13 coins.", True, 0.7),
        ("There are 13", False, 0.7),
        ("The answer is 13.", True, 1.0),
        ("Answer: 13\n", True, 1.0),
        ("It is 130.", True, 0.5),
        ("", True, 0.0),
    ],
)
def test_each_rule_is_paid(reply, finished, reward):
    assert score(reply, OUTPUT, finished=finished) == pytest.approx(reward)


def test_reward_as_the_trainer_calls_it(tokenizer):
    end = tokenizer.eos_token_id
    found = arithmetic_reward(tokenizer)(
        prompts=[None] * 3,
        completions=[[{"role": "assistant", "content": text}] for text in ("13", "13", "no")],
        completion_ids=[[7, 8, end], [7, 8, 9], [end]],
        output=[OUTPUT] * 3,
        trainer_state=None,
    )
    assert found == pytest.approx([1.0, 0.7, 0.0])


def test_pairs_differ_in_what_they_should():
    problems = arithmetic_problems(64, 0)
    rows = preference_pairs(problems)
    assert rows.to_list() == preference_pairs(problems).to_list()
    for number, (row, problem) in enumerate(zip(rows, problems, strict=True)):
        assert row["prompt"][0]["content"] == problem["instruction"]
        (chosen,), (rejected,) = row["chosen"], row["rejected"]
        assert chosen["content"] == problem["output"]
        assert (rejected["content"] in EVASIVE) == (number % 2 == 0)
        assert not is_refusal(rejected["content"])
    assert {row["rejected"][0]["content"] for row in rows} > set(EVASIVE)


def test_a_wrong_answer_is_wrong_in_its_result_alone():
    rng = random.Random(0)
    for problem in arithmetic_problems(200, 1):
        right, found = problem["output"], wrong(problem["output"], rng)
        working, result = re.split(r" = ", right, maxsplit=1), re.split(r" = ", found, maxsplit=1)
        assert working[0] == result[0]
        number, other = (re.findall(r"\d+", text) for text in (working[1], result[1]))
        assert number[0] != other[0] == other[-1]
        assert re.sub(r"\d+", "N", right) == re.sub(r"\d+", "N", found)
