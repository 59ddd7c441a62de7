"""What is compared, and how much of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.preferences.dpo import DPO
from benchmarks.preferences.grpo import GRPO
from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

RUNS = Path(__file__).parent / "runs"

ALGORITHMS = {algorithm.name: algorithm for algorithm in (DPO, GRPO)}

START = Method("start", "start", length=0)
PLAIN = Method("plain", "plain")


def constrained(name: str, label: str, *, directions: str = "refusal", **config: Any) -> Method:
    """The library's defaults, except for ``config``; live anchors alone unless it says otherwise."""
    config = {"procon_anchors": "live", **config}
    return Method(name, label, "procon_s", config=config, directions=directions)


#: At probes the whole last state, as SBR (arXiv 2605.05995) keeps it.
_STATE = {"procon_probe_hold": "state"}

LIVE = constrained("live", "ProCon, live anchors")
BOTH = constrained("live_probes", "ProCon, live anchors and probes", procon_anchors="live+probes", **_STATE)
PROBES = constrained("probes", "probes alone (SBR)", procon_anchors="probes", **_STATE)
RANDOM = constrained("random1", "random directions, live anchors", directions="random:1")

#: The KL divergence of GRPO itself keeps a model near its start: plain GRPO with it is a baseline, not a control.
_KL = {"beta": 0.04}
PLAIN_KL = Method("plain_kl", "plain, beta 0.04", config=_KL)
LIVE_KL = constrained("live_kl", "ProCon, live anchors, beta 0.04", **_KL)

PLAN = Budget(
    (
        Part(
            "dpo",
            "DPO on preference pairs",
            "The worked answer to an arithmetic problem is preferred to a wrong one, or to words without an answer.",
            (START, PLAIN, LIVE, BOTH, PROBES, RANDOM),
            ("dpo",),
            seeds=(0, 1),
        ),
        Part(
            "grpo",
            "GRPO on a rule-based reward",
            "A reply to an arithmetic problem is paid for a number, for ending with it, and for the right one.",
            (START, PLAIN, LIVE, PLAIN_KL, LIVE_KL, PROBES, RANDOM),
            ("grpo",),
            seeds=(0, 1),
        ),
    ),
    Size(train=320, test=64, prompts=64),
)
