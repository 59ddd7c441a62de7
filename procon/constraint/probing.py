"""The constraint on a batch of its own: a few fixed prompts, in a forward beside that of the training batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from procon.constraint.constraint import ProjectionConstraint
from procon.errors import ProConError
from procon.models import decoder_forward, find_decoder, observe_last_state
from procon.settings import AnchorSettings, ProbeHold, check_setting


@dataclass(frozen=True)
class ProbeDeparture:
    """How far the probes' last tokens are from the start: scalars with a gradient; None for what is not kept.

    Attributes:
        projections: mean squared departure along the directions, in units of each block's gap.
        state: mean squared departure of all of the last hidden state, after the final norm.
    """

    projections: Tensor | None
    state: Tensor | None

    @property
    def penalty(self) -> Tensor:
        """The sum of what is kept."""
        return torch.stack([part for part in (self.projections, self.state) if part is not None]).sum()


def probe_departure(
    constraint: ProjectionConstraint, batch: Mapping[str, Tensor], *, hold: ProbeHold = AnchorSettings.probe_hold
) -> ProbeDeparture:
    """What :func:`probe_penalty` is the sum of; its arguments and errors are the same."""
    check_setting("probe_hold", hold)
    model = constraint.model
    if hold == "state":
        constraint.rest()
    else:
        constraint.set_target(batch["anchors"], batch["constraint_mask"], penalty="squared", units="gap")
    found: list[Tensor] = []
    with observe_last_state(find_decoder(model), found.append):
        decoder_forward(model)(**{name: batch[name] for name in ("input_ids", "attention_mask")})
    projections = None if hold == "state" else constraint.penalty()
    constraint.release()
    if hold == "projections":
        return ProbeDeparture(projections, None)
    last = found[0][batch["constraint_mask"] > 0]
    if torch.is_grad_enabled() and not last.requires_grad:
        raise ProConError("nothing in the model trains, so the penalty on the probes' states does nothing")
    state = (last.float() - batch["states"]).square().mean()
    constraint.use.count(state)
    return ProbeDeparture(projections, state)


def probe_penalty(
    constraint: ProjectionConstraint, batch: Mapping[str, Tensor], *, hold: ProbeHold = AnchorSettings.probe_hold
) -> Tensor:
    """How far the probes' last tokens are from the start, with a gradient: a mean over probes and constrained blocks.

    Runs the model that the constraint is attached to, without the LM head. A target that is set is released first, so
    ask for the penalty of the training batch before.

    Args:
        batch: of :meth:`procon.anchors.Probes.batch`.
        hold: ``"projections"``: squared departures along the directions, in units of each block's gap. ``"state"``:
            mean squared departure of all of the last hidden state, after the final norm (SBR, arXiv 2605.05995).
            ``"both"``: the sum of the two.

    Raises:
        ProConError: if the constraint is attached to no model, or nothing below a constrained block trains.
    """
    return probe_departure(constraint, batch, hold=hold).penalty
