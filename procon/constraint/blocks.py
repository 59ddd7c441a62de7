"""Which blocks are constrained, or trained, or read: all, the deepest share of them, or some by index.

Of L blocks, index L stands for the output of the last one, which is the input of no block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from torch import Tensor

from procon.directions import Directions
from procon.errors import ProConError
from procon.settings import LAST, Blocks, check_blocks


def select_blocks(directions: Directions, blocks: Blocks) -> tuple[int, ...]:
    """Indices of the blocks to constrain, of those that have a direction, in order; ``L`` for the last one's output.

    Raises:
        ProConError: if the selection is empty, out of range, or names a block without a direction.
    """
    last = bool(directions.usable[-1]) if directions.last_output else None
    return select_among(directions.at_block_inputs.usable, blocks, last)


def select_among(usable: Tensor, blocks: Blocks, last: bool | None = None) -> tuple[int, ...]:
    """As :func:`select_blocks`, of the blocks that ``usable``, ``[L]`` bool, allows.

    Args:
        last: whether the output of the last block is allowed; None if nothing is known of it.
    """
    check_blocks(blocks)
    count = len(usable)
    parts = list(blocks) if isinstance(blocks, Sequence) and not isinstance(blocks, str) else [blocks]
    chosen = {site for part in parts for site in _sites(part, usable.nonzero().flatten().tolist(), count, last)}
    if not chosen:
        raise ProConError("no block is selected: give at least one block that has a direction")
    return tuple(sorted(chosen))


def _sites(part: object, allowed: list[int], count: int, last: bool | None) -> list[int]:
    """Indices that one part of a selection names."""
    if part == "all":
        return allowed
    if isinstance(part, Real) and not isinstance(part, Integral):
        return [block for block in allowed if block >= count - math.ceil(float(part) * count)]
    site = count if part == LAST else int(part)  # pyright: ignore[reportArgumentType]  # checked
    site += count if site < 0 else 0
    if part == LAST or (site == count and last is not None):
        if not last:
            raise ProConError(
                "blocks names the output of the last block, which has no direction: extract directions with this "
                "version, or leave it out"
            )
    elif not 0 <= site < count:
        raise ProConError(f"blocks names block {site}, but the model has {count}: give indices below {count}")
    elif site not in allowed:
        raise ProConError(f"blocks names block {site}, which has no direction: leave it out")
    return [site]
