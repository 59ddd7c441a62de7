"""Projection, penalty and coefficient in one read of H; the gradient in one write.

For ``h [N, D]``, directions ``r [K, D]``, anchors ``a [N, K]`` and weights ``w [N]``::

    forward   z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  dh_t = g_h[t] + g_t sum_k c_tk r_k

phi "absolute" is a parabola up to ``rounding |h_t| |r_k|``, and straight beyond.

Bytes moved, with U = N * D * itemsize: forward U (rows of weight 0 are not read), backward 2U, or U when no gradient
arrives for h. Beside that 4N(3K + 2) bytes of anchors, weights, penalties and coefficients, of which the backward reads
a coefficient once for each patch; r stays in cache.

Accumulation is in the dtype of r: float32, or float64 for float64 hidden states.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and names bound under compile-time conditions.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FP_FUSION, forward_tile, on_device, patch_tile, target_of
from .penalty import value_and_slope
from .sums import row_sums


# N changes from batch to batch and must not cause a recompilation.
@triton.jit(do_not_specialize=["N"])
def _forward(
    hidden,
    direction,
    anchor,
    weight,
    token_penalty,
    per_direction,
    N,
    hidden_stride,
    anchor_stride,
    anchor_step,
    weight_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    PENALTY: tl.constexpr,
    ROUNDING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``per_direction [N, K]`` receives the coefficient, or the projection when PENALTY is None."""
    dtype = direction.dtype.element_ty
    # A row offset passes 2^31 elements long before memory runs out.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Of two dimensions from the start: a direction is then loaded as the threads hold a row.
    column = tl.arange(0, COLUMNS)[None, :]
    real = column < D
    inside = row < N
    live = inside
    if weight is not None:
        w = tl.load(weight + row * weight_stride, mask=inside, other=0)
        live = inside & (w != 0)
    # Loads with a mask select: whatever a dead row holds, it counts as 0.
    h = tl.load(hidden + row[:, None] * hidden_stride + column, mask=live[:, None] & real, other=0).to(dtype)
    terms = ()
    for k in tl.static_range(K):
        r = tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")
        terms += (h * r,)
    if PENALTY == "absolute" and ROUNDING > 0:
        terms += (h * h,)
    sums = row_sums(terms)
    total = tl.zeros([ROWS], dtype)
    reach = total
    for k in tl.static_range(K):
        z = sums[k]
        if PENALTY is None:
            result = z
        else:
            if anchor is not None:
                z -= tl.load(anchor + row * anchor_stride + k * anchor_step, mask=live, other=0)
            if PENALTY == "absolute" and ROUNDING > 0:
                r = tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")
                reach = ROUNDING * tl.sqrt(sums[K] * tl.sum(r * r, axis=1))
            value, result = value_and_slope(z, reach, PENALTY)
            total += value
            if weight is not None:
                result *= w
        tl.store(per_direction + row * K + k, result, mask=inside)
    if PENALTY is not None:
        if weight is not None:
            total *= w
        tl.store(token_penalty + row, total, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward(
    incoming,
    upstream,
    coefficient,
    direction,
    gradient,
    N,
    incoming_stride,
    upstream_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = row < N
    patch = inside[:, None] & (column < D)[None, :]
    if incoming is not None:
        arrived = incoming + row[:, None] * incoming_stride + column[None, :]
        total = tl.load(arrived, mask=patch, other=0).to(direction.dtype.element_ty)
    else:
        total = tl.zeros([ROWS, COLUMNS], direction.dtype.element_ty)
    for k in tl.static_range(K):
        c = tl.load(coefficient + row * K + k, mask=inside, other=0)
        if upstream is not None:
            c *= tl.load(upstream + row * upstream_stride, mask=inside, other=0)
        r = tl.load(direction + k * D + column, mask=column < D, other=0, eviction_policy="evict_last")
        total += c[:, None] * r[None, :]
    tl.store(gradient + row[:, None] * D + column[None, :], total.to(gradient.dtype.element_ty), mask=patch)


def _launch_forward(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    token_penalty: Tensor | None,
    per_direction: Tensor,
    penalty: str | None,
    rounding: float,
) -> None:
    rows, size = hidden.shape
    tile = forward_tile(size, hidden.element_size(), len(direction), target_of(hidden))
    anchor_stride, anchor_step = (0, 0) if anchor is None else anchor.stride()
    if rows:
        with on_device(hidden):
            _forward[(triton.cdiv(rows, tile.rows),)](
                hidden,
                direction,
                anchor,
                weight,
                token_penalty,
                per_direction,
                rows,
                hidden.stride(0),
                anchor_stride,
                anchor_step,
                0 if weight is None else weight.stride(0),
                D=size,
                K=len(direction),
                PENALTY=penalty,
                ROUNDING=rounding,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]  # a launch option
                enable_fp_fusion=FP_FUSION,  # pyright: ignore[reportCallIssue]
            )


def project(hidden: Tensor, direction: Tensor) -> Tensor:
    """Projection ``z [N, K]`` of ``hidden [N, D]`` on ``direction [K, D]``, in the dtype of ``direction``."""
    projection = torch.empty((len(hidden), len(direction)), dtype=direction.dtype, device=hidden.device)
    _launch_forward(hidden, direction, None, None, None, projection, None, 0.0)
    return projection


def penalize(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]``, both in the dtype of ``direction``.

    ``rounding`` is the share of ``|h| |r|`` that may be rounding: there "absolute" is a parabola.
    """
    token_penalty = torch.empty(len(hidden), dtype=direction.dtype, device=hidden.device)
    coefficient = torch.empty((len(hidden), len(direction)), dtype=direction.dtype, device=hidden.device)
    _launch_forward(hidden, direction, anchor, weight, token_penalty, coefficient, penalty, rounding)
    return token_penalty, coefficient


def accumulate_gradient(
    incoming: Tensor | None,
    upstream: Tensor | None,
    coefficient: Tensor,
    direction: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient for the hidden states, ``incoming + upstream * coefficient @ direction``, rounded once to ``dtype``.

    ``incoming [N, D]`` is the gradient that arrives for the hidden states, ``upstream`` (one number, or one per token)
    that of the penalty; None stands for 0 and for 1. Neither is written to.
    """
    rows, size = len(coefficient), direction.shape[1]
    gradient = torch.empty((rows, size), dtype=dtype, device=direction.device)
    tile = patch_tile(size)
    if rows:
        with on_device(direction):
            _backward[(triton.cdiv(rows, tile.rows), triton.cdiv(size, tile.columns))](
                incoming,
                upstream,
                coefficient.contiguous(),
                direction,
                gradient,
                rows,
                0 if incoming is None else incoming.stride(0),
                # One number for all tokens is a vector of stride 0.
                0 if upstream is None or upstream.dim() == 0 else upstream.stride(0),
                D=size,
                K=len(direction),
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]  # a launch option
                enable_fp_fusion=FP_FUSION,  # pyright: ignore[reportCallIssue]
            )
    return gradient
