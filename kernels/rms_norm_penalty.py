"""RMSNorm that gives the projection penalty on the way: no [N, D] traffic beyond the norm's own reads and writes.

For ``h [N, D]``, the norm's weight ``v [D]`` (with the offset added), directions ``r [K, D]``, anchors ``a [N, K]`` and
token weights ``w [N]``::

    forward   s_t = 1 / sqrt(mean_d h_td^2 + eps)    n = s h    y = n v
              z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  m = g_y v    dh_t = s_t (m_t - n_t mean_d(m_t n_t)) + g sum_k c_tk r_k    dv = sum_t g_y[t] n_t

With ``reach [K]``, phi "absolute" is a parabola up to ``|h_t| reach_k``, and straight beyond.

Casting ``"llama"`` rounds n to the dtype of h before it meets the weight; ``"gemma"`` rounds the product. The gradients
are those of the norm without the rounding.

Bytes moved, with U = N * D * itemsize: forward 2U + 4N, backward 3U + 4N, as without the constraint, which adds
4N(2K + 2) bytes forward and 4NK backward. The backward streams: rows are copied ahead while others are worked on.

Accumulation is in float32, or float64 for float64 hidden states.
"""

# What @triton.jit compiles is not what Python would run: unrolled loops, and names bound under compile-time conditions.
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportOperatorIssue=false
# pyright: reportArgumentType=false, reportAssignmentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import forward_rows, on_device, row_stream, sum_splits, sum_tile, summing_programs, target_of
from .penalty import penalize_row
from .rows import load_piece, load_row, of_threads, row_sums, store_piece


# N changes from batch to batch and must not cause a recompilation.
@triton.jit(do_not_specialize=["N"])
def _forward(
    hidden,
    norm_weight,
    direction,
    anchor,
    weight,
    reach,
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
    D: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    THREADS: tl.constexpr,
    PIECES: tl.constexpr,
):
    dtype = inverse_rms.dtype.element_ty
    # A row offset passes 2^31 elements long before memory runs out.
    first = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, 1)
    h = ()
    for j in tl.static_range(ROWS):
        row = first + j
        live = row < N if ROWS > 1 else None
        h += (load_row(hidden + (row * hidden_stride)[:, None, None], live, dtype, D, THREADS, PIECES, ""),)
    terms = ()
    for j in tl.static_range(ROWS):
        terms += (of_threads(h[j], h[j]),)
    if direction is not None:
        for k in tl.static_range(K):
            r = load_row(direction + k * D, None, dtype, D, THREADS, PIECES, "evict_last")
            for j in tl.static_range(ROWS):
                terms += (of_threads(h[j], r),)
    sums = row_sums(terms)
    v = load_row(norm_weight, None, dtype, D, THREADS, PIECES, "evict_last")
    for j in tl.static_range(ROWS):
        row = first + j
        inside = row < N
        s = 1 / tl.sqrt(sums[j] / D + EPS)
        tl.store(inverse_rms + row, s, mask=inside)
        live = inside if ROWS > 1 else None
        for i in tl.static_range(len(PIECES)):
            n = h[j][i] * s[:, None, None]
            if CASTING == "llama":
                n = n.to(hidden.dtype.element_ty).to(dtype)
            store_piece(
                normed + (row * D)[:, None, None], n * (v[i] + OFFSET), live, D, THREADS, PIECES[i][0], PIECES[i][1]
            )
        if direction is not None:
            z = ()
            for k in tl.static_range(K):
                z += (sums[ROWS + k * ROWS + j],)
            w = tl.load(weight + row * weight_stride, mask=inside, other=0) if weight is not None else None
            penalize_row(
                z, sums[j], w, row, N, anchor, anchor_stride, anchor_step, reach, token_penalty, coefficient, K, PENALTY
            )


