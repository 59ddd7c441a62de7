"""The budgets: ``smoke`` for continuous integration, ``table`` for two CPU cores, ``full`` for GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size

#: The seed that choices are made with; no reported run has it.
DEVELOPMENT = 9

#: The strengths of the open question, by powers of ten and one between, for each unit.
STRENGTHS = {"raw": (0.01, 0.1, 0.3, 1.0), "gap": (0.1, 1.0, 10.0)}


def constrained(name: str, label: str, schedule: str, *, directions: str = "refusal", **config: Any) -> Method:
    """ProCon as it was chosen on validation prompts, but for ``config``."""
    chosen = {"procon_penalty": "absolute", "procon_scope": "all", "procon_schedule": schedule}
    return Method(name, label, "procon_s", config={**chosen, **config}, directions=directions)


def with_safety(method: Method) -> Method:
    """The same, with safety samples mixed in."""
    return replace(method, name=f"{method.name}_safe", label=f"{method.label}_safe", safety=True)


START = Method("start", "start", length=0)
PLAIN = Method("plain", "IFT")
PLAIN_LONG = Method("plain_long", "IFT, as long as ProCon_wu", length=1.5)
SAFE = Method("safe", "IFT_safe", "safe", safety=True)
OTHERS = (
    Method("sppft", "SPPFT", "sppft"),
    Method("constrained_sft", "constrained SFT", "constrained_sft"),
    Method("safe_lora", "SafeLoRA", "safe_lora"),
    Method("lisa", "Lisa", "lisa", {"alignment_steps": 4, "user_steps": 16}),
    Method("steering", "preventative steering", "steering", {"strength": 0.3}),
    Method("hidden_states", "hidden states, L2", "hidden_states", {"alpha": 1.0, "scope": "all"}),
)
PROCON_S = constrained("procon_s", "ProCon_s", "procon_s:0.3")
PROCON_WU = constrained("procon_wu", "ProCon_wu", "procon_wu:2@20steps")
PROCON_LIGHT = replace(constrained("procon_light", "ProCon_wu, then light", "2@20steps,0.1"), length=1.5)
LAST_BLOCK = constrained("last_block", "last block", "procon_s:0.3", procon_blocks="-1")
DEEP_HALF = constrained("deep_half", "deep half", "procon_s:0.3", procon_blocks="0.5")


def _strength(alpha: float, units: str, directions: str = "refusal") -> Method:
    kind, _, draw = directions.partition(":")
    name = f"{units}-{alpha:g}-{kind}{draw}"
    label = f"{kind} {draw}, {units} units, alpha {alpha:g}"
    return constrained(name, label, f"procon_s:{alpha:g}", directions=directions, procon_units=units)


TABLE = Part(
    "table",
    "Refusal and task after fine-tuning",
    "What does each defence keep, and at what price? (The paper's Tables I, III and IV.)",
    (
        START,
        PLAIN,
        PLAIN_LONG,
        SAFE,
        *OTHERS,
        PROCON_S,
        PROCON_WU,
        PROCON_LIGHT,
        with_safety(PROCON_S),
        with_safety(PROCON_WU),
        with_safety(PROCON_LIGHT),
    ),
    ("arithmetic", "poisoned"),
)
LAYERS = Part(
    "layers",
    "Which blocks are constrained",
    "Does the last block suffice? (The paper's Table V.)",
    (PLAIN, LAST_BLOCK, DEEP_HALF, PROCON_S),
)
BUDGETS: dict[str, Budget] = {
    "table": Budget((TABLE, LAYERS), Size()),
    "smoke": Budget(
        (
            Part(
                "smoke",
                "Does the constraint keep refusals?",
                "The direction of the effect, in minutes.",
                (START, PLAIN, PROCON_S),
                seeds=(0,),
                split="validation",
            ),
        ),
        Size(train=192, test=24, prompts=24, extraction=48, pairs=24),
    ),
}
