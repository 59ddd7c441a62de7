"""Controls of the study: directions that differ from the refusal directions in one respect, with the same gaps."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from procon.directions import Directions
from procon.directions.controls import along
from procon.directions.extraction import DEAD_GAP
from procon.errors import ProConError


def randomized_within(directions: Directions, hidden_states: Tensor, seed: int) -> Directions:
    """The control for a direction *in which hidden states vary*: random ones drawn with their covariance.

    Each is ``sum_i g_i (x_i - mean)`` for standard normal ``g``, scaled to unit length: a random contrast of the given
    states, just as the refusal direction is a contrast of prompt states. The same ``g`` is used at every block.
    Whatever the refusal directions preserve beyond this control is specific to them.

    Take states of benign text, best of what is trained on: those of malicious and benign prompts vary along the refusal
    direction itself, and the draws lean to it (see :meth:`Directions.cosine`). If few dimensions hold most of the
    variance, as the massive ones do at a sequence's first token, draws lean to those, and to each other.

    Args:
        hidden_states: ``[n, L, D]`` of any floating dtype, inputs of each block at n tokens, n above K.

    Raises:
        ProConError: if they do not fit, are not finite, or do not vary at a block that has a direction.
    """
    rows, k, width = directions.basis.shape
    if hidden_states.dim() != 3 or hidden_states.shape[1:] != (rows, width) or len(hidden_states) <= k:
        raise ProConError(
            f"hidden_states have shape {tuple(hidden_states.shape)}: give [n, {rows}, {width}] with n above {k}"
        )
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(k, len(hidden_states), generator=generator, dtype=torch.float64)
    weights -= weights.mean(1, keepdim=True)
    # Block by block, as an fp64 copy of all states would be large.
    drawn = torch.stack([weights @ states.double().cpu() for states in hidden_states.unbind(1)])
    scale = torch.stack([states.double().norm().cpu() for states in hidden_states.unbind(1)])
    size = drawn.norm(dim=-1).amin(1)
    bad = ~torch.isfinite(size) | (directions.usable & (size <= DEAD_GAP * scale))
    if bad.any():
        raise ProConError(
            f"hidden_states of block {int(bad.nonzero()[0])} do not vary, or are not finite: give finite states "
            "of different tokens"
        )
    return along(directions, drawn, {"random_within_seed": seed})


def shuffled(directions: Directions, seed: int) -> Directions:
    """The control for the *right block*: each usable block has the directions of another, with its own gap.

    They are true refusal directions, but of other blocks. If this control preserves refusals too, the protection does
    not depend on the block. Neighbouring blocks have similar directions, so look at :meth:`Directions.cosine` first:
    this control is the weaker the closer it is to 1.

    Raises:
        ProConError: if fewer than two blocks have a direction.
    """
    usable = directions.usable.nonzero().flatten()
    if len(usable) < 2:
        raise ProConError("only one block has a direction, so blocks cannot be shuffled: use randomized()")
    generator = torch.Generator().manual_seed(seed)
    order = usable
    while (order == usable).any():  # until none keeps its own: e = 2.7 draws on average
        order = usable[torch.randperm(len(usable), generator=generator)]
    source = torch.arange(len(directions.gaps)).index_copy(0, usable, order)
    # Of several directions per block, one may be missing at either block.
    there = (directions.gaps != 0) & (directions.gaps[source] != 0)
    return replace(
        directions,
        basis=torch.where(there[..., None], directions.basis[source], 0.0),
        gaps=torch.where(there, directions.gaps, 0.0),
        provenance={"shuffled_seed": seed, "source_blocks": source.tolist()},
    )
