"""Rows as the kernels hold them: cut into pieces, of which each thread has a few neighbours, and added up together.

A row of 3584 is a piece of 2048, one of 1024 and one of 512: in 256 threads, 8, 4 and 2 numbers each. No lane is idle,
and a thread has the same columns of all that it loads. :func:`procon.kernels.launch.cut` makes the pieces.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and numbers known when it compiles.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false, reportArgumentType=false

import triton
import triton.language as tl
from triton import knobs

#: The interpreter adds up the last axis in the order of NumPy, and any other one number after number.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def _columns(THREADS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Of a piece ``(first column, neighbours of a thread)``."""
    return FIRST + tl.arange(0, THREADS)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def load_piece(
    at,
    live,
    dtype: tl.constexpr,
    D: tl.constexpr,
    THREADS: tl.constexpr,
    FIRST: tl.constexpr,
    WIDTH: tl.constexpr,
    HOW: tl.constexpr,
):
    """A piece of a row at pointer ``at``, or 0; ``live [1]`` is None if all rows are there. ``HOW`` it is cached."""
    column = _columns(THREADS, FIRST, WIDTH)
    eviction: tl.constexpr = "evict_last" if HOW == "evict_last" else ""
    cache: tl.constexpr = HOW if HOW == ".ca" else ""
    if live is None and FIRST + THREADS * WIDTH <= D:
        x = tl.load(at + column, eviction_policy=eviction, cache_modifier=cache)
    else:
        # Loads with a mask select: whatever a dead row holds, it counts as 0.
        there = column < D if live is None else live[:, None, None] & (column < D)
        x = tl.load(at + column, mask=there, other=0, eviction_policy=eviction, cache_modifier=cache)
    return x.to(dtype)


@triton.jit
def load_row(
    at, live, dtype: tl.constexpr, D: tl.constexpr, THREADS: tl.constexpr, PIECES: tl.constexpr, HOW: tl.constexpr
):
    """All pieces of a row."""
    found = ()
    for i in tl.static_range(len(PIECES)):
        found += (load_piece(at, live, dtype, D, THREADS, PIECES[i][0], PIECES[i][1], HOW),)
    return found


@triton.jit
def store_piece(at, value, live, D: tl.constexpr, THREADS: tl.constexpr, FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Write ``value``, rounded, where the row at pointer ``at`` has this piece."""
    column = _columns(THREADS, FIRST, WIDTH)
    value = value.to(at.dtype.element_ty)
    if live is None and FIRST + THREADS * WIDTH <= D:
        tl.store(at + column, value)
    else:
        tl.store(at + column, value, mask=column < D if live is None else live[:, None, None] & (column < D))


@triton.jit
def of_threads(row, other):
    """The product of two rows, added up by each thread for itself: ``[1, THREADS]``."""
    total = tl.sum(row[0] * other[0], axis=2)
    for i in tl.static_range(1, len(row)):
        total += tl.sum(row[i] * other[i], axis=2)
    return total


@triton.jit
def row_sums(terms):
    """Sums over the threads of a tuple of ``[1, THREADS]``: a tuple of ``[1]``.

    Four sums meet at one barrier. Interleaved in registers, they are one tensor, whose threads write 16 bytes each.
    """
    count: tl.constexpr = len(terms)
    if _INTERPRETED or count == 1:
        sums = ()
        for i in tl.static_range(count):
            sums += (tl.sum(terms[i], axis=1),)
        return sums
    elif count == 2:
        one, other = tl.split(tl.sum(tl.join(terms[0], terms[1]), axis=1))
        return (one, other)
    elif count == 3:
        return row_sums(terms[:2]) + row_sums(terms[2:])
    elif count == 4:
        together = tl.join(tl.join(terms[0], terms[1]), tl.join(terms[2], terms[3]))
        left, right = tl.split(tl.sum(together, axis=1))
        first, second = tl.split(left)
        third, fourth = tl.split(right)
        return (first, second, third, fourth)
    else:
        return row_sums(terms[:4]) + row_sums(terms[4:])
