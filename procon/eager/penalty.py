"""The penalty and its coefficient from projections."""

import torch
from torch import Tensor


def penalize_projection(
    projection: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: str
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]`` for ``projection [N, K]``, in its dtype."""
    error = projection if anchor is None else projection - anchor
    if weight is not None:
        # Rows of weight 0 may hold NaN or infinity, which a product with 0 would keep.
        error = torch.where(weight.unsqueeze(1) != 0, error, 0)
    value, slope = value_and_slope(error, penalty)
    # One direction is one column, which needs no sum.
    value = value.squeeze(1) if value.shape[1] == 1 else value.sum(1)
    if weight is not None:
        value *= weight
        slope *= weight.unsqueeze(1)
    return value, slope


def value_and_slope(error: Tensor, penalty: str) -> tuple[Tensor, Tensor]:
    """``phi(e)`` and ``phi'(e)``, both of the shape of ``error``."""
    if penalty == "squared":
        return error * error, 2 * error
    if penalty == "absolute":
        return error.abs(), error.sign()
    slope = error.clamp(-1, 1)
    return slope * (error - 0.5 * slope), slope
