"""Strength that sets itself: alpha follows the measured shift, so that the shift keeps to a budget.

Dual ascent on the constraint "mean shift at most the budget", in the logarithm of alpha. Ascent alone integrates the
error, and a model that answers with a delay then swings about the budget; a term of the error's own change damps it
(the proportional term of Stooke, Achiam, Abbeel, "Responsive Safety in Reinforcement Learning by PID Lagrangian
Methods", 2020). This is ours, not the paper's.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.schedule import AlphaSchedule

logger = logging.getLogger(__name__)

#: Of a step's measure in the moving average: one over some five steps, as batches differ by a few tens of per cent.
_SMOOTHING = 0.2

#: How fast alpha follows an error that stays: at most 10% a step, so a factor of 10 takes 24 steps. Slower, short
#: trainings end before it is there; faster, the model has no time to answer.
_RATE = 0.1

#: Weight of the error's change: it looks 1.0 / 0.1 = 10 steps ahead. More of it answers to noise, less swings.
_DAMPING = 1.0

#: An error counts for at most this, one budget above or below, whatever one batch measures.
_GREATEST_ERROR = 1.0

#: How far alpha may go from where it begins, either way. Wide, as an alpha belongs to a penalty, to its units and to
#: the size of the gap; but not without end, as a budget that cannot be held would leave nothing of the task.
_RANGE = 1000.0

#: A budget counts as held up to this many times itself: batches differ.
_HELD = 1.1


class Hold:
    """Alpha of the next optimiser step, from the shift measured at those before::

        hold = Hold(AlphaSchedule.parse("hold:0.2"))
        for batches in steps:
            for batch in batches:
                ...  # the forward
                loss = loss + hold.alpha * constraint.penalty(tokens)
                hold.measure(constraint.shift(tokens))
            hold.step(hold.measured)

    With ``e = clip(average / budget - 1, -1, 1)``, a step is ``alpha *= exp(0.1 e + (e - e_before))``, kept within
    a thousandth and a thousand times of where alpha began. It never is 0. The average begins at 0: the model begins at
    its anchors.

    All of it are scalars on the device, float32: nothing waits for the device until alpha is read. On several ranks,
    give :meth:`step` the sum over them, and all have the same alpha.

    Args:
        schedule: of :meth:`AlphaSchedule.holding`.
        device: where the shift is measured.

    Attributes:
        alpha: scalar, the strength of the step to come.
        average: scalar, the moving average of the shift, in units of the gap.
        measured: scalar, this rank's share of the shift of the step under way.
        due: whether ``measured`` has a share in it.

    Raises:
        ProConError: if the schedule is one of phases.
    """

    def __init__(self, schedule: AlphaSchedule, device: torch.device | str | None = None) -> None:
        if schedule.hold is None:
            raise ProConError(f"schedule {str(schedule)!r} is one of phases, which sets nothing: give 'hold'")
        self.budget = schedule.hold
        self._start = schedule.phases[0].alpha
        self._device = device
        self.restore(None)

    def restore(self, state: Mapping[str, float] | None) -> None:
        """Go on from a checkpoint's :meth:`state`; from the beginning, if there is none."""
        state = state or {"alpha": self._start, "average": 0.0}
        self.alpha = torch.tensor(state["alpha"], dtype=torch.float32, device=self._device)
        self.average = torch.tensor(state["average"], dtype=torch.float32, device=self._device)
        self.measured = torch.zeros_like(self.alpha)
        self.due = False

    def state(self) -> dict[str, float]:
        """What :meth:`restore` takes, exactly; waits for the device."""
        return {"alpha": self.alpha.item(), "average": self.average.item()}

    @property
    def grown(self) -> Tensor:
        """Scalar: alpha as a multiple of where it began."""
        return self.alpha / self._start

    def measure(self, share: Tensor) -> None:
        """Add a micro-batch's share of the step's mean shift (:meth:`ProjectionConstraint.shift`)."""
        self.measured += share.detach().to(self.measured.device)
        self.due = True

    def step(self, measured: Tensor) -> None:
        """End an optimiser step of this mean shift, of all ranks. What is not finite is left out."""
        before = self._error()
        average = torch.lerp(self.average, measured.to(self.average), _SMOOTHING)
        self.average = torch.where(average.isfinite(), average, self.average)
        error = self._error()
        alpha = self.alpha * torch.exp(_RATE * error + _DAMPING * (error - before))
        self.alpha = alpha.clamp(self._start / _RANGE, self._start * _RANGE)
        self.measured = torch.zeros_like(self.measured)
        self.due = False

    def did(self) -> dict[str, Any]:
        """The measured facts, for a run's record: budget, moving average, alpha, and whether the budget is held."""
        state = self.state()
        return {
            "budget": self.budget,
            "shift": state["average"],
            "alpha": state["alpha"],
            "held": state["average"] <= _HELD * self.budget,
        }

    def warn(self) -> None:
        """Warn, at the end of a training, if the budget was not held."""
        did = self.did()
        if did["held"]:
            return
        at_bound = math.isclose(did["alpha"], self._start * _RANGE, rel_tol=1e-5)
        logger.warning(
            "the budget of schedule 'hold' was not held: the mean shift is %.3g of the gap at the end, the budget "
            "%.3g, with alpha at %.3g, %s: give a larger budget, a smaller learning rate, or more steps",
            did["shift"],
            self.budget,
            did["alpha"],
            "its upper bound" if at_bound else "not yet at its bound",
        )

    def _error(self) -> Tensor:
        return (self.average / self.budget - 1).clamp(-_GREATEST_ERROR, _GREATEST_ERROR)
