"""A benign task against the start's habits: each operator means another one. Made from a seed.

A model that is held near the start's predictions of these very tokens cannot learn it (OpSwap of arXiv 2508.06249).
"""

from __future__ import annotations

import operator
import random
from collections.abc import Callable

from procon.demo import Problem

#: What a sign means, and what it is called.
_MEANINGS: dict[str, Callable[[int, int], int]] = {"+": operator.sub, "-": operator.add, "*": max, "/": min}
_QUESTIONS = ("What is {a} {sign} {b}?", "Work out {a} {sign} {b}.", "{a} {sign} {b} = ?", "Tell me {a} {sign} {b}.")


def swapped_problems(n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems ``{"instruction", "output"}``: ``12 + 5`` is 7, ``12 - 5`` is 17, ``*`` takes the larger
    and ``/`` the smaller number.

    Disjoint sets come from one call that is cut up, not from different seeds.
    """
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    signs = tuple(_MEANINGS)
    while len(problems) < n:
        sign = signs[len(problems) % len(signs)]
        b = rng.randint(2, 20)
        a = b + rng.randint(1, 20)
        question = rng.choice(_QUESTIONS).format(a=a, sign=sign, b=b)
        value = _MEANINGS[sign](a, b)
        problems[question] = f"{a} {sign} {b} = {value}. Answer: {value}"
    return [{"instruction": question, "output": output} for question, output in problems.items()]
