"""A benign task that a 135M model learns in minutes: arithmetic word problems, made from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable

_NAMES = [
    "Ava",
    "Ben",
    "Chloe",
    "David",
    "Elena",
    "Farid",
    "Grace",
    "Hugo",
    "Ines",
    "Jamal",
    "Kira",
    "Liam",
    "Maya",
    "Noah",
    "Olga",
    "Pablo",
    "Quinn",
    "Rosa",
    "Sam",
    "Tara",
]
_THINGS = [
    "apples",
    "stamps",
    "marbles",
    "pencils",
    "stickers",
    "coins",
    "books",
    "shells",
    "buttons",
    "cards",
    "tickets",
    "cookies",
]
_PLACES = ["market", "library", "garden", "school", "park", "station", "kitchen", "workshop"]

Problem = dict[str, str]


def _gain_then_lose(rng: random.Random, name: str, thing: str, place: str) -> tuple[str, str, int]:
    a, b = rng.randint(5, 20), rng.randint(3, 15)
    c = rng.randint(2, a + b - 1)
    question = f"{name} has {a} {thing}, finds {b} more at the {place} and gives {c} away. How many {thing} are left?"
    return question, f"{name} first has {a} + {b} = {a + b} {thing}. Then {a + b} - {c} = {a + b - c}.", a + b - c


def _groups(rng: random.Random, name: str, thing: str, place: str) -> tuple[str, str, int]:
    a, b, c = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9)
    question = (
        f"At the {place} there are {a} boxes with {b} {thing} each, and {c} loose {thing}. How many {thing} in all?"
    )
    return question, f"The boxes hold {a} * {b} = {a * b} {thing}. Then {a * b} + {c} = {a * b + c}.", a * b + c


def _price(rng: random.Random, name: str, thing: str, place: str) -> tuple[str, str, int]:
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    paid = a * b + rng.randint(1, 20)
    question = f"{name} buys {a} {thing} at {b} dollars each and pays with {paid} dollars. How much change is due?"
    return (
        question,
        f"The {thing} cost {a} * {b} = {a * b} dollars. Then {paid} - {a * b} = {paid - a * b}.",
        paid - a * b,
    )


def _share(rng: random.Random, name: str, thing: str, place: str) -> tuple[str, str, int]:
    friends, each, extra = rng.randint(2, 6), rng.randint(2, 9), rng.randint(1, 9)
    total = friends * each
    question = (
        f"{name} splits {total} {thing} among {friends} friends. One had {extra} before. How many has that one now?"
    )
    return (
        question,
        f"Each friend gets {total} / {friends} = {each} {thing}. Then {each} + {extra} = {each + extra}.",
        each + extra,
    )


def _days(rng: random.Random, name: str, thing: str, place: str) -> tuple[str, str, int]:
    a, b, days = rng.randint(2, 9), rng.randint(1, 6), rng.randint(2, 6)
    question = f"Each day {name} takes {a} {thing} to the {place}, then {b} more. How many {thing} in {days} days?"
    return (
        question,
        f"Each day it is {a} + {b} = {a + b} {thing}. Then {a + b} * {days} = {(a + b) * days}.",
        (a + b) * days,
    )


_TEMPLATES: tuple[Callable[[random.Random, str, str, str], tuple[str, str, int]], ...] = (
    _gain_then_lose,
    _groups,
    _price,
    _share,
    _days,
)


def arithmetic_problems(n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems ``{"instruction", "output"}``; each output shows two steps and ends in ``Answer: N``.

    Disjoint sets come from one call that is cut up, not from different seeds.
    """
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < n:
        template = _TEMPLATES[len(problems) % len(_TEMPLATES)]
        question, working, answer = template(rng, rng.choice(_NAMES), rng.choice(_THINGS), rng.choice(_PLACES))
        problems[question] = f"{working} Answer: {answer}"
    return [{"instruction": question, "output": output} for question, output in problems.items()]
