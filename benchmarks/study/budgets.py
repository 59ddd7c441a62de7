"""The budgets: ``smoke`` for continuous integration, ``table`` for two CPU cores, ``full`` for GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks.study.methods import Method
from benchmarks.study.plan import Budget, Part, Size


def _procon(name: str, label: str, schedule: str, *, method: dict[str, Any] | None = None, **config: Any) -> Method:
    """ProCon as chosen on validation prompts, with ``config`` in place of that choice."""
    chosen = {"procon_penalty": "absolute", "procon_scope": "all", "procon_schedule": schedule}
    return Method(name, label, "procon_s", config={**chosen, **config}, **(method or {}))


START = Method("start", "start", length=0)
PLAIN = Method("plain", "IFT")
SAFE = Method("safe", "IFT_safe", "safe", safety=True)
PROCON_S = _procon("procon_s", "ProCon_s", "procon_s:0.3")
PROCON_WU = _procon("procon_wu", "ProCon_wu", "procon_wu:2@20steps")
PROCON_S_SAFE = replace(PROCON_S, name="procon_s_safe", label="ProCon_s_safe", safety=True)
PROCON_WU_SAFE = replace(PROCON_WU, name="procon_wu_safe", label="ProCon_wu_safe", safety=True)
LAST_BLOCK = _procon("last_block", "last block", "procon_s:0.3", procon_blocks="29")

_TABLE = Part(
    "table",
    "Refusal and task after fine-tuning",
    "What does each defence keep, and at what price? (The paper's Tables I to IV.)",
    (START, PLAIN, SAFE, PROCON_S, PROCON_WU, PROCON_S_SAFE, PROCON_WU_SAFE),
    ("arithmetic", "poisoned"),
)
_LAYERS = Part(
    "layers",
    "Which blocks are constrained",
    "Does the last block suffice? (The paper's Table V.)",
    (PLAIN, LAST_BLOCK, PROCON_S),
)

BUDGETS: dict[str, Budget] = {
    "table": Budget((_TABLE, _LAYERS), Size()),
}
