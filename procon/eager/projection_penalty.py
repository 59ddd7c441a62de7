"""The projection penalty in plain PyTorch.

For hidden states ``h [N, D]``, directions ``r [K, D]``, anchors ``a [N, K]`` and weights ``w [N]``::

    z = h r^T    e = z - a    penalty_t = w_t sum_k phi(e_tk)    c_tk = w_t phi'(e_tk)
    dL/dh_t = g_h[t] + g_t sum_k c_tk r_k

With ``reach [K]``, phi "absolute" is a parabola up to ``|h_t| reach_k``, and straight beyond.
"""

import torch
from torch import Tensor

from .penalty import penalize_projection
from .tiles import converted, tile_height, tiled


def project(hidden: Tensor, direction: Tensor, norm: Tensor | None = None) -> Tensor:
    """Projection ``z [N, K]`` of ``hidden [N, D]`` on ``direction [K, D]``, in the dtype of ``direction``.

    ``norm [N]``, if there is one, receives ``|h|`` from the same read.
    """
    rows, columns = hidden.shape
    height = tile_height(direction, columns)
    projection = direction.new_empty((rows, len(direction)))
    buffer = direction.new_empty((min(height, rows), columns)) if hidden.dtype != direction.dtype else None
    for tile, z, *norms in tiled(height, hidden, projection, *(() if norm is None else (norm,))):
        h = converted(tile, buffer)
        project_tile(h, direction, z)
        if norms:
            torch.linalg.vector_norm(h, dim=1, out=norms[0])
    return projection


def project_tile(tile: Tensor, direction: Tensor, projection: Tensor) -> None:
    """Write the projections of ``tile [T, D]`` to ``projection [T, K]``; all are of one dtype."""
    # One matrix-vector product a direction: unlike a matrix product it is never lowered to TF32 on a GPU.
    for r, z in zip(direction.unbind(), projection.unbind(1), strict=True):
        torch.mv(tile, r, out=z)


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
    norm = direction.new_empty(hidden.shape[0]) if penalty == "absolute" and reach is not None else None
    projection = project(hidden, direction, norm)
    return penalize_projection(projection, anchor, weight, penalty, norm, reach)


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
    rows, columns = len(coefficient), direction.shape[1]
    coefficient = scaled(coefficient, upstream)
    height = tile_height(direction, columns)
    gradient = direction.new_empty((rows, columns), dtype=dtype)
    buffer = direction.new_empty((min(height, rows), columns)) if dtype != direction.dtype else None
    for c, target, *arrived in tiled(height, coefficient, gradient, *(() if incoming is None else (incoming,))):
        tile = target if buffer is None else buffer[: len(target)]
        if arrived:
            add_outer_products(converted(arrived[0], buffer), c, direction, tile)
        else:
            torch.mul(c[:, :1], direction[0], out=tile)
            add_outer_products(tile, c[:, 1:], direction[1:], tile)
        if buffer is not None:
            target.copy_(tile)
    return gradient


def scaled(coefficient: Tensor, upstream: Tensor | None) -> Tensor:
    """``coefficient [N, K]`` times one number, or one per token; None stands for 1."""
    if upstream is None:
        return coefficient
    return coefficient * (upstream.unsqueeze(1) if upstream.dim() else upstream)


def add_outer_products(tile: Tensor, coefficient: Tensor, direction: Tensor, total: Tensor) -> None:
    """Write ``tile [T, D] + coefficient [T, K] @ direction [K, D]`` to ``total``, which may be ``tile``."""
    for c, r in zip(coefficient.unbind(1), direction.unbind(), strict=True):
        tile = torch.addr(tile, c, r, out=total)
