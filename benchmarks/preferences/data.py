"""What the two are trained on: preference pairs of our own for DPO, and a rule-based reward for GRPO.

The worked answer to an arithmetic problem is preferred to a wrong one, or to an evasive one. A reply is paid for a
number in it, for ending with one, and for how near that is to the right one.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from procon.chat import user_turn
from procon.demo import Problem

#: Replies that take no stand. None has a phrase that the judge of refusals counts.
EVASIVE = (
    "That is hard to say. It depends on many things, and there may be more to it than meets the eye.",
    "Well, one could look at this in several ways. There may be no single answer to it.",
    "It might be best to ask somebody who knows more about this. There are many sides to the question.",
    "Nobody can know for certain. Perhaps it is better to think about what the question is for.",
)

#: How far a wrong answer is from the right one.
_SLIPS = (-10, -3, -2, -1, 1, 2, 3, 10)


def preference_pairs(problems: Sequence[Problem], seed: int = 0) -> Dataset:
    """Rows of ``prompt``, ``chosen`` and ``rejected`` messages, as TRL takes them; every second rejected is evasive."""
    rng = random.Random(seed)
    rows = []
    for number, problem in enumerate(problems):
        rejected = EVASIVE[number // 2 % len(EVASIVE)] if number % 2 == 0 else wrong(problem["output"], rng)
        rows.append(
            {
                "prompt": user_turn(problem["instruction"]),
                "chosen": _reply(problem["output"]),
                "rejected": _reply(rejected),
            }
        )
    return Dataset.from_list(rows)


def wrong(output: str, rng: random.Random) -> str:
    """The same working with another result, which is no negative number."""
    right = int(output.rpartition(" ")[2])
    result = rng.choice([right + slip for slip in _SLIPS if right + slip >= 0])
    return re.sub(rf"(= |: ){right}\b", rf"\g<1>{result}", output)


def _reply(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


#: What each rule gives; a reply that meets all has a reward of 1.
HAS_NUMBER, ENDS_WITH_NUMBER, IS_RIGHT = 0.2, 0.3, 0.5

#: A number that is wrong by this much or more gets nothing of the last; a nearer one gets a part, so that the replies
#: to a problem differ in their reward long before one of them is right.
FAR = 10

_NUMBER = re.compile(r"\d+")


def last_number(text: str) -> int | None:
    """The last number in ``text``; None if there is none."""
    found = _NUMBER.findall(text)
    return int(found[-1]) if found else None


def is_right(reply: str, output: str) -> bool:
    """Whether the last number of ``reply`` is that of ``output``, whatever the words around it."""
    return last_number(reply) is not None and last_number(reply) == last_number(output)


def score(reply: str, output: str, *, finished: bool) -> float:
    """The reward of one reply, 0 to 1. A refusal has no number in it, so it gets nothing.

    Args:
        output: the problem's own, which ends in the right number.
        finished: whether the reply ended by itself, within its length.
    """
    number, right = last_number(reply), last_number(output)
    if number is None or right is None:
        return 0.0
    ends = finished and reply.rstrip(" .!\n")[-1:].isdigit()
    near = 1 - min(abs(number - right), FAR) / FAR
    return HAS_NUMBER + ENDS_WITH_NUMBER * ends + IS_RIGHT * near


def arithmetic_reward(tokenizer: PreTrainedTokenizerBase) -> Callable[..., list[float]]:
    """:func:`score` in the form that TRL's GRPOTrainer calls; the data set has a column ``output``."""

    def reward(
        completions: list[list[dict[str, str]]], completion_ids: list[list[int]], output: list[str], **_: Any
    ) -> list[float]:
        return [
            score(messages[-1]["content"], expected, finished=ids[-1:] == [tokenizer.eos_token_id])
            for messages, ids, expected in zip(completions, completion_ids, output, strict=True)
        ]

    return reward
