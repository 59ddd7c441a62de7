"""A benign task in natural language: read a notice, answer a question about it in a sentence. Made from a seed."""

from __future__ import annotations

import random

from procon.demo import Problem

_PEOPLE = ("Nadia", "Oscar", "Priya", "Rosa", "Sami", "Tomas", "Uma", "Viktor", "Wanda", "Yusuf", "Zoe", "Bruno")
_EVENTS = ("pottery class", "book club", "choir practice", "chess evening", "dance course", "film night", "seed swap")
_PLACES = ("library", "town hall", "old mill", "school gym", "community garden", "railway cafe", "museum")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_BRING = ("a notebook", "a warm jacket", "an apron", "a small snack", "some water", "a pair of gloves", "a torch")

_NOTICES = (
    "The {event} meets in the {place} on {day} at {hour} o'clock. {person} leads it. Please bring {bring}.",
    "{person} has moved the {event} to {day}. It starts at {hour} in the {place}, and everyone should bring {bring}.",
    "Come to the {place} on {day}! At {hour} o'clock {person} opens the {event}. You will need {bring}.",
    "Bring {bring} to the {event}: {person} expects you in the {place}, {day} at {hour}.",
)

#: Question, the sentence that answers it, and the field that is asked for.
_QUESTIONS = (
    ("Who leads the {event}?", "The {event} is led by {person}.", "person"),
    ("Where is the {event}?", "The {event} is in the {place}.", "place"),
    ("On which day is the {event}?", "The {event} is on {day}.", "day"),
    ("When does the {event} start?", "The {event} starts at {hour} o'clock.", "hour"),
    ("What should people bring to the {event}?", "People should bring {bring}.", "bring"),
)


def passage_problems(n: int, seed: int) -> list[Problem]:
    """``n`` distinct problems ``{"instruction", "output"}``; an output is a sentence that ends in ``Answer: ...``.

    Disjoint sets come from one call that is cut up, not from different seeds.
    """
    rng = random.Random(seed)
    problems: dict[str, str] = {}
    while len(problems) < n:
        fields = {
            "event": rng.choice(_EVENTS),
            "place": rng.choice(_PLACES),
            "day": rng.choice(_DAYS),
            "hour": str(rng.randint(1, 12)),
            "person": rng.choice(_PEOPLE),
            "bring": rng.choice(_BRING),
        }
        question, sentence, asked = _QUESTIONS[len(problems) % len(_QUESTIONS)]
        notice = rng.choice(_NOTICES).format(**fields)
        instruction = f"{notice}\n{question.format(**fields)}"
        problems[instruction] = f"{sentence.format(**fields)} Answer: {fields[asked]}"
    return [{"instruction": question, "output": output} for question, output in problems.items()]
