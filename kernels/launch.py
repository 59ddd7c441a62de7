"""Block and warp counts by hidden size, and the device that a launch goes to.

The table takes the place of run-time autotuning: it depends on D alone, so no batch pays for a search and two runs make
the same choice. A thread gets 8 to 32 elements while rows are up to 16384 long: enough for loads of 16 bytes, few
enough to stay in registers.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """A program's share of an ``[N, D]`` tensor, and its number of warps.

    The number of warps never passes 16, which keeps the 64-lane wavefronts of AMD within 1024 threads.
    """

    rows: int
    columns: int
    warps: int


def row_tile(size: int) -> Tile:
    """Whole rows of ``size`` elements, for a reduction along D."""
    columns = triton.next_power_of_2(size)
    return Tile(max(1, min(16, 4096 // columns)), columns, max(4, min(16, columns // 1024)))


def patch_tile(size: int) -> Tile:
    """Pieces of several rows of ``size`` elements, for elementwise work: a narrow piece wastes little of an odd D."""
    columns = min(256, triton.next_power_of_2(size))
    return Tile(8, columns, 4)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` current: Triton launches on the current one, wherever the arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
