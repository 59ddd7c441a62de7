"""How far tokens are from their anchors, from the penalties of the blocks: no pass over hidden states, no wait.

But for :func:`typical_departure`, which is asked for at the first step alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from procon.constraint.target import Target, at_columns, on_device, sums
from procon.constraint.token_count import divisor
from procon.errors import ProConError
from procon.ops import project
from procon.ops.arguments import rounding
from procon.settings import Backend


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


@torch.no_grad()
def typical_departure(hidden: Tensor, vectors: Tensor, anchors: Tensor, mask: Tensor, backend: Backend) -> Tensor:
    """Median over a block's constrained tokens of how far they are from their anchors: 1 is as far as rounding takes.

    A scalar, NaN without tokens; waits for the device. Of several directions, the farthest counts. A median, as tokens
    a hundred times as long as others, such as a sequence's first, hand down the rounding of that length.

    Args:
        hidden: ``[..., D]``.
        vectors, anchors, mask: ``[K, D]``, ``[N, K]`` and ``[N]``; of one direction also ``[D]`` and ``[N]``.
    """
    constrained = mask > 0
    states = hidden.flatten(0, -2)[constrained]
    vectors = vectors.view(-1, vectors.shape[-1])
    departures = project(states, vectors, backend=backend) - anchors.view(len(mask), -1)[constrained]
    states = states.float()  # anchors are fp32, whatever the states are
    share = max(rounding(hidden, "absolute"), rounding(states, "absolute"), _TF32 if _uses_tf32() else 0)
    reach = share * torch.outer(*(torch.linalg.vector_norm(each, dim=1) for each in (states, vectors)))
    return (departures.abs() / reach).amax(1).median()


#: Four units in the last place of TF32, in which GPUs may multiply float32.
_TF32 = 2.0**-8


def _uses_tf32() -> bool:
    # The older question is an error once the newer setting was made.
    return getattr(torch.backends.cuda.matmul, "fp32_precision", None) == "tf32" or (
        torch.get_float32_matmul_precision() != "highest"
    )
