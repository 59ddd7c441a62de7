"""phi(e) and its slope, and a row's penalty along all directions, as every forward computes them in registers."""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl


@triton.jit
def value_and_slope(e, bound, PENALTY: tl.constexpr):
    """phi(e) and phi'(e); ``bound`` is how much of ``e`` may be rounding, which only "absolute" knows.

    NaN gives NaN, so that whoever looks for it in gradients finds it.
    """
    if PENALTY == "squared":
        value = e * e
        slope = 2 * e
    else:
        # The smallest normal number keeps 0 / 0 away.
        slope = e / tl.maximum(tl.maximum(tl.abs(e), bound), 1.1754943508222875e-38)
        value = slope * (e - 0.5 * slope * bound)
    return value, slope


@triton.jit
def penalize_row(
    projections,
    square,
    w,
    row,
    N,
    anchor,
    anchor_stride,
    anchor_step,
    reach,
    token_penalty,
    coefficient,
    K: tl.constexpr,
    PENALTY: tl.constexpr,
):
    """Write a row's penalty and coefficients, of K projections, ``|h|^2`` and its weight or None; each is ``[1]``."""
    inside = row < N
    live = inside if w is None else inside & (w != 0)
    total = tl.zeros([1], projections[0].dtype)
    bound = total
    for k in tl.static_range(K):
        e = projections[k]
        if anchor is not None:
            e -= tl.load(anchor + row * anchor_stride + k * anchor_step, mask=live, other=0)
        if reach is not None:
            bound = tl.where(live, tl.sqrt(square) * tl.load(reach + k), 0)
        # Selected, not multiplied: a dead row may hold NaN.
        value, slope = value_and_slope(tl.where(live, e, 0), bound, PENALTY)
        total += value
        if w is not None:
            slope *= w
        tl.store(coefficient + row * K + k, slope, mask=inside)
    if w is not None:
        total *= w
    tl.store(token_penalty + row, total, mask=inside)
