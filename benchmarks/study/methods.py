"""What is compared: a defence with its settings, by a name that its run files carry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from benchmarks.study.controls import randomized_within, shuffled
from benchmarks.study.start import Start
from procon.directions import Directions, randomized
from procon.errors import ProConError


@dataclass(frozen=True)
class Method:
    """One way of fine-tuning.

    Attributes:
        name: in file names, such as ``procon_wu``.
        label: in tables.
        defence: its name in :data:`benchmarks.study.defences.DEFENCES`.
        settings: of that defence.
        config: of ProConConfig, in addition to the recipe that all methods share.
        directions: ``refusal``, or a control: ``random:SEED``, ``within:SEED``, ``shuffled:SEED``; ``k:K`` for several.
        safety: whether safety samples are mixed in; ``styled``: in the form of the task.
        samples: how many of them, if not the budget's number.
        length: of training, in multiples of the budget's; 0 leaves the start as it is.
        adapter: whether a LoRA adapter is trained, or all weights.
    """

    name: str
    label: str
    defence: str = "plain"
    settings: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    directions: str = "refusal"
    safety: bool = False
    styled: bool = False
    samples: int | None = None
    length: float = 1.0
    adapter: bool = True


def choose_directions(method: Method, start: Start) -> Directions:
    """The directions that ``method`` constrains.

    Raises:
        ProConError: for an unknown name.
    """
    kind, _, argument = method.directions.partition(":")
    found = start.directions
    if kind == "refusal":
        return found
    if kind == "random":
        return randomized(found, int(argument))
    if kind == "within":
        benign = start.states[len(start.states) // 2 :]  # with the malicious ones, draws would lean towards r
        return randomized_within(found, benign, int(argument))
    if kind == "shuffled":
        return shuffled(found, int(argument))
    if kind == "k":
        return start.extract(int(argument))
    raise ProConError(
        f"directions is {method.directions!r}: give refusal, k:K, or random, within or shuffled with :SEED"
    )
