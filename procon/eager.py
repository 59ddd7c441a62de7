"""The fused op in plain PyTorch: the path on CPU, and the twin that the Triton kernels are compared with.

For hidden states ``h [N, D]``, directions ``r [K, D]``, anchors ``a [N, K]`` and weights ``w [N]``::

    z = h r^T    e = z - a    penalty_t = w_t sum_k phi(e_tk)    c_tk = w_t phi'(e_tk)
    dL/dh_t = g_h[t] + g_t sum_k c_tk r_k

Everything is accumulated in float32 (float64 for float64 hidden states). Half-precision hidden states are converted one
tile of rows at a time, so the largest temporary is a tile that stays in cache, never a float32 copy of ``h``.

All products go through ``out=`` variants, which autocast leaves alone. The one global setting that reaches this file is
``torch.set_float32_matmul_precision("medium")``, which lowers float32 products on CPU as it does for any other matmul.
"""

import torch
from torch import Tensor

# A tile on CPU should stay in the second-level cache; on other devices few launches matter more.
_TILE_BYTES = {"cpu": 1 << 20}
_TILE_BYTES_ELSEWHERE = 1 << 26


def _tiles(like: Tensor, rows: int, columns: int) -> tuple[range, int]:
    budget = _TILE_BYTES.get(like.device.type, _TILE_BYTES_ELSEWHERE)
    height = max(1, budget // (columns * like.element_size()))
    return range(0, rows, height), height


def project(hidden: Tensor, direction: Tensor) -> Tensor:
    """Projection ``z [N, K]`` of ``hidden [N, D]`` on ``direction [K, D]``, in the dtype of ``direction``."""
    rows, columns = hidden.shape
    projection = direction.new_empty((rows, len(direction)))
    starts, height = _tiles(direction, rows, columns)
    convert = hidden.dtype != direction.dtype
    buffer = direction.new_empty((min(height, rows), columns)) if convert else None
    for start in starts:
        tile = hidden[start : start + height]
        if convert:
            tile = buffer[: len(tile)].copy_(tile)
        # One matrix-vector product a direction: unlike a matrix product it is never lowered to TF32 on a GPU.
        for k, vector in enumerate(direction):
            torch.mv(tile, vector, out=projection[start : start + height, k])
    return projection


def penalize(
    hidden: Tensor, direction: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: str
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]``, both in the dtype of ``direction``."""
    error = project(hidden, direction)
    if anchor is not None:
        error -= anchor
    if weight is not None:
        # Rows of weight 0 may hold NaN or infinity, which a product with 0 would keep.
        error = torch.where(weight.unsqueeze(1) != 0, error, 0)
    value, slope = _value_and_slope(error, penalty)
    value = value.sum(1)
    if weight is not None:
        value *= weight
        slope *= weight.unsqueeze(1)
    return value, slope


def _value_and_slope(error: Tensor, penalty: str) -> tuple[Tensor, Tensor]:
    """``phi(e)`` and ``phi'(e)``."""
    if penalty == "squared":
        return error * error, 2 * error
    if penalty == "absolute":
        return error.abs(), error.sign()
    slope = error.clamp(-1, 1)
    return slope * (error - 0.5 * slope), slope


def accumulate_gradient(
    incoming: Tensor | None,
    upstream: Tensor | None,
    coefficient: Tensor,
    direction: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient for the hidden states, ``incoming + upstream * coefficient @ direction``, rounded once to ``dtype``.

    ``incoming [N, D]`` is the gradient that arrives for the hidden states, ``upstream`` (one number, or one a token)
    that of the penalty; None stands for 0 and for 1. Neither is written to.
    """
    rows, columns = len(coefficient), direction.shape[1]
    if upstream is not None:
        coefficient = coefficient * upstream.reshape(-1, 1)
    gradient = direction.new_empty((rows, columns), dtype=dtype)
    starts, height = _tiles(direction, rows, columns)
    convert = dtype != direction.dtype
    buffer = direction.new_empty((min(height, rows), columns)) if convert else None
    for start in starts:
        target = gradient[start : start + height]
        tile = buffer[: len(target)] if convert else target
        left = coefficient[start : start + height]
        if incoming is None:
            torch.mul(left[:, :1], direction[0], out=tile)
        else:
            arrived = incoming[start : start + height]
            if convert:
                arrived = tile.copy_(arrived)
            torch.addr(arrived, left[:, 0], direction[0], out=tile)
        for k in range(1, len(direction)):
            torch.addr(tile, left[:, k], direction[k], out=tile)
        if convert:
            target.copy_(tile)
    return gradient
