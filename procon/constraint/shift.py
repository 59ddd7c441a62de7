"""How far tokens are from their anchors, from the penalties of the blocks: no pass over hidden states, no wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from procon.constraint.target import Target
from procon.constraint.token_count import divisor
from procon.errors import ProConError


def mean_shift(target: Target, terms: Mapping[int, Tensor], per_gap: Tensor, tokens: Tensor | float | None) -> Tensor:
    """As :meth:`procon.constraint.ProjectionConstraint.shift`.

    Args:
        terms: by column, the penalties of the blocks whose inputs can move.
        per_gap: ``[blocks, K]``, one over the gaps, on the device of the first of them.

    Raises:
        ProConError: if the penalties do not tell it.
    """
    if target.penalty == "huber":
        raise ProConError("penalty 'huber' does not tell how far tokens moved: give 'absolute' or 'squared'")
    device = per_gap.device
    zero = torch.zeros((), device=device)
    moving = {column: term.detach().to(device) for column, term in terms.items()}
    by_block = torch.stack([moving.get(column, zero) for column in range(len(per_gap))])
    if target.units == "raw":
        scale = per_gap[:, 0]  # that of all directions of a block: see check_one_gap
        by_block = by_block * (scale.square() if target.penalty == "squared" else scale)
    return by_block.sum() / (divisor(tokens, target.mask, device) * len(moving))


def check_one_gap(gaps: Tensor) -> None:
    """Raise ProConError unless the directions of each block, of ``gaps [blocks, K]``, share one: penalties are sums."""
    if (gaps != gaps[:, :1]).any():
        raise ProConError(
            "directions of several concepts have gaps of their own, so raw penalties do not tell how far tokens moved: "
            "give units 'gap'"
        )
