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

SEEDS = (0, 1)


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


_EVERYWHERE = {"procon_blocks": "all,last"}
_DEEP = {"procon_blocks": "0.5,last"}
_WITH_TOKENS = {"procon_anchors": "recorded+probes"}
_BOTH = {"procon_probe_hold": "both"}

#: SBR (arXiv 2605.05995): the whole last hidden state of eight probes, after the final norm, mean squared.
SBR = probing("sbr", "SBR", 10, procon_probe_hold="state")
PROBES = probing("probes_10", "probes, projections", 10, **_EVERYWHERE)
BOTH = probing("both_10", "probes, projections and state", 10, **_EVERYWHERE, **_BOTH)
BOTH_3 = probing("both_3", "probes, projections and state, weight 3", 3, **_EVERYWHERE, **_BOTH)
TOKENS_BOTH = probing(
    "tokens_both_10",
    "the same and training tokens, alpha 0.05",
    10,
    alpha=0.05,
    **_EVERYWHERE,
    **_BOTH,
    **_WITH_TOKENS,
)
TOKENS_STATE = probing(
    "tokens_state_10", "SBR and training tokens, alpha 0.1", 10, alpha=0.1, procon_probe_hold="state", **_WITH_TOKENS
)
TOKENS_STATE_LIGHT = probing(
    "tokens_state_10_0.05",
    "SBR and training tokens, alpha 0.05",
    10,
    alpha=0.05,
    procon_probe_hold="state",
    **_WITH_TOKENS,
)
TOKENS_STATE_STRONG = probing(
    "tokens_state_10_0.2", "SBR and training tokens, alpha 0.2", 10, procon_probe_hold="state", **_WITH_TOKENS
)
TOKENS_STATE_3 = probing(
    "tokens_state_3_0.2",
    "SBR at weight 3 and training tokens, alpha 0.2",
    3,
    procon_probe_hold="state",
    **_WITH_TOKENS,
)
TOKENS_STATE_RANDOM = replace(
    TOKENS_STATE,
    name="tokens_state_10_random",
    label="SBR and training tokens, random directions",
    directions="random:1",
)
RANDOM = probing("probes_10_random", "probes, random directions", 10, directions="random:1", **_EVERYWHERE)

#: What is compared at every length and with every seed; with the start, plain training and ProCon_s.
SOURCES = (
    SBR,
    PROBES,
    BOTH,
    TOKENS_BOTH,
    BOTH_3,
    TOKENS_STATE,
    TOKENS_STATE_LIGHT,
    TOKENS_STATE_STRONG,
    TOKENS_STATE_3,
    TOKENS_STATE_RANDOM,
    RANDOM,
)

#: Beside ProCon_s, on data with poison.
POISONED = (SBR, TOKENS_STATE, TOKENS_STATE_STRONG, TOKENS_STATE_3)

#: Other settings, at the length at which they were tried.
SETTINGS = (
    probing(
        "tokens_both_10_0.2", "the same and training tokens, alpha 0.2", 10, **_EVERYWHERE, **_BOTH, **_WITH_TOKENS
    ),
    probing("probes_deep_1", "probes, deep half and last output, weight 1", 1, **_DEEP),
    probing("tokens_probes_deep_1", "the same and training tokens, alpha 0.1", 1, alpha=0.1, **_DEEP, **_WITH_TOKENS),
)


def source_parts(start: Method, plain: Method, procon_s: Method) -> tuple[Part, ...]:
    """The parts in which sources of anchors are compared, and the settings of probes chosen."""
    compared = (plain, procon_s, *SOURCES)
    return (
        Part(
            "sources_long",
            "Where anchors come from, four times the steps",
            "Which tokens should be kept where they were, if training is long?",
            (start, *map(longer, compared)),
            seeds=SEEDS,
            split="validation",
        ),
        Part(
            "sources",
            "Where anchors come from",
            "Which tokens should be kept where they were, at the study's length?",
            (start, *compared),
            seeds=SEEDS,
            split="validation",
        ),
        Part(
            "sources_poisoned",
            "Where anchors come from, poisoned data",
            "Which tokens should be kept where they were, if some samples obey harmful requests?",
            (start, plain, procon_s, *POISONED),
            ("poisoned",),
            seeds=SEEDS,
            split="validation",
        ),
        Part(
            "settings",
            "Settings of probes, four times the steps",
            "How strongly should probes be kept, and where?",
            (start, *map(longer, (plain, SBR, PROBES, BOTH, TOKENS_BOTH, *SETTINGS, BOTH_3, TOKENS_STATE))),
            seeds=SEEDS[:1],
            split="validation",
        ),
    )
