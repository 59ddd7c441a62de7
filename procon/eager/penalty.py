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
    norm: Tensor | None,
    reach: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Penalty of each token ``[N]`` and coefficient ``c [N, K]`` for ``projection [N, K]``, in its dtype.

    With ``|h| [N]`` as ``norm`` and ``reach [K]``, "absolute" is a parabola up to ``|h_t| reach_k``. ``projection`` is
    overwritten; NaN gives NaN.
    """
    bound = None if norm is None or reach is None else torch.outer(norm, reach)
    # Operations with Python numbers take twice as long on few tokens as those without.
    error = projection if anchor is None else projection.sub_(anchor)
    if weight is not None:
        weight = weight.unsqueeze(1)
        # Rows of weight 0 may hold NaN or infinity, which a product with 0 would keep.
        dead = weight.logical_not()
        error.masked_fill_(dead, 0.0)
        if bound is not None:
            bound = bound.masked_fill_(dead, 0.0)
    if penalty == "squared":
        weighted = error if weight is None else error * weight
        return (error * weighted).sum(1), weighted + weighted
    value = error.abs()
    if bound is None:
        slope = error / value.clamp_min(_TINY)
    else:
        slope = error / torch.maximum(value, bound).clamp_min_(_TINY)
        value = torch.addcmul(error, slope, bound, value=-0.5).mul_(slope)
    if weight is not None:
        value, slope = value.mul_(weight), slope.mul_(weight)
    return value.sum(1), slope
