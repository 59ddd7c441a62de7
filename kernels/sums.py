"""Sums along rows that share the way through shared memory."""

# What @triton.jit compiles is not what Python would run: unrolled loops, and numbers known when it compiles.
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl
from triton import knobs

#: The interpreter adds up the last axis in the order of NumPy, and any other one number after number.
_INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def row_sums(terms):
    """Sums along D of a tuple of tiles ``[ROWS, D]``: a tuple of ``[ROWS]``.

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
