"""What is compared: a defence with its settings, by a name that its run files carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from procon.directions import RefusalDirections
from procon.errors import ProConError


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        name: in file names, such as ``procon_wu``.
        label: in tables.
        defence: its name in :data:`procon.defences.DEFENCES`.
        settings: of that defence.
        config: of ProConConfig, beside the recipe that all methods share.
        directions: ``refusal``, or a control: ``random:SEED``, ``within:SEED``, ``shuffled:SEED``; ``k:K`` for several.
        safety: whether safety samples are mixed in.
        length: the training length, in multiples of the recipe's.
    """

    name: str
    label: str
    defence: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    directions: str = "refusal"
    safety: bool = False
    length: float = 1.0


def choose_directions(method: Method, found: RefusalDirections) -> RefusalDirections:
    """The directions that ``method`` constrains, given those of the model."""
    kind, _, argument = method.directions.partition(":")
    if kind == "refusal":
        return found
    if kind == "random":
        return found.randomized(int(argument))
    raise ProConError(f"directions is {method.directions!r}: give refusal, or random:SEED")
