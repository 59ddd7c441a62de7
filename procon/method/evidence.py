"""Did the constraint act? Measured while training, counted over the whole run, and written beside the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from procon.constraint import ProjectionConstraint
from procon.constraint.proof import nodes_before
from procon.errors import ProConError
from procon.schedule import AlphaSchedule

logger = logging.getLogger(__name__)

#: Relative difference of the penalty's gradient to the one expected that is more than rounding.
_TOLERANCE = 1e-2

#: So many times as far from its anchor as rounding takes it (the op's dead zone), a block's median token is moved by
#: something else. Other shapes, kernels and attention make 0.4 at most, and noise of a tenth 2.2 in bfloat16, where it
#: is hardly more than rounding, and ten thousand in float32.
_NOISE = 2.0

_REMEDY = "return what super().compute_loss gives, with your own terms added to it"


class Evidence:
    """What the constraint of a run has done so far.

    Every penalty that a training forward gives is watched until its gradient has gone through backward. The first one
    is measured as well: the gradient's size, and whether it reaches a parameter that the optimiser trains.

    Attributes:
        constrained_steps: optimiser steps under an alpha above 0 in which the penalty's gradient arrived.
        blocks: indices of the blocks whose input the penalty could move.
        penalty: sum over those steps of the penalty, before alpha, over the logging windows that have ended.
        window: the same of the one that has not, as far as it is known.
        is_measured: whether the first penalty's gradient is.
        departure: how far tokens were from their anchors at the start, of
            :meth:`procon.constraint.ProjectionConstraint.largest_departure`; NaN if that was not seen.
    """

    def __init__(self) -> None:
        self.constrained_steps = 0
        self.blocks: set[int] = set()
        self.penalty = 0.0
        self.window = 0.0
        self.is_measured = False
        self.departure = math.nan
        self._micro_batches = 1
        self._watched = 0
        self._arrived = 0
        self._gradient = math.nan
        self._expected = math.nan
        self._below: set[int] = set()  # the parameters that the gradient of the first penalty gets to, by identity

    def restore(self, did: Mapping[str, Any] | None) -> None:
        """Go on counting from what a checkpoint's record says was done; from nothing, if there is none."""
        did = did or {}
        self.constrained_steps = int(did.get("constrained_steps", 0))
        self.blocks = set(did.get("blocks_acted", ()))
        self.penalty = float(did.get("penalty_sum", 0.0))
        self.window = 0.0
        self._watched = self._arrived = 0

    def did(self, steps: int) -> dict[str, Any]:
        """The measured facts of a run of ``steps`` optimiser steps, for its record."""
        constrained, total = self.constrained_steps, self.penalty + self.window
        return {
            "steps": steps,
            "constrained_steps": constrained,
            "blocks_acted": sorted(self.blocks),
            "mean_penalty": total / constrained if constrained and math.isfinite(total) else None,
            "penalty_sum": self.penalty if math.isfinite(self.penalty) else None,
        }

    def begin_step(self) -> None:
        """An optimiser step begins, with its first micro-batch; :meth:`next_micro_batch` begins each further one."""
        self._micro_batches = 1

    def expect(self, micro_batches: int) -> None:
        """The optimiser step that ends had so many micro-batches."""
        self._micro_batches = micro_batches

    def next_micro_batch(self) -> None:
        self._micro_batches += 1

    def watch(self, penalty: Tensor, expected: float | None) -> None:
        """Look out for the gradient of a penalty that is now to go into a loss.

        Args:
            expected: what its gradient should be, None if that is not known.
        """
        if not penalty.requires_grad:  # a forward for metrics
            return
        self._watched += 1
        if not self.is_measured:
            nodes = nodes_before([penalty.grad_fn])
            self._below = {id(node.variable) for node in nodes if hasattr(node, "variable")}
            self._expected = math.nan if expected is None else expected
        penalty.register_hook(self._arrive)

    def check_backward(self) -> None:
        """Raise ProConError unless every penalty watched has had its gradient by now, after backward."""
        if self._watched > self._arrived:
            raise ProConError(
                "the penalty was computed, but the loss that went through backward does not have it, so the constraint "
                f"would be lost: {_REMEDY}"
            )

    def end_step(
        self,
        constraint: ProjectionConstraint | None,
        optimizer: torch.optim.Optimizer | None,
        model: nn.Module,
        *,
        each: bool = True,
    ) -> None:
        """Count an optimiser step under an alpha above 0, before the optimiser takes it.

        Args:
            each: whether each of its micro-batches has a penalty; probes are run once in a step.

        Raises:
            ProConError: if the constraint does not reach what the optimiser trains.
        """
        self.check_backward()
        arrived, self._watched, self._arrived = self._arrived, 0, 0
        if not arrived:
            raise ProConError(
                "alpha is above 0, but this optimiser step has no gradient of the penalty, so the constraint would be "
                f"lost: leave training_step to the trainer, and {_REMEDY}; in a loop of your own, add loss() before "
                "backward, and call end once per step, also if several optimisers take it"
            )
        if each and arrived < self._micro_batches:
            raise ProConError(
                f"{self._micro_batches - arrived} of {self._micro_batches} micro-batches of this optimiser step have "
                "no gradient of the penalty, so the constraint would be lost in them: keep the model in training mode, "
                f"leave training_step to the trainer, and {_REMEDY}"
            )
        if not self.is_measured:
            self._check_first(optimizer, model)
            self.is_measured = True
            if constraint is not None:
                self.check_start(constraint)
                self.blocks.update(constraint.acting)
            if constraint is not None and 2 * len(self.blocks) < len(constraint.blocks):
                logger.warning(
                    "the constraint can act on %d of its %d blocks: nothing below the others trains",
                    len(self.blocks),
                    len(constraint.blocks),
                )
        self.constrained_steps += 1

    def check_acted(self, step: int, schedule: AlphaSchedule) -> None:
        """Raise ProConError if a training that ended at optimiser step ``step`` had none under the constraint."""
        if not self.constrained_steps:
            raise ProConError(
                f"training ended at step {step}, and none was under the constraint (schedule {str(schedule)!r}): put "
                "it on from the first step"
            )

    def check_start(self, constraint: ProjectionConstraint) -> None:
        """Warn if tokens were not at their anchors in the forwards noted, in which the model was at its start."""
        self.departure = constraint.largest_departure()
        if self.departure > _NOISE:
            logger.warning(
                "before the first step, tokens are %.3g times as far from their anchors as rounding takes them: the "
                "anchors are not those of this forward, so the constraint acts on more than training moves. Look for "
                "noise (dropout, router jitter), another precision or attention, or another model than recorded them",
                self.departure,
            )

    def check_gradient(self) -> None:
        """Raise ProConError if the first penalty's gradient, once it went through backward, was none."""
        if not math.isfinite(self._gradient) or self._gradient == 0:
            raise ProConError(
                f"the penalty's gradient is {self._gradient:g} in the loss that went through backward, so nothing is "
                f"constrained: {_REMEDY}"
            )

    def _arrive(self, gradient: Tensor) -> None:
        self._arrived += 1
        if not self.is_measured:
            self._gradient = float(gradient)

    def _check_first(self, optimizer: torch.optim.Optimizer | None, model: nn.Module) -> None:
        self.check_gradient()
        if abs(self._gradient / self._expected - 1) > _TOLERANCE:  # never of NaN
            logger.warning(
                "the penalty acts %.3g times as strongly as alpha says: what is made of the loss after "
                "super().compute_loss changes it",
                self._gradient / self._expected,
            )
        trained = {id(parameter) for group in getattr(optimizer, "param_groups", ()) for parameter in group["params"]}
        own = {id(parameter) for parameter in model.parameters()}
        # Sharded, parameters are computed with in other tensors than those that are trained.
        reached = self._below & own
        if reached and trained & own and not reached & trained:
            raise ProConError(
                f"the penalty reaches {len(reached)} parameters, and the optimiser trains none of them, so the "
                "constraint cannot act: give the optimiser the parameters that it reaches"
            )
