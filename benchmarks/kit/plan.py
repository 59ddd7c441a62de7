"""What the kit compares, from names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import product

from benchmarks.study.anchor_parts import longer
from benchmarks.study.budgets import BUDGETS, START
from benchmarks.study.hard_parts import DEFAULT
from benchmarks.study.jobs import find_job
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size
from procon.errors import ProConError

#: The library's default of supervised training, by a name that says so.
PROCON = replace(DEFAULT, name="procon", label="ProCon, the default")


def known_methods() -> dict[str, Method]:
    """Every method of the study that trains for its usual length, by name."""
    found = {
        method.name: method
        for budget in BUDGETS.values()
        for part in budget.parts
        for method in part.methods
        if method.length == 1
    }
    return {PROCON.name: PROCON, **found}


def kit_budget(
    methods: Sequence[str],
    tasks: Sequence[str],
    poison: Sequence[int],
    lengths: Sequence[float],
    seeds: Sequence[int],
    size: Size,
) -> Budget:
    """A part for each length, with all methods on all tasks, clean and with so many per cent of poison.

    Raises:
        ProConError: for a name that is not known, and a length, share or seed that cannot be.
    """
    if not (methods and tasks and poison and lengths and seeds):
        raise ProConError("nothing is compared: give at least one method, task, share of poison, length and seed")
    if min(lengths) <= 0 or min(seeds) < 0:
        raise ProConError("lengths and seeds are counts: give lengths above 0, and seeds of 0 or more")
    chosen = [_method(name) for name in methods]
    jobs = tuple(task if share == 0 else f"{task}_poisoned_{share}" for task, share in product(tasks, poison))
    for job in jobs:
        find_job(job)
    parts = [
        Part(
            f"kit_x{length:g}",
            "The usual length" if length == 1 else f"{length:g} times the steps",
            "What does each defence keep, and at what price?",
            (START, *(method if length == 1 else longer(method, length) for method in chosen)),
            jobs,
            tuple(seeds),
        )
        for length in lengths
    ]
    return Budget(tuple(parts), size)


def _method(name: str) -> Method:
    known = known_methods()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"choose of {', '.join(known)}"
        raise ProConError(f"there is no method {name!r:.60}: {hint}")
    return known[name]
