"""The constraint on a block input that is a DTensor, as tensor parallelism makes them: each rank its own tokens."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from procon.errors import ProConError
from procon.ops import constrain


def constrain_sharded(
    hidden: DTensor, block: int, direction: Tensor, anchor: Tensor, weight: Tensor, penalty: Any, backend: Any
) -> tuple[DTensor, Tensor]:
    """The op on ``hidden [..., D]``, with ``anchor [N, K]`` and ``weight [N]`` of all tokens, the same on every rank.

    Returns ``hidden``, placed as before, and the penalty of all tokens ``[1]`` on every rank, of which each rank
    backpropagates the part that belongs to its own.

    Raises:
        ProConError: unless every rank holds whole rows of the input of ``block``: replicated, or some tokens.
    """
    mesh, placements = hidden.device_mesh, hidden.placements
    for placement in placements:
        whole_rows = type(placement) is Shard and placement.dim % hidden.dim() < hidden.dim() - 1
        if not whole_rows and type(placement) is not Replicate:
            raise ProConError(
                f"block {block} got hidden states with placement {placement}, of which no rank has whole rows to "
                "project: replicate them or shard them on tokens in the parallel plan"
            )

    def share(tensor: Tensor) -> Tensor:
        """This rank's part of a tensor that all ranks have whole."""
        whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return whole.redistribute(placements=placements).to_local()

    tokens = hidden.shape[:-1]
    given = share(anchor.view(*tokens, -1)), share(weight.view(tokens))
    local, term = constrain(hidden.to_local(), direction, *given, penalty=penalty, backend=backend)
    hidden = DTensor.from_local(local, mesh, placements, run_check=False, shape=hidden.shape, stride=hidden.stride())
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return hidden, DTensor.from_local(term, mesh, parts, run_check=False).full_tensor().unsqueeze(0)
