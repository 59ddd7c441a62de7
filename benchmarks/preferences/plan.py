"""What is compared, and how much of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.preferences.dpo import DPO
from benchmarks.preferences.grpo import GRPO
from benchmarks.study.anchor_parts import longer
from benchmarks.study.budgets import DEVELOPMENT
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

RUNS = Path(__file__).parent / "runs"

ALGORITHMS = {algorithm.name: algorithm for algorithm in (DPO, GRPO)}

START = Method("start", "start", length=0)
PLAIN = Method("plain", "plain")


def constrained(name: str, label: str, *, directions: str = "refusal", **config: Any) -> Method:
    """The library's defaults for these trainers, except for ``config``."""
    return Method(name, label, "procon_s", config=config, directions=directions)


#: Of the probes' penalty, alpha included: that of SBR (arXiv 2605.05995), which keeps the whole last state.
_STATE_WEIGHT = 10.0


def probing(alpha: float, source: str) -> dict[str, Any]:
    """Probes kept as SBR keeps them, beside training tokens at ``alpha`` if ``source`` has them."""
    return {
        "procon_schedule": f"procon_s:{alpha:g}",
        "procon_anchors": source,
        "procon_probe_hold": "state",
        "procon_probe_weight": _STATE_WEIGHT / alpha,
    }


def live(alpha: float) -> Method:
    """Live anchors alone."""
    return constrained(f"live_{alpha:g}", f"ProCon, live anchors, alpha {alpha:g}", procon_schedule=f"procon_s:{alpha}")


def live_and_probes(alpha: float) -> Method:
    """Live anchors, and probes kept at their state."""
    name, label = f"live_probes_{alpha:g}", f"ProCon, live anchors and probes, alpha {alpha:g}"
    return constrained(name, label, **probing(alpha, "live+probes"))


LIVE = constrained("live", "ProCon, live anchors, alpha 0.2")
PROBES = constrained("probes", "probes as strong as SBR's", **probing(0.2, "probes"))
#: As strong as beside the training tokens of supervised training: with eight fixed probes, and the default.
PROBES_3 = constrained("probes_3", "eight fixed probes, weight 3", procon_anchors="probes")
DEFAULT = constrained("probes_3_turns_128", "probes, the default", procon_anchors="probes", procon_probe_count=128)
RANDOM = constrained("random1", "random directions, live anchors, alpha 0.2", directions="random:1")

#: The KL divergence of GRPO itself keeps a model near its start: plain GRPO with it is a baseline, not a control.
PLAIN_KL = Method("plain_kl", "plain, beta 0.04", config={"beta": 0.04})

_choice = partial(Part, seeds=(DEVELOPMENT,), split="validation")

PLAN = Budget(
    (
        Part(
            "dpo",
            "DPO on preference pairs",
            "The worked answer to an arithmetic problem is preferred to a wrong one, or to words without an answer.",
            (START, PLAIN, LIVE, live_and_probes(0.2), PROBES, PROBES_3, DEFAULT, RANDOM),
            ("dpo",),
            seeds=(0, 1),
        ),
        Part(
            "grpo",
            "GRPO on a rule-based reward",
            "A reply to an arithmetic problem is paid for a number, for ending with it, and for the right one.",
            (START, PLAIN, LIVE, live_and_probes(0.2), PROBES, PROBES_3, DEFAULT, PLAIN_KL, RANDOM),
            ("grpo",),
            seeds=(0, 1),
        ),
        Part(
            "grpo_long",
            "GRPO for longer",
            "Four times the steps: is the reward alike once both have learned?",
            (START, longer(PLAIN, 4.0), longer(PROBES_3, 4.0)),
            ("grpo",),
            seeds=(0,),
        ),
        _choice(
            "grpo_choice",
            "The strength under GRPO",
            "GRPO's gradient is not that of cross-entropy: which strength leaves it its reward?",
            (START, PLAIN, live(0.05), live(0.02), live_and_probes(0.05), PROBES, PROBES_3),
            ("grpo",),
        ),
    ),
    Size(train=320, test=64, prompts=64),
)