@triton.jit(do_not_specialize=["N", "TURNS"])
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
    TURNS,
    incoming_stride,
    hidden_stride,
    OFFSET: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    THREADS: tl.constexpr,
    PIECES: tl.constexpr,
    ROWS: tl.constexpr,
    HELD: tl.constexpr,
    KEPT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``gradient [N, D]`` and, if wanted, ``partial [programs, D]``, a sum over a program's rows for the weight."""
    dtype = inverse_rms.dtype.element_ty
    # Beside several rows and the sum of what the weight gets, there are no registers for it.
    stays: tl.constexpr = HELD and (ROWS == 1 or partial is None)
    if stays:
        v = load_row(norm_weight, None, dtype, D, THREADS, PIECES, "")
    if upstream is not None:
        g = tl.load(upstream)
        kept = ()
        for k in tl.static_range(K if KEPT else 0):
            kept += (load_row(direction + k * D, None, dtype, D, THREADS, PIECES, ""),)
    if partial is not None:
        total = ()
        for i in tl.static_range(len(PIECES)):
            total += (tl.zeros([1, THREADS, PIECES[i][1]], dtype),)
    for turn in tl.range(tl.program_id(0), TURNS, tl.num_programs(0), num_stages=STAGES):
        first = tl.cast(turn, tl.int64) * ROWS
        if not stays:
            v = load_row(norm_weight, None, dtype, D, THREADS, PIECES, "evict_last")
        h = ()
        arrived = ()
        s = ()
        factors = ()  # of the directions, by row
        terms = ()
        for j in tl.static_range(ROWS):
            row = first + j
            live = row + tl.arange(0, 1) < N if ROWS > 1 else None
            h += (load_row(hidden + row * hidden_stride, live, dtype, D, THREADS, PIECES, ""),)
            arrived += (load_row(incoming + row * incoming_stride, live, dtype, D, THREADS, PIECES, ""),)
            s += (tl.load(inverse_rms + row, mask=row < N, other=0),)
            m = ()
            for i in tl.static_range(len(PIECES)):
                m += (arrived[j][i] * (v[i] + OFFSET),)
            terms += (of_threads(m, h[j]),)
            of_row = ()
            if upstream is not None:
                for k in tl.static_range(K):
                    of_row += (g * tl.load(coefficient + row * K + k, mask=row < N, other=0),)
            factors += (of_row,)
        sums = row_sums(terms)
        if not HELD:
            # Other cache modifiers than above: the compiler would merge the reads and hold the row after all.
            h = (load_row(hidden + first * hidden_stride, None, dtype, D, THREADS, PIECES, ".ca"),)
            arrived = (load_row(incoming + first * incoming_stride, None, dtype, D, THREADS, PIECES, ".ca"),)
        summed = ()
        for i in tl.static_range(len(PIECES)):
            dh = ()
            u = v[i] if stays else load_piece(norm_weight, None, dtype, D, THREADS, PIECES[i][0], PIECES[i][1], ".ca")
            if partial is not None:
                sum_of_rows = total[i]
            for j in tl.static_range(ROWS):
                n = h[j][i] * s[j]
                if partial is not None:
                    sum_of_rows += arrived[j][i] * n
                mean = sums[j][:, None, None] * s[j] / D
                dh += (s[j] * (arrived[j][i] * (u + OFFSET) - n * mean),)
            if partial is not None:
                summed += (sum_of_rows,)
            if upstream is not None:
                for k in tl.static_range(K):
                    if KEPT:
                        r = kept[k][i]
                    else:
                        r = load_piece(
                            direction + k * D, None, dtype, D, THREADS, PIECES[i][0], PIECES[i][1], "evict_last"
                        )
                    added = ()
                    for j in tl.static_range(ROWS):
                        added += (dh[j] + factors[j][k] * r,)
                    dh = added
            for j in tl.static_range(ROWS):
                live = first + j + tl.arange(0, 1) < N if ROWS > 1 else None
                store_piece(gradient + (first + j) * D, dh[j], live, D, THREADS, PIECES[i][0], PIECES[i][1])
        if partial is not None:
            total = summed
    if partial is not None:
        for i in tl.static_range(len(PIECES)):
            store_piece(partial + tl.program_id(0) * D, total[i], None, D, THREADS, PIECES[i][0], PIECES[i][1])


