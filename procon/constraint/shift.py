"""How far tokens are from their anchors, from the penalties of the blocks: no pass over hidden states, no wait."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from procon.constraint.target import Target, at_columns, on_device, sums
from procon.constraint.token_count import divisor
from procon.errors import ProConError


def mean_shift(
    target: Target, terms: Mapping[int, Tensor], scales: dict[torch.device, Tensor], tokens: Tensor | float | None
) -> Tensor:
    """As :meth:`procon.constraint.ProjectionConstraint.shift`.

    Args:
        terms: by column, the penalties of the blocks whose inputs can move.
        scales: ``[blocks]``, one over the gaps, by device.
    """
    device = next(iter(terms.values())).device
    by_block = sums([term.detach() for term in terms.values()], device)
    if target.units == "raw":
        per_gap = at_columns(on_device(scales, device), terms)
        by_block = by_block * (per_gap.square() if target.penalty == "squared" else per_gap)
    return by_block.sum() / (divisor(tokens, target.mask, device) * len(terms))


def block_scales(units: Tensor) -> tuple[dict[torch.device, Tensor], bool]:
    """One over the units ``[blocks]`` that directions share, by device; and whether there is one at every block."""
    return {units.device: 1.0 / units}, not units.isnan().any()


def check_one_unit(shared: bool) -> None:
    """Raise ProConError unless directions share a unit at every block: other raw penalties show no shift."""
    if not shared:
        raise ProConError(
            "shifts are counted in units of the gap, and directions at one block have several units or none: set "
            "units to 'gap', with prompts beside given vectors"
        )
