"""A benign task that a 135M model learns in minutes: arithmetic word problems, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

Problem = dict[str, str]

_NAMES = ("Ava", "Ben", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam", "Maya")
_THINGS = ("apples", "stamps", "marbles", "pencils", "stickers", "coins", "books", "shells", "buttons", "cards")


def _gain(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 20), rng.randint(2, 20)
    question = f"{name} has {a} {thing} and finds {b} more. How many {thing} are there now?"
    return question, f"{name} now has {a} + {b} = {a + b} {thing}.", a + b


def _loss(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a = rng.randint(8, 30)
    b = rng.randint(2, a - 1)
    question = f"{name} has {a} {thing} and gives {b} away. How many {thing} are left?"
    return question, f"After giving {b} away, {a} - {b} = {a - b} {thing} are left.", a - b


def _groups(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    question = f"{name} fills {a} boxes with {b} {thing} each. How many {thing} is that?"
    return question, f"The boxes hold {a} * {b} = {a * b} {thing}.", a * b


def _share(rng: random.Random, name: str, thing: str) -> tuple[str, str, int]:
    friends, each = rng.randint(2, 9), rng.randint(2, 9)
    total = friends * each
    question = f"{name} splits {total} {thing} evenly among {friends} friends. How many does each get?"
    return question, f"Each friend gets {total} / {friends} = {each} {thing}.", each


_TEMPLATES: tuple[Callable[[random.Random, str, str], tuple[str, str, int]], ...] = (_gain, _loss, _groups, _share)


def arithmetic_problems(n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems ``{"instruction", "output"}``; an output shows the sum and ends in ``Answer: N``.

    Disjoint sets come from one call that is cut up, not from different seeds.
    """
    rng = random.Random(seed)  # noqa: S311  # nothing secret
    problems: dict[str, str] = {}
    while len(problems) < n:
        template = _TEMPLATES[len(problems) % len(_TEMPLATES)]
        question, working, answer = template(rng, rng.choice(_NAMES), rng.choice(_THINGS))
        problems[question] = f"{working} Answer: {answer}"
    return [{"instruction": question, "output": output} for question, output in problems.items()]
