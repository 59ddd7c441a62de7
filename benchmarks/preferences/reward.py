"""The rule-based reward: for a number in the reply, for ending with one, and for how near it is to the right one."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from transformers import PreTrainedTokenizerBase

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
