"""Which blocks are constrained, or trained, or read: all, the deepest share of them, or some by index."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from procon.directions import RefusalDirections
from procon.errors import ProConError
from procon.settings import Blocks, check_blocks


def select_blocks(directions: RefusalDirections, blocks: Blocks) -> tuple[int, ...]:
    """Indices of the blocks to constrain, of those that have a direction.

    Raises:
        ProConError: if the selection is empty, out of range, or names a block without a direction.
    """
    return select_among(directions.usable, blocks)


def select_among(usable: Tensor, blocks: Blocks) -> tuple[int, ...]:
    """As :func:`select_blocks`, of the blocks that ``usable``, ``[L]`` bool, allows."""
    check_blocks(blocks)
    count = len(usable)
    allowed = usable.nonzero().flatten().tolist()
    if isinstance(blocks, str):
        chosen = allowed
    elif isinstance(blocks, Sequence):
        chosen = sorted({block + count if block < 0 else block for block in blocks})
        for block in chosen:
            if not 0 <= block < count:
                raise ProConError(f"blocks names block {block}, but the model has {count}: give indices below {count}")
            if block not in allowed:
                raise ProConError(f"blocks names block {block}, which has no direction: leave it out")
    else:
        chosen = [block for block in allowed if block >= count - math.ceil(blocks * count)]
    if not chosen:
        raise ProConError("no block is selected: give at least one block that has a direction")
    return tuple(chosen)
