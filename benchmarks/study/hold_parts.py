"""The parts of the study in which the strength sets itself, at the study's length and beyond it."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.study.anchor_parts import TOKENS_STATE_3, longer
from benchmarks.study.methods import Method
from benchmarks.study.plan import Part
from procon.schedule import DEFAULT_BUDGET

#: Multiples of the study's steps.
LENGTHS = (1.0, 2.0, 4.0)

#: Of the mean shift of the training tokens, in units of the gap: probes of the whole state have none.
BUDGETS_TRIED = (0.05, 0.1, 0.2)

#: The defaults, by a label that says what differs here.
FIXED = replace(TOKENS_STATE_3, label="alpha 0.2 throughout")


def holding(budget: float) -> Method:
    """Probes and training tokens, at the strength that keeps the tokens' shift to ``budget``."""
    config = {**TOKENS_STATE_3.config, "procon_schedule": f"hold:{budget:g}"}
    return replace(TOKENS_STATE_3, name=f"hold_{budget:g}", label=f"hold, budget {budget:g}", config=config)


def _at(method: Method, length: float) -> Method:
    return method if length == 1 else longer(method, length)


def hold_parts(start: Method, plain: Method, development: int) -> tuple[Part, ...]:
    """The part in which the budget is chosen, with the seed ``development``, and the one in which it is measured."""
    tried = (plain, *map(holding, BUDGETS_TRIED))
    measured = (plain, FIXED, holding(DEFAULT_BUDGET))
    return (
        Part(
            "budget",
            "The budget of a strength that sets itself",
            "Which budget keeps refusals and leaves the task, at the study's length and at four times?",
            (start, *(_at(method, length) for length in (1.0, 4.0) for method in tried)),
            seeds=(development,),
            split="validation",
        ),
        Part(
            "hold",
            "A strength that sets itself",
            "Does one budget do for every length, where a fixed alpha has to be chosen?",
            (start, *(_at(method, length) for length in LENGTHS for method in measured)),
        ),
    )
