"""Controls: directions that differ from the given ones in one respect, at the same blocks and with the same gaps."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from procon.directions.contrast_means import DEAD_GAP
from procon.directions.subspace import orthonormalised
from procon.errors import ProConError

if TYPE_CHECKING:
    from procon.directions.refusal_directions import RefusalDirections


def randomized(directions: RefusalDirections, seed: int) -> RefusalDirections:
    """See :meth:`RefusalDirections.randomized`."""
    generator = torch.Generator().manual_seed(seed)
    blocks, width = directions.block_count, directions.first.shape[1]
    # The last block's output is drawn after the block inputs, so that theirs are the same with it and without it.
    sites = [blocks, 1] if directions.last_output else [blocks]
    draws = [
        torch.cat([torch.randn(rows, count, width, generator=generator) for count in (1, directions.k - 1)], 1)
        for rows in sites
    ]
    return _along(directions, torch.cat(draws), {"random_seed": seed})


def randomized_within(directions: RefusalDirections, hidden_states: Tensor, seed: int) -> RefusalDirections:
    """See :meth:`RefusalDirections.randomized_within`."""
    if hidden_states.dim() == 3 and hidden_states.shape[1] == directions.block_count:
        directions = directions.at_block_inputs
    rows, width = directions.first.shape
    if hidden_states.dim() != 3 or hidden_states.shape[1:] != (rows, width) or len(hidden_states) <= directions.k:
        raise ProConError(
            f"hidden_states have shape {tuple(hidden_states.shape)}: give [n, {directions.block_count}, {width}] with "
            f"n above {directions.k}"
        )
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(directions.k, len(hidden_states), generator=generator, dtype=torch.float64)
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
    return _along(directions, drawn, {"random_within_seed": seed})


def shuffled(directions: RefusalDirections, seed: int) -> RefusalDirections:
    """See :meth:`RefusalDirections.shuffled`."""
    usable = directions.at_block_inputs.usable.nonzero().flatten()
    if len(usable) < 2:
        raise ProConError("only one block has a direction, so blocks cannot be shuffled: use randomized(seed)")
    generator = torch.Generator().manual_seed(seed)
    order = usable
    while (order == usable).any():  # until none keeps its own: e = 2.7 draws on average
        order = usable[torch.randperm(len(usable), generator=generator)]
    source = torch.arange(len(directions.gap)).index_copy(0, usable, order)
    if directions.last_output and directions.usable[-1]:
        source[-1] = usable[torch.randint(len(usable), (), generator=generator)]
    return replace(
        directions,
        first=directions.first[source],
        further=None if directions.further is None else directions.further[source],
        provenance={"shuffled_seed": seed, "source_blocks": source.tolist()},
    )


def _along(directions: RefusalDirections, vectors: Tensor, provenance: dict[str, Any]) -> RefusalDirections:
    """Directions along ``vectors [L, K, D]``, orthonormalised, for those of the usable blocks."""
    usable = directions.usable
    first = normalize(vectors[:, 0], dim=-1).float()
    further = None
    if directions.further is not None:
        further = orthonormalised(vectors)[:, 1:].float() * usable[:, None, None]
    return replace(directions, first=first * usable[:, None], further=further, provenance=provenance)
