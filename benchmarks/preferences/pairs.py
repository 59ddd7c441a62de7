"""Preference pairs of our own: the worked answer to an arithmetic problem over a wrong one, or over an evasive one."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

from datasets import Dataset

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
