"""How much each constrained block counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.settings import CHOICES, Units

#: One number for each block; or, by the units of the departures, one for each.
Weights = Tensor | Sequence[float] | Mapping[Units, Tensor] | Mapping[Units, Sequence[float]]


def checked_weights(weights: Weights, blocks: int) -> dict[Units, Tensor]:
    """``weights`` for departures in either unit, each ``[blocks]`` fp32 on the CPU.

    Raises:
        ProConError: unless there is one finite number above 0 for each block.
    """
    if not isinstance(weights, Mapping):
        found = _vector(weights, blocks)
        return {"raw": found, "gap": found}
    if set(weights) != set(CHOICES["units"]):
        raise ProConError(f"weights are given for {', '.join(map(str, weights))}: give them for raw and for gap")
    return {units: _vector(each, blocks) for units, each in weights.items()}


def _vector(weights: Tensor | Sequence[float], blocks: int) -> Tensor:
    try:
        found = torch.as_tensor(weights, dtype=torch.float32).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ProConError(f"weights are {weights!r}: give one number for each constrained block") from None
    if found.shape != (blocks,):
        raise ProConError(f"weights have shape {list(found.shape)}: give [{blocks}], one for each constrained block")
    if not (torch.isfinite(found).all() and (found > 0).all()):
        raise ProConError(
            f"weights are {found.tolist()}: give finite numbers above 0, and leave blocks that are not to count out of "
            "blocks"
        )
    return found
