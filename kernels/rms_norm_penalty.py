"""RMSNorm that gives the projection penalty on the way: no [N, D] traffic beyond the norm's own reads and writes.

For ``h [N, D]``, the norm's weight ``v [D]`` (with the offset added), directions ``r [K, D]``, anchors ``a [N, K]`` and
token weights ``w [N]``::

    forward   s_t = 1 / sqrt(mean_d h_td^2 + eps)    n = s h    y = n v
              z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  m = g_y v    dh_t = s_t (m_t - n_t mean_d(m_t n_t)) + g sum_k c_tk r_k    dv = sum_t g_y[t] n_t

phi "absolute" is a parabola up to ``rounding |h_t| |r_k|``, and straight beyond.

Casting ``"llama"`` rounds n to the dtype of h before it meets the weight; ``"gemma"`` rounds the product. The gradients
are those of the norm without the rounding.

Bytes moved, with U = N * D * itemsize: forward 2U + 4N, backward 3U + 4N, as without the constraint, which adds
4N(2K + 2) bytes forward and 4NK backward: 20 bytes per row for one direction. In the forward r and v stay in cache; all
sums of a row, of squares and of projections, cross the threads together. The backward streams: as many programs as fill
the GPU take one row after the other, which is copied to shared memory while the rows before it are worked on, and keep
v, r and the sum for the weight's gradient in registers. Those float32 sums are then added up in a fixed order.

Accumulation is in float32, or float64 for float64 hidden states.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and names bound under compile-time conditions.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import FP_FUSION, SUM_TILE, SUMMED_BYTES, forward_tile, on_device, row_stream, target_of
from .penalty import value_and_slope
from .sums import row_sums


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
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    dtype = inverse_rms.dtype.element_ty
    # A row offset passes 2^31 elements long before memory runs out.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    # Of two dimensions from the start: what is the same for all rows is then loaded as the threads hold a row.
    column = tl.arange(0, COLUMNS)[None, :]
    real = column < D
    inside = row < N
    patch = inside[:, None] & real
    h = tl.load(hidden + row[:, None] * hidden_stride + column, mask=patch, other=0).to(dtype)
    terms = (h * h,)
    if direction is not None:
        for k in tl.static_range(K):
            r = tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")
            terms += (h * r,)
    sums = row_sums(terms)
    s = 1 / tl.sqrt(sums[0] / D + EPS)
    tl.store(inverse_rms + row, s, mask=inside)
    v = tl.load(norm_weight + column, mask=real, other=0, eviction_policy="evict_last").to(dtype) + OFFSET
    n = h * s[:, None]
    if CASTING == "llama":
        n = n.to(hidden.dtype.element_ty).to(dtype)
    tl.store(normed + row[:, None] * D + column, (n * v).to(normed.dtype.element_ty), mask=patch)
    if direction is not None:
        live = inside
        if weight is not None:
            w = tl.load(weight + row * weight_stride, mask=inside, other=0)
            live = inside & (w != 0)
        total = tl.zeros([ROWS], dtype)
        reach = total
        for k in tl.static_range(K):
            e = sums[k + 1]
            if anchor is not None:
                e -= tl.load(anchor + row * anchor_stride + k * anchor_step, mask=live, other=0)
            if PENALTY == "absolute" and ROUNDING > 0:
                r = tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")
                reach = ROUNDING * tl.sqrt(sums[0] * tl.sum(r * r, axis=1))
            # Selected, not multiplied: a dead row may hold NaN.
            value, slope = value_and_slope(tl.where(live, e, 0), tl.where(live, reach, 0), PENALTY)
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
    COLUMNS: tl.constexpr,
    HELD: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``gradient [N, D]`` and ``partial [programs, D]``, a sum over a program's rows; None if not wanted.

    A program takes a row at a time. While it works on one, the next ones are copied to shared memory.
    """
    dtype = inverse_rms.dtype.element_ty
    column = tl.arange(0, COLUMNS)[None, :]
    real = column < D
    if gradient is not None and HELD:
        v = tl.load(norm_weight + column, mask=real, other=0).to(dtype) + OFFSET
    if upstream is not None:
        g = tl.load(upstream)
        kept = ()
        for k in tl.static_range(K if KEPT else 0):
            kept += (tl.load(direction + k * D + column, mask=real, other=0),)
    if partial is not None:
        total = tl.zeros([1, COLUMNS], dtype)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(row, tl.int64)
        h_at = hidden + row * hidden_stride + column
        g_at = incoming + row * incoming_stride + column
        h = tl.load(h_at, mask=real, other=0).to(dtype)
        arrived = tl.load(g_at, mask=real, other=0).to(dtype)
        s = tl.load(inverse_rms + row)
        if gradient is not None:
            if not HELD:
                v = tl.load(norm_weight + column, mask=real, other=0, eviction_policy="evict_last").to(dtype) + OFFSET
            mean = tl.sum(arrived * v * h, axis=1, keep_dims=True) * s / D
            if not HELD:
                # Other cache modifiers than above: the compiler would merge the reads and hold the row after all.
                h = tl.load(h_at, mask=real, other=0, cache_modifier=".ca").to(dtype)
                arrived = tl.load(g_at, mask=real, other=0, cache_modifier=".ca").to(dtype)
                v = tl.load(norm_weight + column, mask=real, other=0, cache_modifier=".ca").to(dtype) + OFFSET
        n = h * s
        if partial is not None:
            total += arrived * n
        if gradient is not None:
            dh = s * (arrived * v - n * mean)
            if upstream is not None:
                for k in tl.static_range(K):
                    if KEPT:
                        r = kept[k]
                    else:
                        r = tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")
                    dh += g * tl.load(coefficient + row * K + k) * r
            tl.store(gradient + row * D + column, dh.to(gradient.dtype.element_ty), mask=real)
    if partial is not None:
        tl.store(partial + tl.program_id(0) * D + column, total, mask=real)


