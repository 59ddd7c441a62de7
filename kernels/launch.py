"""How much of an ``[N, D]`` tensor a program takes, by D and architecture, and the device that a launch goes to.

A table takes the place of run-time autotuning: no batch pays for a search, and two runs make the same choice. Its
entries were chosen from ahead-of-time builds, for few spills and wide accesses.
``python -m benchmarks.tune`` measures them on a GPU and prints an entry to put here.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton

#: Pieces of a row, each as its first column and the neighbouring columns that every thread takes of it.
Pieces = tuple[tuple[int, int], ...]


class Tile(NamedTuple):
    """A patch of an ``[N, D]`` tensor that a program takes, and its number of warps."""

    rows: int
    columns: int
    warps: int

    def options(self) -> dict[str, Any]:
        """What a launch takes for it."""
        return {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps, "enable_fp_fusion": FP_FUSION}


class Rows(NamedTuple):
    """Whole rows that a program takes at a time."""

    rows: int
    threads: int
    warps: int
    pieces: Pieces

    @property
    def columns(self) -> int:
        """How long a row is with its padding."""
        first, width = self.pieces[-1]
        return first + self.threads * width

    @property
    def per_thread(self) -> int:
        """Columns of a thread."""
        return sum(width for _, width in self.pieces)

    def options(self) -> dict[str, Any]:
        """What a launch takes for them."""
        tile = {"ROWS": self.rows, "THREADS": self.threads, "PIECES": self.pieces}
        return {**tile, "num_warps": self.warps, "enable_fp_fusion": FP_FUSION}


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
            256: (4, 32),
            512: (4, 64),
            1024: (2, 128),
            2048: (1, 128),
            4096: (1, 256),
            8192: (1, 256),
            16384: (1, 512),
        },
        "hip": {512: (4, 64), 1024: (2, 128), 2048: (1, 128), 4096: (1, 256), 8192: (1, 512), 16384: (1, 1024)},
    },
    # RMSNorm backward: a row at a time of two tensors, and a sum over the rows.
    "norm_backward": {
        "cuda": {256: (1, 32), 512: (1, 64), 1024: (1, 128), 2048: (1, 128), 4096: (1, 256), 8192: (1, 512)},
        "hip": {256: (1, 64), 512: (1, 64), 1024: (1, 128), 2048: (1, 256), 4096: (1, 512), 8192: (1, 1024)},
    },
}

#: Up to so many columns, RMSNorm backward holds a row in registers between its two uses; and from so many directions
#: on, a program of the forward takes several rows, to read the directions as much more rarely.
HELD_COLUMNS = 8192
MANY_DIRECTIONS = 4
MANY_ROWS = 4
_MANY_NUMBERS = 72  # of these rows, in the registers of a thread

#: Longest row in bytes whose share of the weight's gradient has room in registers beside the states' gradient.
SUMMED_BYTES = 32 * 1024

#: Of a program of RMSNorm backward: numbers per thread, in about 128 registers, and threads, of which so many fill a
#: multiprocessor.
_NUMBERS = 112
_THREADS = {"cuda": 512, "hip": 1024}

#: Of all launches: products that are added are rounded once. The default of Triton 3.10 is to round them twice.
FP_FUSION = True

#: Of what RMSNorm backward moves, what the programs' sums for the weight may be: float32, written and read.
_SUMS_SHARE = 0.1
_BYTES_OF_SUMS = 8

#: What is in the L2 cache after it was read: data-centre GPUs have 40 MB and more.
_CACHED_BYTES = 32 * 2**20

#: Bytes of rows on their way to the shared memory of one program: all GPUs since sm_80 have more.
_BYTES_AHEAD = 64 * 1024

#: Bytes of a thread's neighbours in a row: the widest access, and the narrowest that can be copied ahead.
_WIDEST, _COPIED = 16, 4

#: A row may be padded by so much of its length.
_PADDING = 1 / 16


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


def cut(size: int, threads: int, itemsize: int) -> Pieces:
    """A row of ``size`` elements of ``itemsize`` bytes, in pieces whose widths are powers of two."""
    pieces, first, width = [], 0, max(1, _WIDEST // itemsize)
    while first < size:
        while width > 1 and first + threads * width - size > size * _PADDING:
            width //= 2
        pieces.append((first, width))
        first += threads * width
    return tuple(pieces)


def rows_of(rows: int, threads: int, size: int, itemsize: int, target: Target) -> Rows:
    """``rows`` of ``size`` elements, which ``threads`` take."""
    return Rows(rows, threads, threads // target.warp_size, cut(size, threads, itemsize))


@cache
def whole_rows(kernel: str, size: int, itemsize: int, target: Target) -> Rows:
    """Rows for a reduction along D: by the threads listed, or by as many halves as pad little and leave wide pieces."""
    entries = TABLE[kernel].get(target.architecture, TABLE[kernel][target.family])
    rows, most = entries[next((length for length in entries if length >= size), max(entries))]
    most = min(1024, most * itemsize // 2)
    fewer = [most >> halved for halved in range(6) if most >> halved >= target.warp_size]
    choices = [rows_of(rows, threads, size, itemsize, target) for threads in fewer]
    for each in choices:
        if each.columns - size <= size * _PADDING and each.pieces[-1][1] * itemsize >= _COPIED:
            return each
    return min(choices, key=lambda each: each.columns)


@cache
def forward_rows(size: int, itemsize: int, directions: int, target: Target) -> Rows:
    """Whole rows, whose sums of squares and projections are taken together."""
    taken = whole_rows("forward", size, itemsize, target)
    if target.family == "cuda" and directions >= MANY_DIRECTIONS and size <= HELD_COLUMNS:
        taken = taken._replace(rows=MANY_ROWS)
        while taken.threads < 512 and MANY_ROWS * taken.per_thread > _MANY_NUMBERS:
            taken = rows_of(MANY_ROWS, 2 * taken.threads, size, itemsize, target)
    return taken


class Stream(NamedTuple):
    """How RMSNorm backward goes through its rows."""

    taken: Rows
    #: Programs that a multiprocessor gets.
    programs: int
    #: Whether a row stays in registers between its two uses.
    held: bool
    #: Whether the directions stay in registers from row to row.
    kept: bool
    #: Rows in flight, the one that is worked on included.
    stages: int

    def programs_for(self, rows: int, target: Target) -> int:
        """As many programs as fill the GPU."""
        return min(triton.cdiv(rows, self.taken.rows), self.programs * target.multiprocessors)


@cache
def row_stream(size: int, itemsize: int, directions: int, target: Target) -> Stream:
    """Rows of ``size`` elements of ``itemsize`` bytes, one after the other."""
    taken, most = whole_rows("norm_backward", size, itemsize, target), _THREADS[target.family]
    held, kept = size <= HELD_COLUMNS, False
    if held:
        least = min(taken.threads, most)
        larger = [least << doubled for doubled in range(6) if least << doubled <= most]
        choices = [rows_of(1, threads, size, itemsize, target) for threads in larger]
        # Of each column: both tensors, the weight (of two bytes, it shares a register), its gradient and what is
        # computed, and the directions.
        numbers = (5 if itemsize == 2 else 6) + directions
        fits = next((each for each in choices if each.per_thread * numbers <= _NUMBERS), None)
        taken, kept = fits or choices[0], directions > 0 and fits is not None
    # Directions that do not stay would be copied ahead too, for which there is no room.
    copies = target.family == "cuda" and int(target.architecture.removeprefix("sm_")) >= 80
    streams = held and (kept or not directions) and copies
    ahead = min(2, _BYTES_AHEAD // (2 * taken.columns * itemsize)) if streams else 0
    if held and directions >= MANY_DIRECTIONS and not kept:
        # They are read for several rows together, if there is room for these.
        rows = next((count for count in (4, 2) if taken.per_thread * 2 * count <= _MANY_NUMBERS), 1)
        taken = taken._replace(rows=rows)
    return Stream(taken, max(1, most // taken.threads), held, kept, 1 + ahead)


def summing_programs(rows: int, size: int, itemsize: int, stream: Stream, target: Target) -> int:
    """How many programs of RMSNorm backward run, if they add up the weight's gradient too: few, if sums are many bytes.

    0 if another launch adds it up: for long rows, and where it finds the tensors in the GPU's cache and saves bytes.
    """
    moved = 3 * rows * size * itemsize  # two tensors in, and one out
    most = int(_SUMS_SHARE * moved / (size * _BYTES_OF_SUMS))
    each = min(stream.programs, max(1, most // target.multiprocessors))
    wanted = min(stream.programs_for(rows, target), each * target.multiprocessors)
    cached = 2 * rows * size * itemsize <= _CACHED_BYTES
    return wanted if size * itemsize <= SUMMED_BYTES and (wanted <= most or not cached) else 0


def patch_tile(size: int) -> Tile:
    """Pieces of several rows of ``size`` elements, for elementwise work."""
    columns = next((count for count in (256, 128) if -size % count <= size * _PADDING), 64)
    columns = min(columns, triton.next_power_of_2(size))
    return Tile(2048 // columns, columns, 4)


def sum_tile(size: int, target: Target) -> Tile:
    # So few columns that all multiprocessors share the work of a sum over rows.
    columns = next((count for count in (64, 32) if size >= count * target.multiprocessors), 16)
    return Tile(64, columns, columns // 8)


def sum_splits(rows: int, size: int, tile: Tile, target: Target) -> int:
    """How many programs share the rows of some columns: four on a multiprocessor, each with four tiles or more."""
    return max(1, min(4 * target.multiprocessors // triton.cdiv(size, tile.columns), rows // (4 * tile.rows)))


def on_device(tensor: torch.Tensor) -> AbstractContextManager:
    """Makes the GPU of ``tensor`` current: Triton launches on the current one, wherever the arguments live."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()
