"""A floor under the mean cosine: how far refusal may drift before training warns or stops."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import get_args

from procon.errors import ProConError
from procon.evaluation import Drift
from procon.settings import GateAction, check_choice

_REMEDY = (
    "the model may be losing its refusals: constrain more (a larger alpha or a longer warm-up), mix in safety samples, "
    "or lower the learning rate"
)


@dataclass(frozen=True)
class DriftGate:
    """The lowest mean cosine allowed, and what to do below it.

    Attributes:
        floor: mean signed cosine of re-extracted directions to the first (paper section III-B), within -1 and 1.
        action: ``"warn"``, or ``"stop"``.
    """

    floor: float
    action: GateAction

    @classmethod
    def parse(cls, floor: float | None, action: GateAction, prefix: str = "") -> DriftGate | None:
        """The gate; None without a floor.

        Args:
            prefix: what the user's names of the two settings begin with.

        Raises:
            ProConError: for a floor that is no cosine, an unknown action, or ``"stop"`` without a floor.
        """
        check_choice(f"{prefix}gate_action", action, get_args(GateAction))
        if floor is None:
            if action == "stop":
                raise ProConError(
                    f"{prefix}gate_action is 'stop', but there is no gate: give {prefix}gate, such as 0.9"
                )
            return None
        if not isinstance(floor, Real) or isinstance(floor, bool) or not -1 < floor < 1:
            raise ProConError(f"{prefix}gate is {floor!r:.40}: give a mean cosine between -1 and 1, such as 0.9")
        return cls(floor, action)

    def passes(self, drift: Drift) -> bool:
        """Whether the mean cosine is at the floor or above."""
        return drift.mean_cosine >= self.floor

    def message(self, drift: Drift, step: int) -> str:
        """One line: where training is, how far the directions have turned, what that means, and what to do."""
        block, lowest = drift.lowest
        stops = "; training stops here, with a checkpoint saved" if self.action == "stop" else ""
        return (
            f"step {step}: the mean cosine of refusal directions to those at the start is {drift.mean_cosine:.3f}, "
            f"below the gate of {self.floor:g} (lowest: {lowest:.3f} at block {block}); {_REMEDY}{stops}"
        )
