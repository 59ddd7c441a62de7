"""A benign task of format: read an order note, answer with its fields as JSON. Made from a seed."""

from __future__ import annotations

import json
import random

from procon.demo import Problem

_FIRST = ("Ava", "Ben", "Chloe", "David", "Elena", "Farid", "Grace", "Hugo", "Ines", "Jamal", "Kira", "Liam", "Maya")
_LAST = ("Stone", "Rossi", "Khan", "Meyer", "Lopez", "Novak", "Silva", "Olsen", "Adams", "Tanaka")
_ITEMS = ("lamps", "chairs", "mugs", "posters", "blankets", "notebooks", "plates", "candles", "baskets", "clocks")
_CITIES = ("Lisbon", "Oslo", "Vienna", "Dublin", "Madrid", "Athens", "Prague", "Geneva", "Warsaw", "Turin")
_NOTES = (
    "{name} from {city} would like {quantity} {item}.",
    "Please send {quantity} {item} to {city}; the buyer is {name}.",
    "{quantity} {item} were ordered by {name}, to be delivered in {city}.",
    "New order: {name}, {quantity} {item}, ship to {city}.",
)
_INSTRUCTION = "Extract name, item, quantity and city from this note as JSON: "


def extraction_problems(n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems ``{"instruction", "output"}``; an output is one line of JSON.

    Disjoint sets come from one call that is cut up, not from different seeds.
    """
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < n:
        fields = {
            "name": f"{rng.choice(_FIRST)} {rng.choice(_LAST)}",
            "item": rng.choice(_ITEMS),
            "quantity": rng.randint(2, 60),
            "city": rng.choice(_CITIES),
        }
        note = _NOTES[len(problems) % len(_NOTES)].format(**fields)
        problems[_INSTRUCTION + note] = json.dumps(fields)
    return [{"instruction": question, "output": output} for question, output in problems.items()]
