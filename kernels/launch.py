"""How much of an ``[N, D]`` tensor a program takes, by D and architecture, and the device that a launch goes to.

A table takes the place of run-time autotuning: no batch pays for a search, and two runs make the same choice. Its
entries were chosen from ahead-of-time builds: no spills, and every access of hidden states is 16 bytes wide per thread.
``python -m benchmarks.tune`` measures them on a GPU and prints an entry to put here.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """A program's share of an ``[N, D]`` tensor, and its number of warps."""

    rows: int
    columns: int
    warps: int


class Target(NamedTuple):
    """What the choice depends on: such as ``("sm_90", 32, 132)`` or ``("gfx942", 64, 304)``."""

    architecture: str
    warp_size: int
    multiprocessors: int

    @property
    def family(self) -> str:
        return "hip" if self.architecture.startswith("gfx") else "cuda"


#: Without a GPU, in Triton's interpreter: few programs, but more than one.
INTERPRETER = Target("sm_80", 32, 2)

#: ``{kernel: {architecture or family: {columns: (rows, threads)}}}`` for elements of two bytes; larger ones get as many
#: times the threads. Threads and not warps, because 1024 of them are the limit whatever their number in a warp. Longer
#: rows than listed take the last entry.
TABLE: dict[str, dict[str, dict[int, tuple[int, int]]]] = {
    # Whole rows, one read: the projection, and RMSNorm forward.
    "forward": {
        "cuda": {
            256: (16, 256),
            512: (8, 256),
            1024: (4, 256),
            2048: (1, 128),
            4096: (1, 256),
            8192: (1, 256),
            16384: (1, 512),
        },
        "hip": {256: (16, 256), 512: (8, 256), 1024: (4, 256), 4096: (1, 256), 8192: (1, 512), 16384: (1, 1024)},
    },
    # Whole rows of two tensors, and a sum over the rows: RMSNorm backward.
    "norm_backward": {
        "cuda": {256: (8, 256), 512: (4, 256), 1024: (2, 256), 2048: (1, 128), 4096: (1, 256), 8192: (1, 512)},
        "hip": {256: (8, 256), 512: (4, 256), 1024: (2, 256), 2048: (1, 256), 4096: (1, 512), 8192: (1, 1024)},
    },
}

#: Longest row that RMSNorm backward holds in registers between its two uses; a longer one is read again from cache.
HELD_COLUMNS = 8192


def target_of(tensor: torch.Tensor) -> Target:
    """The architecture that a launch for ``tensor`` runs on."""
    return _device_target(tensor.device) if tensor.is_cuda else INTERPRETER


@cache
def _device_target(device: torch.device) -> Target:
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = properties.gcnArchName.split(":")[0]
    else:
        name = f"sm_{properties.major}{properties.minor}"
    return Target(name, properties.warp_size, properties.multi_processor_count)


@cache
def row_tile(kernel: str, size: int, itemsize: int, target: Target) -> Tile:
    """Whole rows of ``size`` elements of ``itemsize`` bytes, for a reduction along D."""
    entries = TABLE[kernel].get(target.architecture, TABLE[kernel][target.family])
    columns = triton.next_power_of_2(size)
    listed = next((length for length in entries if length >= columns), max(entries))
    rows, threads = entries[listed]
    return Tile(rows, columns, min(1024, threads * itemsize // 2) // target.warp_size)


def patch_tile(size: int) -> Tile:
    """Pieces of several rows of ``size`` elements, for elementwise work: a narrow piece wastes little of an odd D."""
    return Tile(8, min(256, triton.next_power_of_2(size)), 4)


def programs(tiles: int, target: Target) -> int:
    """Programs that share ``tiles`` when each keeps a sum of its own: two a multiprocessor, to hide latency.

    More would hide it better, but each writes a row of D numbers that have to be added up.
    """
    return min(tiles, 2 * target.multiprocessors)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` current: Triton launches on the current one, wherever the arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
