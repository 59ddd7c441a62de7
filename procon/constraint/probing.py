"""The constraint on a batch of its own: a few fixed prompts, in a forward beside that of the training batch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from procon.constraint.constraint import ProjectionConstraint
from procon.errors import ProConError
from procon.models import decoder_forward, find_decoder, observe_last_state
from procon.settings import AnchorSettings, ProbeHold, check_setting


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

    Raises:
        ProConError: if the constraint is attached to no model, or nothing below a constrained block trains.
    """
    check_setting("probe_hold", hold, "hold")
    model = constraint.model
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    if hold == "projections":
        constraint.set_target(batch["anchors"], batch["constraint_mask"], penalty="squared", units="gap")
        decoder_forward(model)(**inputs)
        penalty = constraint.penalty()
        constraint.release()
        return penalty
    constraint.rest()
    found: list[Tensor] = []
    with observe_last_state(find_decoder(model), found.append):
        decoder_forward(model)(**inputs)
    constraint.release()
    last = found[0][batch["constraint_mask"] > 0]
    if torch.is_grad_enabled() and not last.requires_grad:
        raise ProConError("nothing in the model trains, so the penalty on the probes' states does nothing")
    return (last.float() - batch["states"]).square().mean()
