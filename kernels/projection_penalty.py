"""Projection, penalty and coefficient in one read of H; the gradient in one write.

For ``h [N, D]``, directions ``r [K, D]``, anchors ``a [N, K]`` and weights ``w [N]``::

    forward   z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  dh_t = g_h[t] + g_t sum_k c_tk r_k

With ``reach [K]``, phi "absolute" is a parabola up to ``|h_t| reach_k``, and straight beyond.

Bytes moved, with U = N * D * itemsize: forward U (rows of weight 0 are not read), backward 2U, or U when no gradient
arrives for h. Beside that 4N(3K + 2) bytes of anchors, weights, penalties and coefficients, of which the backward reads
a coefficient once for each patch; r stays in cache.

Accumulation is in the dtype of r: float32, or float64 for float64 hidden states.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and names bound under compile-time conditions.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import forward_rows, on_device, patch_tile, target_of
from .penalty import penalize_row
from .rows import load_row, of_threads, row_sums


# N changes from batch to batch and must not cause a recompilation.
@triton.jit(do_not_specialize=["N"])
def _forward(
    hidden,
    direction,
    anchor,
    weight,
    reach,
    token_penalty,
    results,
    N,
    hidden_stride,
    anchor_stride,
    anchor_step,
    weight_stride,
    D: tl.constexpr,
    K: tl.constexpr,
    PENALTY: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    PIECES: tl.constexpr,
):
    """``results [N, K]`` receive the coefficient, or the projection when PENALTY is None."""
    dtype = direction.dtype.element_ty
    # A row offset passes 2^31 elements long before memory runs out.
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 1)
    h = ()
    weights = ()
    for j in tl.static_range(ROWS):
        row = first + j
        live = row < N if ROWS > 1 else None
        if weight is not None:
            weights += (tl.load(weight + row * weight_stride, mask=row < N, other=0),)
            live = (row < N) & (weights[j] != 0)
        h += (load_row(hidden + (row * hidden_stride)[:, None, None], live, dtype, D, THREADS, PIECES, ""),)
    terms = ()
    if reach is not None:
        for j in tl.static_range(ROWS):
            terms += (of_threads(h[j], h[j]),)
    for k in tl.static_range(K):
        r = load_row(direction + k * D, None, dtype, D, THREADS, PIECES, "evict_last")
        for j in tl.static_range(ROWS):
            terms += (of_threads(h[j], r),)
    sums = row_sums(terms)
    before: tl.constexpr = ROWS if reach is not None else 0
    for j in tl.static_range(ROWS):
        row = first + j
        z = ()
        for k in tl.static_range(K):
            z += (sums[before + k * ROWS + j],)
        if PENALTY is None:
            for k in tl.static_range(K):
                tl.store(results + row * K + k, z[k], mask=row < N)
        else:
            w = weights[j] if weight is not None else None
            penalize_row(
                z, sums[j], w, row, N, anchor, anchor_stride, anchor_step, reach, token_penalty, results, K, PENALTY
            )


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
    reach: Tensor | None,
    token_penalty: Tensor | None,
    per_direction: Tensor,
    penalty: str | None,
) -> None:
    rows, size = hidden.shape
    taken = forward_rows(size, hidden.element_size(), len(direction), target_of(hidden))
    tensors = (hidden, direction, anchor, weight, reach if penalty == "absolute" else None)
    strides = (*((0, 0) if anchor is None else anchor.stride()), 0 if weight is None else weight.stride(0))
    rule = {"PENALTY": penalty, "D": size, "K": len(direction)}
    if rows:
        with on_device(hidden):
            grid, results = (triton.cdiv(rows, taken.rows),), (token_penalty, per_direction)
            _forward[grid](*tensors, *results, rows, hidden.stride(0), *strides, **rule, **taken.options())


def project(hidden: Tensor, direction: Tensor) -> Tensor:
    """Projection ``z [N, K]`` of ``hidden [N, D]`` on ``direction [K, D]``, in the dtype of ``direction``."""
    projection = torch.empty((len(hidden), len(direction)), dtype=direction.dtype, device=hidden.device)
    _launch_forward(hidden, direction, None, None, None, None, projection, None)
    return projection


def penalize(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]``, both in the dtype of ``direction``.

    ``reach [K]`` is ``|r|`` times the share of ``|h| |r|`` that may be rounding: there "absolute" is a parabola.
    """
    token_penalty = torch.empty(len(hidden), dtype=direction.dtype, device=hidden.device)
    coefficient = torch.empty((len(hidden), len(direction)), dtype=direction.dtype, device=hidden.device)
    _launch_forward(hidden, direction, anchor, weight, reach, token_penalty, coefficient, penalty)
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
    # One number for all tokens is a vector of stride 0.
    of_upstream = 0 if upstream is None or upstream.dim() == 0 else upstream.stride(0)
    strides = (0 if incoming is None else incoming.stride(0), of_upstream)
    if rows:
        with on_device(direction):
            grid = (triton.cdiv(rows, tile.rows), triton.cdiv(size, tile.columns))
            tensors = (incoming, upstream, coefficient.contiguous(), direction, gradient)
            _backward[grid](*tensors, rows, *strides, D=size, K=len(direction), **tile.options())
    return gradient
