"""Rows worked on at a time, so that temporaries stay in cache and no whole float32 copy is ever made."""

from collections.abc import Iterator

from torch import Tensor

# A tile on CPU should stay in the last-level cache; on other devices few launches matter more.
_TILE_BYTES_ON_CPU = 1 << 22
_TILE_BYTES_ELSEWHERE = 1 << 26


def tile_height(like: Tensor, columns: int) -> int:
    """Rows of ``columns`` elements in the dtype of ``like`` that make a tile on its device."""
    budget = _TILE_BYTES_ON_CPU if like.is_cpu else _TILE_BYTES_ELSEWHERE
    return max(1, budget // (columns * like.itemsize))


def tiled(height: int, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tensors, which have the same number of rows, at most ``height`` rows at a time."""
    rows = len(tensors[0])
    if rows <= height:
        # A slice that takes all costs as much as an operation on few rows.
        yield tensors
        return
    for start in range(0, rows, height):
        yield tuple(tensor[start : start + height] for tensor in tensors)


def converted(tile: Tensor, buffer: Tensor | None) -> Tensor:
    """``tile`` in the dtype of ``buffer``, which it overwrites; ``tile`` itself without one."""
    return tile if buffer is None else buffer[: len(tile)].copy_(tile)
