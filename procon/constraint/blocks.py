"""Which blocks are constrained, or trained, or read: all, the deepest share of them, or some by index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from procon.directions import RefusalDirections
from procon.errors import ProConError

Blocks = Literal["all"] | float | Sequence[int]


def select_blocks(directions: RefusalDirections, blocks: Blocks) -> tuple[int, ...]:
    """Indices of the blocks to constrain, of those that have a direction.

    Raises:
        ProConError: if the selection is empty, out of range, or names a block without a direction.
    """
    return choose_blocks(directions.usable, blocks)


def choose_blocks(usable: Tensor, blocks: Blocks) -> tuple[int, ...]:
    """As :func:`select_blocks`, of the blocks that ``usable``, ``[L]`` bool, allows."""
    count = len(usable)
    usable = usable.nonzero().flatten().tolist()
    if isinstance(blocks, str):
        if blocks != "all":
            raise ProConError(f"blocks is {blocks!r}: give 'all', a fraction such as 0.5, or a list of indices")
        chosen = usable
    elif isinstance(blocks, float):
        if not 0 < blocks <= 1:
            raise ProConError(f"blocks is the fraction {blocks:g}: give one above 0 and at most 1")
        chosen = [block for block in usable if block >= count - math.ceil(blocks * count)]
    else:
        chosen = sorted({block + count if block < 0 else block for block in blocks})
        for block in chosen:
            if not 0 <= block < count:
                raise ProConError(f"blocks names block {block}, but the model has {count}: give indices below {count}")
            if block not in usable:
                raise ProConError(f"blocks names block {block}, which has no direction: leave it out")
    if not chosen:
        raise ProConError("no block is selected: give at least one block that has a direction")
    return tuple(chosen)
