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
#:
#: On CUDA, a thread's eight columns (16 bytes) are the same in all rows of a tile: what is loaded once for all rows is
#: then where it is needed, and does not go through shared memory.
TABLE: dict[str, dict[str, dict[int, tuple[int, int]]]] = {
    # Whole rows, one read: the projection, and RMSNorm forward.
    "forward": {
        "cuda": {
            256: (4, 32),
            512: (4, 64),
            1024: (2, 128),
            2048: (1, 128),
            4096: (1, 256),
            8192: (1, 256),
            16384: (1, 512),
        },
        "hip": {256: (16, 256), 512: (8, 256), 1024: (4, 256), 4096: (1, 256), 8192: (1, 512), 16384: (1, 1024)},
    },
    # RMSNorm backward: a row at a time of two tensors, and a sum over the rows.
    "norm_backward": {
        "cuda": {256: (1, 32), 512: (1, 64), 1024: (1, 128), 2048: (1, 128), 4096: (1, 256), 8192: (1, 512)},
        "hip": {256: (1, 64), 512: (1, 64), 1024: (1, 128), 2048: (1, 256), 4096: (1, 512), 8192: (1, 1024)},
    },
}

#: From so many directions on, a program of the forward takes two rows on CUDA: it reads the directions half as often.
MANY_DIRECTIONS = 4

#: Longest row that a program of the forward takes two of, and that RMSNorm backward holds in registers between its two
#: uses; a longer one is read again from cache.
HELD_COLUMNS = 8192

#: Longest row in bytes whose share of the weight's gradient has room in registers beside the states' gradient.
SUMMED_BYTES = 32 * 1024

#: Of a program of RMSNorm backward: numbers per thread, in about 128 registers, and threads, of which so many fill a
#: multiprocessor.
_NUMBERS = 112
_THREADS = {"cuda": 512, "hip": 1024}

#: Of all launches: products that are added are rounded once. The default of Triton 3.10 is to round them twice.
FP_FUSION = True

#: Of the weight's gradient, sums that a program adds up at a time: few columns, so that many programs share the work.
SUM_TILE = Tile(64, 64, 8)

#: Bytes of rows on their way to the shared memory of one program: all GPUs since sm_80 have more.
_BYTES_AHEAD = 64 * 1024


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


@cache
def forward_tile(size: int, itemsize: int, directions: int, target: Target) -> Tile:
    """Whole rows, whose sums of squares and projections are taken together."""
    tile = row_tile("forward", size, itemsize, target)
    if target.family == "cuda" and tile.rows == 1 and directions >= MANY_DIRECTIONS and tile.columns <= HELD_COLUMNS:
        return tile._replace(rows=2)
    return tile


def forget() -> None:
    """The choices made so far, which a change of ``TABLE`` does not reach by itself."""
    for choice in (row_tile, forward_tile, row_stream):
        choice.cache_clear()


class Stream(NamedTuple):
    """How RMSNorm backward goes through its rows."""

    columns: int
    warps: int
    #: Programs that a multiprocessor gets.
    programs: int
    #: Whether a row stays in registers between its two uses.
    held: bool
    #: Whether the directions stay in registers from row to row.
    kept: bool
    #: Rows in flight, the one that is worked on included.
    stages: int


@cache
def row_stream(size: int, itemsize: int, directions: int, target: Target) -> Stream:
    """Rows of ``size`` elements of ``itemsize`` bytes, one after the other."""
    _, columns, warps = row_tile("norm_backward", size, itemsize, target)
    threads, most = warps * target.warp_size, _THREADS[target.family]
    held = columns <= HELD_COLUMNS
    kept = False
    if held:
        threads = min(threads, most)
        # Of each column: both tensors, the weight (of two bytes, it shares a register), its gradient and what is
        # computed, and the directions.
        numbers = (5 if itemsize == 2 else 6) + directions
        larger = (threads << doubled for doubled in range(6) if threads << doubled <= most)
        fitting = next((count for count in larger if columns // count * numbers <= _NUMBERS), None)
        kept = directions > 0 and fitting is not None
        threads = fitting or threads
    # Directions that do not stay would be copied ahead too, for which there is no room.
    streams = held and (kept or not directions) and _copies_ahead(target)
    ahead = min(2, _BYTES_AHEAD // (2 * columns * itemsize)) if streams else 0
    return Stream(columns, threads // target.warp_size, max(1, most // threads), held, kept, 1 + ahead)


def _copies_ahead(target: Target) -> bool:
    """Whether it copies from global to shared memory while it computes."""
    return target.family == "cuda" and int(target.architecture.removeprefix("sm_")) >= 80


def patch_tile(size: int) -> Tile:
    """Pieces of several rows of ``size`` elements, for elementwise work: a narrow piece wastes little of an odd D."""
    return Tile(8, min(256, triton.next_power_of_2(size)), 4)


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` current: Triton launches on the current one, wherever the arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
