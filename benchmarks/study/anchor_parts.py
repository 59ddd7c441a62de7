"""The parts of the study that compare where anchors come from, at the study's length and beyond it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.study.methods import Method
from benchmarks.study.plan import Part

#: Of the training tokens' penalty, as the other parts chose it.
ALPHA = 0.2

#: Multiples of the study's steps.
LONG = 4.0


def probing(
    name: str, label: str, weight: float, *, alpha: float = ALPHA, directions: str = "refusal", **config: Any
) -> Method:
    """Probes, with training tokens or without: ``weight`` is theirs, ``alpha`` included, and ``alpha`` the tokens'."""
    chosen = {
        "procon_schedule": f"procon_s:{alpha:g}",
        "procon_anchors": "probes",
        "procon_probe_weight": weight / alpha,
        "procon_probe_every": 2,
    }
    return Method(name, label, "procon_s", config={**chosen, **config}, directions=directions)


def longer(method: Method, length: float = LONG) -> Method:
    """The same, for so many times the steps."""
    return replace(method, name=f"{method.name}_x{length:g}", label=f"{method.label}, {length:g}x", length=length)


_DEEP = {"procon_blocks": "0.5,last"}
_WITH_TOKENS = {"procon_anchors": "recorded+probes"}

#: SBR (arXiv 2605.05995): the whole last hidden state of eight probes, after the final norm, mean squared.
SBR = probing("sbr", "SBR", 10, procon_probe_hold="state")

CANDIDATES = (
    SBR,
    probing("probes_deep_1", "probes, deep half and last output, weight 1", 1, **_DEEP),
    probing("tokens_probes_deep_1", "the same and training tokens, alpha 0.1", 1, alpha=0.1, **_DEEP, **_WITH_TOKENS),
)


def source_parts(start: Method, plain: Method) -> tuple[Part, ...]:
    """The part in which the settings of probes are chosen."""
    return (
        Part(
            "sources",
            "Where anchors come from, four times the steps",
            "Which tokens should be kept where they were, if training is long?",
            (start, longer(plain), *map(longer, CANDIDATES)),
            seeds=(0,),
            split="validation",
        ),
    )
