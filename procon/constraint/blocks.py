"""Which blocks are constrained: all, the deepest share of them, or some by index."""

from __future__ import annotations

import math
from collections.abc import Sequence

from procon.directions import Directions
from procon.errors import ProConError
from procon.settings import Blocks, check_blocks


def select_blocks(directions: Directions, blocks: Blocks) -> tuple[int, ...]:
    """Indices of the blocks to constrain, of those that have a direction, in order.

    Raises:
        ProConError: if the selection is empty, out of range, or names a block without a direction.
    """
    check_blocks(blocks)
    count, usable = directions.block_count, directions.usable.nonzero().flatten().tolist()
    if isinstance(blocks, str):
        chosen = usable
    elif isinstance(blocks, Sequence):
        chosen = sorted({int(block) + (count if block < 0 else 0) for block in blocks})
    else:
        chosen = [block for block in usable if block >= count - math.ceil(blocks * count)]
    for block in chosen:
        if not 0 <= block < count:
            raise ProConError(f"blocks names block {block}, but the model has {count}: give indices below {count}")
        if block not in usable:
            raise ProConError(f"blocks names block {block}, which has no direction: leave it out")
    if not chosen:
        raise ProConError("no block is selected: give at least one block that has a direction")
    return tuple(chosen)