@triton.jit(do_not_specialize=["N", "TURNS"])
def _sum_over_rows(
    rows,
    hidden,
    inverse_rms,
    sums,
    N,
    TURNS,
    rows_stride,
    hidden_stride,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """``sums [splits, D]`` of ``rows [N, D]``, or of their products with the normalised ``hidden``.

    A program takes a few columns of each ``splits``-th tile of rows, in an order that only N and the grid decide.
    """
    dtype = rows.dtype.element_ty if inverse_rms is None else inverse_rms.dtype.element_ty
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    real = column < D
    total = tl.zeros([ROWS, COLUMNS], dtype)
    for turn in tl.range(tl.program_id(1), TURNS, tl.num_programs(1), num_stages=4):
        row = tl.cast(turn, tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        patch = (row < N) & real
        x = tl.load(rows + row * rows_stride + column, mask=patch, other=0).to(dtype)
        if hidden is not None:
            h = tl.load(hidden + row * hidden_stride + column, mask=patch, other=0).to(dtype)
            x *= h * tl.load(inverse_rms + row, mask=row < N, other=0)
        total += x
    result = tl.sum(total, axis=0, keep_dims=True)
    if sums.dtype.element_ty == tl.bfloat16:
        result = result.to(tl.float32)  # Triton's interpreter makes other numbers of float64
    tl.store(sums + tl.program_id(1) * D + column, result.to(sums.dtype.element_ty), mask=real)


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
    reach: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm of ``hidden [N, D]`` and, when there is a ``direction [K, D]``, the penalty on the way.

    ``reach [K]`` is ``|r|`` times the share of ``|h| |r|`` that may be rounding: there "absolute" is a parabola.

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
    taken = forward_rows(size, hidden.element_size(), directions, target_of(hidden))
    tensors = (hidden, norm_weight, direction, anchor, weight, reach if penalty == "absolute" else None)
    results = (normed, inverse_rms, token_penalty, coefficient)
    strides = (*((0, 0) if anchor is None else anchor.stride()), 0 if weight is None else weight.stride(0))
    rule = {"EPS": eps, "OFFSET": offset, "CASTING": casting, "PENALTY": penalty, "D": size, "K": directions}
    if rows:
        with on_device(hidden):
            grid = (triton.cdiv(rows, taken.rows),)
            _forward[grid](*tensors, *results, rows, hidden.stride(0), *strides, **rule, **taken.options())
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
    itemsize = hidden.element_size()
    stream = row_stream(size, itemsize, directions, target)
    gradient = torch.empty((rows, size), dtype=hidden.dtype, device=hidden.device)
    for_weight = torch.empty_like(norm_weight) if needs_weight else norm_weight.new_empty(0)
    if not rows:
        return gradient, for_weight.zero_()
    summing = summing_programs(rows, size, itemsize, stream, target) if needs_weight else 0
    grid = summing or stream.programs_for(rows, target)
    partial = torch.empty((grid, size), dtype=inverse_rms.dtype, device=hidden.device) if summing else None
    tensors = (incoming, upstream, hidden, norm_weight, inverse_rms, coefficient, direction, gradient, partial)
    how = {"HELD": stream.held, "KEPT": stream.kept, "STAGES": stream.stages, **stream.taken.options()}
    with on_device(hidden):
        strides = (triton.cdiv(rows, stream.taken.rows), incoming.stride(0), hidden.stride(0))
        _backward[(grid,)](*tensors, rows, *strides, OFFSET=offset, D=size, K=directions, **how)
        if needs_weight:
            sum_for_weight(incoming, hidden, inverse_rms, partial, for_weight)
    return gradient, for_weight


def sum_for_weight(
    incoming: Tensor, hidden: Tensor, inverse_rms: Tensor, partial: Tensor | None, result: Tensor
) -> None:
    """Write the gradient of the norm's weight to ``result [D]``: from ``partial [programs, D]``, if there is one."""
    size = hidden.shape[1]
    target = target_of(hidden)
    tile = sum_tile(size, target)

    def launch(rows: Tensor, given: Tensor | None, sums: Tensor) -> None:
        grid = (triton.cdiv(size, tile.columns), len(sums))
        strides = (triton.cdiv(len(rows), tile.rows), rows.stride(0), 0 if given is None else given.stride(0))
        s = None if given is None else inverse_rms
        _sum_over_rows[grid](rows, given, s, sums, len(rows), *strides, D=size, **tile.options())

    if partial is None:
        splits = sum_splits(len(hidden), size, tile, target)
        if splits == 1:
            launch(incoming, hidden, result.unsqueeze(0))
            return
        partial = torch.empty((splits, size), dtype=inverse_rms.dtype, device=hidden.device)
        launch(incoming, hidden, partial)
    launch(partial, None, result.unsqueeze(0))
