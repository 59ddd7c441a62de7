"""What is run: variants of anchoring are chosen on validation prompts, and the chosen one is shown on held-out ones."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from benchmarks.study.budgets import DEVELOPMENT
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

#: In multiples of the study's 40 steps.
SHORT, LONG = 1.0, 4.0


@dataclass(frozen=True)
class Variant(Method):
    """A way of fine-tuning a watched model.

    Attributes:
        directions: what is anchored, as :meth:`benchmarks.monitors.watched.Watched.directions` takes it.
        twins: of each concept, among the monitors' training prompts: the probes.
    """

    twins: int = 0


def anchored(name: str, label: str, directions: str, twins: int = 0, **config: Any) -> Variant:
    """Anchors along the directions in the deep half of the blocks, where monitors read; of training tokens unless
    ``config`` says otherwise. The rest as the library has it.

    Args:
        twins: of each concept, as probes; none if training tokens alone are anchored.
    """
    along = {"procon_blocks": "0.5,last", "procon_anchors": "recorded", "procon_probe_hold": "projections"}
    config = {**along, **config}
    return Variant(name, label, "procon_s", config=config, directions=directions, twins=twins)


def longer(variant: Variant) -> Variant:
    """The same, for four times the steps."""
    return replace(variant, name=f"{variant.name}_x{LONG:g}", label=variant.label, length=LONG)


START = Variant("start", "start", length=0)
PLAIN = Variant("plain", "plain fine-tuning")

ALL = "refusal+monitors"
PROBES = anchored("probes", "monitors and refusal, at probes", ALL, 4, procon_anchors="probes")

VARIANTS = (
    PROBES,
    anchored("tokens", "monitors and refusal, at training tokens", ALL),
    anchored("refusal_probes", "refusal alone, at the same probes", "refusal", 4, procon_anchors="probes"),
    anchored(
        "probes_weak", "as the first, a tenth of the weight", ALL, 4, procon_anchors="probes", procon_probe_weight=5.0
    ),
    anchored("both", "monitors and refusal, at probes and training tokens", ALL, 4, procon_anchors="recorded+probes"),
)

CHOICE = Part(
    "choice",
    "What was tried",
    "Which anchors keep the monitors valid?",
    (START, PLAIN, *VARIANTS),
    seeds=(DEVELOPMENT,),
    split="validation",
)

RESULT = Part(
    "result",
    "Before and after",
    "Do anchored monitors still read the model?",
    (START, longer(PLAIN), longer(PROBES)),
    seeds=(0, 1),
)

BUDGET = Budget((CHOICE, RESULT), Size(test=64))
