"""The constraint on a block input that is a DTensor, as tensor parallelism makes them: each rank its own tokens."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from procon.errors import ProConError
from procon.ops import constrain
from procon.settings import Backend, Penalty, Sides


def check_placements(hidden: DTensor, block: int) -> None:
    """Raise ProConError unless every rank holds whole rows of the input of ``block``: replicated, or some tokens."""
    for placement in hidden.placements:
        whole_rows = type(placement) is Shard and placement.dim % hidden.dim() < hidden.dim() - 1
        if not whole_rows and type(placement) is not Replicate:
            raise ProConError(
                f"block {block} got hidden states with placement {placement}, of which no rank has whole rows to "
                "project: replicate them or shard them on tokens in the parallel plan"
            )


def constrain_sharded(
    hidden: DTensor,
    direction: Tensor,
    anchor: Tensor,
    weight: Tensor,
    *,
    penalty: Penalty,
    backend: Backend,
    sides: Sides = "both",
) -> tuple[DTensor, Tensor]:
    """:func:`procon.ops.constrain`, with ``anchor`` and ``weight`` of all tokens, the same on every rank.

    Returns ``hidden``, placed as before, and the penalty of all tokens on every rank, of which each rank backpropagates
    the part that belongs to its own.
    """
    mesh, placements = hidden.device_mesh, hidden.placements
    anchor, weight = (_share(tensor, mesh, placements) for tensor in (anchor, weight))
    local, term = constrain(hidden.to_local(), direction, anchor, weight, penalty=penalty, sides=sides, backend=backend)
    hidden = DTensor.from_local(local, mesh, placements, run_check=False, shape=hidden.shape, stride=hidden.stride())
    parts = [Partial() if placement.is_shard() else Replicate() for placement in placements]
    return hidden, DTensor.from_local(term, mesh, parts, run_check=False).full_tensor()


def _share(tensor: Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> Tensor:
    """This rank's part of a tensor that all ranks have whole."""
    whole = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return whole.redistribute(placements=placements).to_local()
