"""RMSNorm that gives the projection penalty on the way: no [N, D] traffic beyond the norm's own reads and writes.

For ``h [N, D]``, the norm's weight ``v [D]`` (with the offset added), directions ``r [K, D]``, anchors ``a [N, K]`` and
token weights ``w [N]``::

    forward   s_t = 1 / sqrt(mean_d h_td^2 + eps)    n = s h    y = n v
              z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  m = g_y v    dh_t = s_t (m_t - n_t mean_d(m_t n_t)) + g sum_k c_tk r_k    dv = sum_t g_y[t] n_t

phi "absolute" is a parabola up to ``rounding |h_t| |r_k|``, and straight beyond. Sides "fall" takes phi(min(e, 0)).

Casting ``"llama"`` rounds n to the dtype of h before it meets the weight; ``"gemma"`` rounds the product. The gradients
are those of the norm without the rounding.

Bytes moved, with U = N * D * itemsize: forward 2U + 4N, backward 3U + 4N, as without the constraint, which adds
4N(2K + 2) bytes forward and 4NK backward: 20 bytes per row for one direction. r and v stay in cache. For the weight's
gradient each program keeps a float32 sum of its rows and writes it once, and the sums are added up in a fixed order.

Accumulation is in float32, or float64 for float64 hidden states.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and names bound under compile-time conditions.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import HELD_COLUMNS, on_device, programs, row_tile, target_of
from .penalty import value_and_slope


# N changes from batch to batch and must not cause a recompilation.
@triton.jit(do_not_specialize=["N"])
def _forward(
    hidden,
    norm_weight,
    direction,
    anchor,
    weight,
    normed,
    inverse_rms,
    token_penalty,
    coefficient,
    N,
    hidden_stride,
    anchor_stride,
    anchor_step,
    weight_stride,
    EPS: tl.constexpr,
    OFFSET: tl.constexpr,
    CASTING: tl.constexpr,
    PENALTY: tl.constexpr,
    ROUNDING: tl.constexpr,
    SIDES: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype = inverse_rms.dtype.element_ty
    # A row offset passes 2^31 elements long before memory runs out.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = row < N
    patch = inside[:, None] & (column < D)[None, :]
    h = tl.load(hidden + row[:, None] * hidden_stride + column[None, :], mask=patch, other=0).to(dtype)
    square = tl.sum(h * h, axis=1)
    s = 1 / tl.sqrt(square / D + EPS)
    tl.store(inverse_rms + row, s, mask=inside)
    v = tl.load(norm_weight + column, mask=column < D, other=0, eviction_policy="evict_last").to(dtype) + OFFSET
    n = h * s[:, None]
    if CASTING == "llama":
        n = n.to(hidden.dtype.element_ty).to(dtype)
    y = n * v[None, :]
    tl.store(normed + row[:, None] * D + column[None, :], y.to(normed.dtype.element_ty), mask=patch)
    if direction is not None:
        live = inside
        if weight is not None:
            w = tl.load(weight + row * weight_stride, mask=inside, other=0)
            live = inside & (w != 0)
        total = tl.zeros([ROWS], dtype)
        reach = total
        for k in tl.static_range(K):
            r = tl.load(direction + k * D + column, mask=column < D, other=0, eviction_policy="evict_last")
            e = tl.sum(h * r[None, :], axis=1)
            if anchor is not None:
                e -= tl.load(anchor + row * anchor_stride + k * anchor_step, mask=live, other=0)
            if PENALTY == "absolute" and ROUNDING > 0:
                reach = ROUNDING * tl.sqrt(square * tl.sum(r * r, axis=0))
            # Selected, not multiplied: a dead row may hold NaN.
            value, slope = value_and_slope(tl.where(live, e, 0), tl.where(live, reach, 0), PENALTY, SIDES)
            total += value
            if weight is not None:
                slope *= w
            tl.store(coefficient + row * K + k, slope, mask=inside)
        if weight is not None:
            total *= w
        tl.store(token_penalty + row, total, mask=inside)


@triton.jit(do_not_specialize=["N"])
def _backward(
    incoming,
    upstream,
    hidden,
    norm_weight,
    inverse_rms,
    coefficient,
    direction,
    gradient,
    partial,
    N,
    incoming_stride,
    hidden_stride,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    HELD: tl.constexpr,
):
    """``gradient [N, D]`` and ``partial [programs, D]``, a sum over a program's rows; None if not wanted."""
    dtype = inverse_rms.dtype.element_ty
    column = tl.arange(0, COLUMNS)
    if partial is not None:
        total = tl.zeros([COLUMNS], dtype)
    if upstream is not None:
        g = tl.load(upstream)
    for tile in range(tl.program_id(0), tl.cdiv(N, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = row < N
        patch = inside[:, None] & (column < D)[None, :]
        h_at = hidden + row[:, None] * hidden_stride + column[None, :]
        g_at = incoming + row[:, None] * incoming_stride + column[None, :]
        s = tl.load(inverse_rms + row, mask=inside, other=0)
        h = tl.load(h_at, mask=patch, other=0).to(dtype)
        arrived = tl.load(g_at, mask=patch, other=0).to(dtype)
        if gradient is not None:
            v = tl.load(norm_weight + column, mask=column < D, other=0, eviction_policy="evict_last").to(dtype) + OFFSET
            mean = tl.sum(arrived * v[None, :] * h, axis=1) * s / D
            if not HELD:
                # Other cache modifiers than above: the compiler would merge the reads and hold the row after all.
                h = tl.load(h_at, mask=patch, other=0, cache_modifier=".ca").to(dtype)
                arrived = tl.load(g_at, mask=patch, other=0, cache_modifier=".ca").to(dtype)
                v = tl.load(norm_weight + column, mask=column < D, other=0, cache_modifier=".ca").to(dtype) + OFFSET
        n = h * s[:, None]
        if partial is not None:
            total += tl.sum(arrived * n, axis=0)
        if gradient is not None:
            dh = s[:, None] * (arrived * v[None, :] - n * mean[:, None])
            if upstream is not None:
                for k in tl.static_range(K):
                    c = g * tl.load(coefficient + row * K + k, mask=inside, other=0)
                    r = tl.load(direction + k * D + column, mask=column < D, other=0, eviction_policy="evict_last")
                    dh += c[:, None] * r[None, :]
            tl.store(gradient + row[:, None] * D + column[None, :], dh.to(gradient.dtype.element_ty), mask=patch)
    if partial is not None:
        tl.store(partial + tl.program_id(0) * D + column, total, mask=column < D)


def rms_norm_penalize(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    casting: str,
    offset: float,
    direction: Tensor | None,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float = 0.0,
    sides: str = "both",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of ``hidden [N, D]`` and, when there is a ``direction [K, D]``, the penalty on the way.

    ``rounding`` is the share of ``|h| |r|`` that may be rounding: there "absolute" is a parabola. On the ``sides``
    "fall" a projection above its anchor costs nothing.

    Returns the normed states ``[N, D]`` and, in the dtype of the computation, the inverse RMS ``[N]``, the penalty of
    each token ``[N]`` and the coefficient ``c [N, K]``; the last two are empty without a direction.
    """
    rows, size = hidden.shape
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    normed_dtype = hidden.dtype if casting == "gemma" else torch.promote_types(hidden.dtype, norm_weight.dtype)
    normed = torch.empty((rows, size), dtype=normed_dtype, device=hidden.device)
    inverse_rms = torch.empty(rows, dtype=computed, device=hidden.device)
    directions = 0 if direction is None else len(direction)
    token_penalty = torch.empty(rows if directions else 0, dtype=computed, device=hidden.device)
    coefficient = torch.empty((rows, directions), dtype=computed, device=hidden.device)
    tile = row_tile("forward", size, hidden.element_size(), target_of(hidden))
    anchor_stride, anchor_step = (0, 0) if anchor is None else anchor.stride()
    if rows:
        with on_device(hidden):
            _forward[(triton.cdiv(rows, tile.rows),)](
                hidden,
                norm_weight,
                direction,
                anchor,
                weight,
                normed,
                inverse_rms,
                token_penalty,
                coefficient,
                rows,
                hidden.stride(0),
                anchor_stride,
                anchor_step,
                0 if weight is None else weight.stride(0),
                EPS=eps,
                OFFSET=offset,
                CASTING=casting,
                PENALTY=penalty,
                ROUNDING=rounding,
                SIDES=sides,
                D=size,
                K=directions,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]  # a launch option
            )
    return normed, inverse_rms, token_penalty, coefficient


def rms_norm_gradient(
    incoming: Tensor,
    upstream: Tensor | None,
    hidden: Tensor,
    norm_weight: Tensor,
    inverse_rms: Tensor,
    coefficient: Tensor,
    direction: Tensor | None,
    offset: float,
    needs_weight: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients for ``hidden [N, D]`` and for ``norm_weight [D]`` (empty if not needed), each rounded once.

    ``incoming [N, D]`` is the gradient that arrives for the normed states, ``upstream`` (one number) that of the
    penalty; None stands for 0.
    """
    rows, size = hidden.shape
    target = target_of(hidden)
    tile = row_tile("norm_backward", size, hidden.element_size(), target)
    held = tile.columns <= HELD_COLUMNS
    gradient = torch.empty((rows, size), dtype=hidden.dtype, device=hidden.device)
    tiles = triton.cdiv(rows, tile.rows)
    sums = programs(tiles, target)
    partial = torch.empty((sums, size), dtype=inverse_rms.dtype, device=hidden.device) if needs_weight else None

    def launch(grid: int, gradient: Tensor | None, partial: Tensor | None) -> None:
        _backward[(grid,)](
            incoming,
            upstream,
            hidden,
            norm_weight,
            inverse_rms,
            coefficient,
            direction,
            gradient,
            partial,
            rows,
            incoming.stride(0),
            hidden.stride(0),
            OFFSET=offset,
            D=size,
            K=0 if upstream is None else coefficient.shape[1],
            ROWS=tile.rows,
            COLUMNS=tile.columns,
            HELD=held,
            num_warps=tile.warps,  # pyright: ignore[reportCallIssue]  # a launch option
        )

    if rows:
        with on_device(hidden):
            if partial is None:
                launch(tiles, gradient, None)
            elif held or hidden.element_size() == 2:
                launch(sums, gradient, partial)
            else:
                # The sums of a long row in four bytes fill the registers by themselves.
                launch(tiles, gradient, None)
                launch(sums, None, partial)
    return gradient, norm_weight.new_empty(0) if partial is None else partial.sum(0).to(norm_weight.dtype)
