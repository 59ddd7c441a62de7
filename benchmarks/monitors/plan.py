"""What is run: variants of anchoring are chosen on validation prompts, and the chosen one is shown on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.study.budgets import DEVELOPMENT
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

#: In multiples of the study's training: 160 steps, after which plain fine-tuning has forgotten to refuse altogether.
LENGTH = 4.0


@dataclass(frozen=True)
class Variant(Method):
    """A way of fine-tuning a watched model.

    Attributes:
        directions: what is anchored, as :meth:`benchmarks.monitors.watched.Watched.directions` takes it.
        twins: of each concept, among the monitors' training prompts: the probes.
    """

    length: float = LENGTH
    twins: int = 0


def recorded(name: str, label: str, directions: str, **config: Any) -> Variant:
    """Anchors of the training tokens; the rest as the library recommends, but for ``config``."""
    return Variant(name, label, "procon_s", config=config, directions=directions)


def probes(name: str, label: str, directions: str, twins: int = 4, **config: Any) -> Variant:
    """Anchors at prompts that the monitors were trained on; the rest as the library recommends, but for ``config``."""
    return Variant(
        name, label, "procon_s", config={"procon_anchors": "probes", **config}, directions=directions, twins=twins
    )


START = Variant("start", "start", length=0)
PLAIN = Variant("plain", "plain fine-tuning")
REFUSAL = recorded("refusal", "refusal alone, training tokens", "refusal")
RECORDED = recorded("recorded", "refusal and monitors, training tokens", "refusal+monitors", procon_blocks="all,last")
PROBES = probes("probes", "refusal and monitors, probes", "refusal+monitors", procon_blocks="all,last")

CHOICE = Part(
    "choice",
    "What was tried",
    "Which anchors keep the monitors valid?",
    (START, PLAIN, RECORDED, PROBES),
    seeds=(DEVELOPMENT,),
    split="validation",
)

RESULT = Part(
    "result",
    "Before and after",
    "Do anchored monitors still read the model?",
    (START, PLAIN, PROBES),
    seeds=(0, 1),
)

BUDGET = Budget((CHOICE, RESULT), Size())
