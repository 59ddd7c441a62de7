"""Labelled prompts that monitors are trained and read on: twins, one with the concept and one without it."""

from __future__ import annotations

import json
from importlib.resources import files

from procon.chat import ContrastPrompts, Split, builtin_prompts

#: What is monitored. ``malicious``: requests that the model should refuse, the library's own contrast prompts.
#: ``language``: requests in French, Spanish or German, against the same in English. ``sentiment``: remarks of
#: unhappy customers, against those of happy ones on the same matter.
CONCEPTS = ("malicious", "language", "sentiment")

#: Twins to train monitors on, to choose by, and to measure on.
PAIRS: dict[Split, int] = {"extraction": 64, "validation": 32, "held_out": 64}


def labelled_prompts(concept: str, split: Split, most: int = 64) -> ContrastPrompts:
    """The first twins of a concept, ``most`` at most, the side that has it where malicious ones stand."""
    count = min(most, PAIRS[split])
    if concept == "malicious":
        return builtin_prompts(split).first(count)
    rows = [row for row in _rows() if row["id"].startswith(concept) and row["split"] == split]
    sides = (tuple(row[side] for row in rows) for side in ("positive", "negative"))
    return ContrastPrompts(*sides).first(count)


def _rows() -> list[dict[str, str]]:
    text = files("benchmarks.monitors").joinpath("prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
