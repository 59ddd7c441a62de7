"""The penalty and its coefficient from projections."""

from torch import Tensor


def penalize_projection(
    projection: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: str
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]`` for ``projection [N, K]``, in its dtype."""
    # Operations with Python numbers take twice as long on few tokens as those without.
    error = projection.clone() if anchor is None else projection - anchor
    if weight is not None:
        weight = weight.unsqueeze(1)
        # Rows of weight 0 may hold NaN or infinity, which a product with 0 would keep.
        error.masked_fill_(weight.logical_not(), 0.0)
    value, slope = value_and_slope(error, penalty, weight)
    # One direction is one column, which needs no sum.
    return value.squeeze(1) if value.shape[1] == 1 else value.sum(1), slope


def value_and_slope(error: Tensor, penalty: str, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """``w phi(e)`` and ``w phi'(e)``, both of the shape of ``error``."""
    if penalty == "squared":
        weighted = error if weight is None else error * weight
        return error * weighted, weighted + weighted
    if penalty == "absolute":
        value, slope = error.abs(), error.sign()
    else:
        slope = error.clamp(-1, 1)
        value = slope * (error - 0.5 * slope)
    return (value, slope) if weight is None else (value * weight, slope * weight)
