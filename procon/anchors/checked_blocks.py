"""What every source of anchors makes sure of: the directions are those of the model, at the blocks they are for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from procon.directions import Directions
from procon.models import find_decoder


def checked_blocks(model: nn.Module, directions: Directions, blocks: Sequence[int] | None) -> tuple[int, ...]:
    """``blocks`` as they are, or all block inputs that have a direction. If weights are sharded, all ranks must call.

    Raises:
        ProConError: if the directions do not fit the model, or are of another one.
    """
    directions.check_fits(find_decoder(model))
    directions.check_origin(model)
    if blocks is None:
        blocks = directions.at_block_inputs.usable.nonzero().flatten().tolist()
    return tuple(blocks)