@triton.jit(do_not_specialize=["COUNT"])
def _finish(partial, gradient, COUNT, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Columns of ``gradient [D]``: the sums of ``partial [COUNT, D]``, in an order that only COUNT decides."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = column < D
    total = tl.zeros([ROWS, COLUMNS], partial.dtype.element_ty)
    for first in range(0, COUNT, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        total += tl.load(partial + row * D + column, mask=(row < COUNT) & real, other=0)
    result = tl.sum(total, axis=0, keep_dims=True)
    if gradient.dtype.element_ty == tl.bfloat16:
        result = result.to(tl.float32)  # Triton's interpreter makes other numbers of float64
    tl.store(gradient + column, result.to(gradient.dtype.element_ty), mask=real)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of ``hidden [N, D]`` and, when there is a ``direction [K, D]``, the penalty on the way.

    ``rounding`` is the share of ``|h| |r|`` that may be rounding: there "absolute" is a parabola.

    Returns the normed states ``[N, D]`` and, in the dtype of the computation, the inverse RMS ``[N]``, the penalty of
    each token ``[N]`` and the coefficient ``c [N, K]``; the last two are empty without a direction.
    """
    rows, size = hidden.shape
    norm_weight = norm_weight.contiguous()
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    normed_dtype = hidden.dtype if casting == "gemma" else torch.promote_types(hidden.dtype, norm_weight.dtype)
    normed = torch.empty((rows, size), dtype=normed_dtype, device=hidden.device)
    inverse_rms = torch.empty(rows, dtype=computed, device=hidden.device)
    directions = 0 if direction is None else len(direction)
    token_penalty = torch.empty(rows if directions else 0, dtype=computed, device=hidden.device)
    coefficient = torch.empty((rows, directions), dtype=computed, device=hidden.device)
    tile = forward_tile(size, hidden.element_size(), directions, target_of(hidden))
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
                D=size,
                K=directions,
                ROWS=tile.rows,
                COLUMNS=tile.columns,
                num_warps=tile.warps,  # pyright: ignore[reportCallIssue]  # a launch option
                enable_fp_fusion=FP_FUSION,  # pyright: ignore[reportCallIssue]
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
    norm_weight = norm_weight.contiguous()
    target = target_of(hidden)
    directions = 0 if upstream is None else coefficient.shape[1]
    stream = row_stream(size, hidden.element_size(), directions, target)
    grid = min(rows, stream.programs * target.multiprocessors)
    gradient = torch.empty((rows, size), dtype=hidden.dtype, device=hidden.device)
    if not needs_weight:
        for_weight = norm_weight.new_empty(0)
    elif rows:
        for_weight = torch.empty_like(norm_weight)
    else:
        for_weight = torch.zeros_like(norm_weight)
    partial = torch.empty((grid, size), dtype=inverse_rms.dtype, device=hidden.device) if needs_weight else None

    def launch(gradient: Tensor | None, partial: Tensor | None) -> None:
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
            K=directions,
            COLUMNS=stream.columns,
            HELD=stream.held,
            KEPT=stream.kept,
            STAGES=stream.stages,
            num_warps=stream.warps,  # pyright: ignore[reportCallIssue]  # a launch option
            enable_fp_fusion=FP_FUSION,  # pyright: ignore[reportCallIssue]
        )

    if rows:
        with on_device(hidden):
            if partial is None or stream.held or stream.columns * hidden.element_size() <= SUMMED_BYTES:
                launch(gradient, partial)
            else:
                # The sums of a long row fill the registers by themselves.
                launch(gradient, None)
                launch(None, partial)
            if partial is not None:
                _finish[(triton.cdiv(size, SUM_TILE.columns),)](
                    partial,
                    for_weight,
                    grid,
                    D=size,
                    ROWS=SUM_TILE.rows,
                    COLUMNS=SUM_TILE.columns,
                    num_warps=SUM_TILE.warps,  # pyright: ignore[reportCallIssue]  # a launch option
                    enable_fp_fusion=FP_FUSION,  # pyright: ignore[reportCallIssue]
                )
    return gradient, for_weight
