"""The penalty and its coefficient from projections."""

import torch
from torch import Tensor

#: The smallest normal number in float32 keeps 0 / 0 away.
_TINY = 1.1754943508222875e-38


def penalize_projection(
    projection: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    direction: Tensor,
    length: Tensor | None,
    rounding: float,
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]`` for ``projection [N, K]``, in its dtype.

    With lengths ``|h| [N]``, "absolute" is a parabola up to ``rounding |h_t| |r_k|``. ``projection`` is overwritten;
    NaN gives NaN.
    """
    reach = None
    if length is not None:
        reach = torch.outer(length, torch.linalg.vector_norm(direction, dim=1).mul_(rounding))
    # Operations with Python numbers take twice as long on few tokens as those without.
    error = projection if anchor is None else projection.sub_(anchor)
    if weight is not None:
        weight = weight.unsqueeze(1)
        # Rows of weight 0 may hold NaN or infinity, which a product with 0 would keep.
        dead = weight.logical_not()
        error.masked_fill_(dead, 0.0)
        if reach is not None:
            reach = reach.masked_fill(dead, 0.0)
    if penalty == "squared":
        weighted = error if weight is None else error * weight
        return (error * weighted).sum(1), weighted + weighted
    if penalty == "absolute":
        value = error.abs()
        if reach is None:
            slope = error / value.clamp_min(_TINY)
        else:
            slope = error / torch.maximum(value, reach).clamp_min_(_TINY)
            value = torch.addcmul(error, slope, reach, value=-0.5).mul_(slope)
    else:
        slope = error.clamp(-1, 1)
        value = torch.sub(error, slope, alpha=0.5).mul_(slope)
    if weight is not None:
        value, slope = value.mul_(weight), slope.mul_(weight)
    return value.sum(1), slope
