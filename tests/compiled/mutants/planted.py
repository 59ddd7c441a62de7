"""Faults for the kernels: a piece of a file, and what is written in its place."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    file: str
    what: str
    #: Stands in the file as often as ``times`` says; the one of number ``which`` is replaced.
    old: str
    new: str
    which: int = 0
    times: int = 1


def _in(file: str, *faults: tuple) -> tuple[Fault, ...]:
    return tuple(Fault(file, *fault) for fault in faults)


_LOADED_R = 'tl.load(direction + k * D + column, mask=real, other=0, eviction_policy="evict_last")'

NORM = _in(
    "rms_norm_penalty.py",
    # Forward.
    ("rows begin one later", "* ROWS + tl.arange(0, ROWS)", "* ROWS + 1 + tl.arange(0, ROWS)"),
    ("a row too many", "inside = row < N", "inside = row <= N"),
    ("a column too many, forward", "real = column < D", "real = column <= D", 0, 3),
    ("rows without a mask", "patch = inside[:, None] & real", "patch = (row[:, None] >= 0) & real"),
    ("columns without a mask", "patch = inside[:, None] & real", "patch = inside[:, None] & (column >= 0)"),
    ("the stride of the states is D", "row[:, None] * hidden_stride", "row[:, None] * D"),
    ("the sum of squares is a sum of lengths", "terms = (h * h,)", "terms = (tl.abs(h),)"),
    ("all directions are the first", f"r = {_LOADED_R}", f"r = {_LOADED_R.replace('k * D + ', '')}", 0, 3),
    ("a direction without a mask", f"r = {_LOADED_R}", "r = tl.load(direction + k * D + column)", 0, 3),
    ("projections summed in bfloat16", "terms += (h * r,)", "terms += ((h * r).to(tl.bfloat16).to(dtype),)"),
    ("the mean over the columns of the tile", "sums[0] / D + EPS", "sums[0] / COLUMNS + EPS"),
    ("no eps", "sums[0] / D + EPS", "sums[0] / D"),
    ("eps outside the root", "tl.sqrt(sums[0] / D + EPS)", "(tl.sqrt(sums[0] / D) + EPS)"),
    (
        "inverse RMS stored without a mask",
        "tl.store(inverse_rms + row, s, mask=inside)",
        "tl.store(inverse_rms + row, s)",
    ),
    ("no offset, forward", ".to(dtype) + OFFSET\n    n = h", ".to(dtype)\n    n = h"),
    ("no weight, forward", "(n * v).to", "(n + 0 * v).to"),
    ("llama is not rounded between", 'if CASTING == "llama":', 'if CASTING == "none":'),
    ("gemma is rounded between", 'if CASTING == "llama":', 'if CASTING != "none":'),
    (
        "normed states with the stride of the states",
        "normed + row[:, None] * D",
        "normed + row[:, None] * hidden_stride",
    ),
    (
        "normed states stored without a mask of rows",
        "(normed.dtype.element_ty), mask=patch",
        "(normed.dtype.element_ty), mask=real",
    ),
    ("rows of weight 0 count", "live = inside & (w != 0)", "live = inside"),
    ("the stride of the weights is 1", "weight + row * weight_stride", "weight + row"),
    ("the weight of the first row", "weight + row * weight_stride", "weight + 0 * row"),
    ("anchors as if they lay side by side", "row * anchor_stride + k * anchor_step", "row * K + k"),
    ("the anchor of the first direction", "row * anchor_stride + k * anchor_step", "row * anchor_stride"),
    ("anchors without a mask", "k * anchor_step, mask=live, other=0)", "k * anchor_step)"),
    ("anchors are added", "e -= tl.load(anchor", "e += tl.load(anchor"),
    ("projections moved by one", "e = sums[k + 1]", "e = sums[k]"),
    ("the rounding of whole states", "reach = ROUNDING * tl.sqrt(", "reach = tl.sqrt("),
    (
        "reach without its root",
        "ROUNDING * tl.sqrt(sums[0] * tl.sum(r * r, axis=1))",
        "ROUNDING * (sums[0] * tl.sum(r * r, axis=1))",
    ),
    ("dead rows are not selected", "value_and_slope(tl.where(live, e, 0), tl", "value_and_slope(e, tl"),
    ("the last direction alone", "total += value", "total = value"),
    ("coefficients without a weight", "slope *= w", "slope *= 1"),
    ("penalties without a weight", "total *= w", "total *= 1"),
    ("coefficients of another row", "coefficient + row * K + k, slope", "coefficient + row + k * N, slope"),
    ("coefficients stored without a mask", "k, slope, mask=inside)", "k, slope)"),
    (
        "penalties stored without a mask",
        "tl.store(token_penalty + row, total, mask=inside)",
        "tl.store(token_penalty + row, total)",
    ),
    # Backward.
    ("a column too many, backward", "real = column < D", "real = column <= D", 1, 3),
    ("no offset, backward", "other=0).to(dtype) + OFFSET", "other=0).to(dtype)"),
    (
        "the weight without a mask",
        "v = tl.load(norm_weight + column, mask=real, other=0).to",
        "v = tl.load(norm_weight + column).to",
    ),
    (
        "what stays is the first direction",
        "(tl.load(direction + k * D + column, mask=real, other=0),)",
        "(tl.load(direction + column, mask=real, other=0),)",
    ),
    (
        "what stays has no mask",
        "(tl.load(direction + k * D + column, mask=real, other=0),)",
        "(tl.load(direction + k * D + column),)",
    ),
    ("the last row is left out", "tl.range(tl.program_id(0), N, tl.num", "tl.range(tl.program_id(0), N - 1, tl.num"),
    ("the first row is left out", "tl.range(tl.program_id(0), N, tl.num", "tl.range(tl.program_id(0) + 1, N, tl.num"),
    ("rows are skipped", "tl.num_programs(0), num_stages", "tl.num_programs(0) + 1, num_stages"),
    ("programs take each other's rows", "N, tl.num_programs(0), num_stages", "N, 1, num_stages"),
    ("the stride of the states is D, backward", "hidden + row * hidden_stride", "hidden + row * D"),
    ("the stride of the gradient is D", "incoming + row * incoming_stride", "incoming + row * D"),
    ("states without a mask", "h = tl.load(h_at, mask=real, other=0).to", "h = tl.load(h_at).to"),
    ("gradient without a mask", "arrived = tl.load(g_at, mask=real, other=0).to", "arrived = tl.load(g_at).to"),
    ("the inverse RMS of the first row", "tl.load(inverse_rms + row)", "tl.load(inverse_rms)"),
    ("the mean over the columns of the tile, backward", "* s / D", "* s / COLUMNS"),
    (
        "the mean without the weight",
        "tl.sum(arrived * v * h, axis=1, keep_dims=True)",
        "tl.sum(arrived * h, axis=1, keep_dims=True)",
    ),
    ("the mean without the inverse RMS", "keep_dims=True) * s / D", "keep_dims=True) / D"),
    (
        "the mean in bfloat16",
        "tl.sum(arrived * v * h, axis=1, keep_dims=True)",
        "tl.sum((arrived * v * h).to(tl.bfloat16).to(dtype), axis=1, keep_dims=True)",
    ),
    ("the weight's gradient of plain states", "n = h * s\n", "n = h\n"),
    ("the weight's gradient of the last row alone", "total += arrived * n", "total = arrived * n"),
    ("the mean is added", "arrived * v - n * mean", "arrived * v + n * mean"),
    ("the gradient without the inverse RMS", "dh = s * (", "dh = ("),
    ("the penalty's gradient without what arrives for it", "dh += g * tl.load", "dh += tl.load"),
    ("coefficients of another row, backward", "coefficient + row * K + k) * r", "coefficient + row + k) * r"),
    ("the last direction alone, backward", "dh += g * tl.load", "dh = g * tl.load"),
    (
        "the gradient with the stride of the states",
        "gradient + row * D + column, dh",
        "gradient + row * hidden_stride + column, dh",
    ),
    (
        "the gradient stored without a mask",
        "(gradient.dtype.element_ty), mask=real)\n    if partial",
        "(gradient.dtype.element_ty))\n    if partial",
    ),
    ("sums in one place", "partial + tl.program_id(0) * D + column", "partial + column"),
    ("sums stored without a mask", "+ column, total, mask=real)", "+ column, total)"),
    (
        "a long row is read again from elsewhere",
        'arrived = tl.load(g_at, mask=real, other=0, cache_modifier=".ca")',
        'arrived = tl.load(h_at, mask=real, other=0, cache_modifier=".ca")',
    ),
    ("no offset for a long row", 'cache_modifier=".ca").to(dtype) + OFFSET', 'cache_modifier=".ca").to(dtype)'),
    ("the first direction for a long row", f"r = {_LOADED_R}", f"r = {_LOADED_R.replace('k * D + ', '')}", 2, 3),
    # The weight's gradient.
    ("sums without a mask of rows", "mask=(row < COUNT) & real", "mask=(row >= 0) & real"),
    ("sums without a mask of columns", "mask=(row < COUNT) & real", "mask=(row < COUNT) & (column >= 0)"),
    ("the first rows of sums alone", "range(0, COUNT, ROWS)", "range(0, ROWS, ROWS)"),
    ("the last round of sums alone", "total += tl.load(partial", "total = tl.load(partial"),
    ("all columns are the first", "column = tl.program_id(0) * COLUMNS + tl.arange", "column = tl.arange"),
    (
        "the weight's gradient stored without a mask",
        "result.to(gradient.dtype.element_ty), mask=real)",
        "result.to(gradient.dtype.element_ty))",
    ),
    # Launches.
    ("the last tile is lost, forward", "triton.cdiv(rows, tile.rows)", "max(1, rows // tile.rows)"),
    ("the last columns are lost", "triton.cdiv(size, SUM_TILE.columns)", "max(1, size // SUM_TILE.columns)"),
    ("the stride of another tensor", "incoming.stride(0)", "hidden.stride(0)"),
    (
        "the weight's gradient is not set to 0 without rows",
        "torch.zeros_like(norm_weight)",
        "torch.empty_like(norm_weight)",
    ),
)

PENALTY = _in(
    "projection_penalty.py",
    # Forward.
    ("rows begin one later", "* ROWS + tl.arange(0, ROWS)", "* ROWS + 1 + tl.arange(0, ROWS)", 0, 2),
    ("a row too many", "inside = row < N", "inside = row <= N", 0, 2),
    ("a column too many", "real = column < D", "real = column <= D"),
    ("dead rows are read", "mask=live[:, None] & real", "mask=inside[:, None] & real"),
    ("rows without a mask", "mask=live[:, None] & real", "mask=real"),
    ("columns without a mask", "mask=live[:, None] & real", "mask=live[:, None]"),
    ("the stride of the states is D", "row[:, None] * hidden_stride", "row[:, None] * D"),
    (
        "all directions are the first",
        f"r = {_LOADED_R}\n        terms",
        f"r = {_LOADED_R.replace('k * D + ', '')}\n        terms",
    ),
    (
        "a direction without a mask",
        f"r = {_LOADED_R}\n        terms",
        "r = tl.load(direction + k * D + column)\n        terms",
    ),
    ("projections summed in bfloat16", "terms += (h * r,)", "terms += ((h * r).to(tl.bfloat16).to(dtype),)"),
    ("anchors are added", "z -= tl.load(anchor", "z += tl.load(anchor"),
    ("the anchor of the first direction", "row * anchor_stride + k * anchor_step", "row * anchor_stride"),
    ("anchors as if they lay side by side", "row * anchor_stride + k * anchor_step", "row * K + k"),
    ("the stride of the weights is 1", "weight + row * weight_stride", "weight + row"),
    ("the length of another sum", "tl.sqrt(sums[K] *", "tl.sqrt(sums[0] *"),
    ("the last direction alone", "total += value", "total = value"),
    ("coefficients without a weight", "result *= w", "result *= 1"),
    ("penalties without a weight", "total *= w", "total *= 1"),
    ("results of another row", "per_direction + row * K + k, result", "per_direction + row + k * N, result"),
    ("results stored without a mask", "k, result, mask=inside)", "k, result)"),
    (
        "penalties stored without a mask",
        "tl.store(token_penalty + row, total, mask=inside)",
        "tl.store(token_penalty + row, total)",
    ),
    # Backward.
    ("all columns are the first", "tl.program_id(1) * COLUMNS + tl.arange", "tl.arange"),
    (
        "rows of the gradient without a mask",
        "patch = inside[:, None] & (column",
        "patch = (row[:, None] >= 0) & (column",
    ),
    (
        "columns of the gradient without a mask",
        "inside[:, None] & (column < D)[None, :]",
        "inside[:, None] & (column >= 0)[None, :]",
    ),
    ("the stride of the gradient is D", "row[:, None] * incoming_stride", "row[:, None] * D"),
    ("what arrives for the penalty is left out", "c *= tl.load(upstream", "c += 0 * tl.load(upstream"),
    ("what arrives for the first token's penalty", "upstream + row * upstream_stride", "upstream + 0 * row"),
    ("coefficients of another row", "c = tl.load(coefficient + row * K + k", "c = tl.load(coefficient + row + k"),
    (
        "all directions are the first, backward",
        "r = tl.load(direction + k * D + column, mask=column < D",
        "r = tl.load(direction + column, mask=column < D",
    ),
    ("rows that the last direction moves alone", "moved |= tl.load", "moved = tl.load"),
    ("the last direction alone, backward", "total += c[:, None] * r", "total = c[:, None] * r"),
    # Launches.
    ("the last tile is lost, forward", "triton.cdiv(rows, tile.rows),)](", "max(1, rows // tile.rows),)]("),
    ("the last rows are lost, backward", "triton.cdiv(rows, tile.rows), triton", "max(1, rows // tile.rows), triton"),
    ("the last columns are lost, backward", "triton.cdiv(size, tile.columns)", "max(1, size // tile.columns)"),
)

SHARED = (
    *_in(
        "penalty.py",
        ("rises count instead of falls", "e -= tl.maximum(e, 0)", "e -= tl.minimum(e, 0)"),
        ("half the slope of a square", "slope = 2 * e", "slope = e"),
        (
            "the parabola of the absolute value is too low",
            "value = slope * (e - 0.5 * slope * reach)",
            "value = slope * (e - slope * reach)",
        ),
        (
            "nothing keeps 0 / 0 away",
            "tl.maximum(tl.maximum(tl.abs(e), reach), 1.1754943508222875e-38)",
            "tl.maximum(tl.abs(e), reach)",
        ),
        ("the slope beyond the parabola has one sign", "tl.maximum(tl.abs(e), reach)", "tl.maximum(e, reach)"),
        ("the parabola of huber is too wide", "tl.clamp(e, -1.0, 1.0,", "tl.clamp(e, -2.0, 2.0,"),
        ("huber without its constant", "value = slope * (e - 0.5 * slope)", "value = slope * e"),
    ),
    *_in(
        "sums.py",
        ("two sums change places", "return (one, other)", "return (other, one)"),
        (
            "four sums in another order",
            "return (first, second, third, fourth)",
            "return (first, third, second, fourth)",
        ),
        (
            "three sums of which two are one",
            "row_sums(terms[:2]) + row_sums(terms[2:])",
            "row_sums(terms[:2]) + row_sums(terms[1:2])",
        ),
        (
            "the last sums are the first",
            "row_sums(terms[:4]) + row_sums(terms[4:])",
            "row_sums(terms[:4]) + row_sums(terms[:4])",
        ),
    ),
)

FAULTS = (*NORM, *PENALTY, *SHARED)
