"""RMSNorm with the projection penalty, in plain PyTorch.

For ``h [N, D]``, the norm's weight ``v [D]`` (with the offset added), directions ``r [K, D]``, anchors ``a [N, K]`` and
token weights ``w [N]``::

    forward   s_t = 1 / sqrt(mean_d h_td^2 + eps)    n = s h    y = n v
              z_tk = <h_t, r_k>   e = z - a   penalty_t = w_t sum_k phi(e_tk)   c_tk = w_t phi'(e_tk)
    backward  m = g_y v    dh_t = s_t (m_t - n_t mean_d(m_t n_t)) + g sum_k c_tk r_k    dv = sum_t g_y[t] n_t

With ``reach [K]``, phi "absolute" is a parabola up to ``|h_t| reach_k``, and straight beyond.

Casting ``"llama"`` rounds n to the dtype of h before it meets the weight; ``"gemma"`` rounds the product. The gradients
are those of the norm without the rounding.
"""

import torch
from torch import Tensor

from .penalty import penalize_projection
from .projection_penalty import add_outer_products, project_tile, scaled
from .tiles import converted, tile_height, tiled


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
    rows, columns = hidden.shape
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    normed_dtype = hidden.dtype if casting == "gemma" else torch.promote_types(hidden.dtype, norm_weight.dtype)
    normed = hidden.new_empty((rows, columns), dtype=normed_dtype)
    inverse_rms = hidden.new_empty(rows, dtype=computed)
    norm = torch.empty_like(inverse_rms) if penalty == "absolute" and reach is not None else None
    # Without a direction there are none to project on, and a projection of no columns.
    directions = inverse_rms.new_empty((0, columns)) if direction is None else direction
    projection = directions.new_empty((rows, len(directions)))
    v = norm_weight if casting == "llama" else norm_weight.to(computed)
    v = v + offset if offset else v

    height = tile_height(inverse_rms, columns)
    shape = (min(height, rows), columns)
    buffer = inverse_rms.new_empty(shape) if hidden.dtype != computed else None
    scratch = inverse_rms.new_empty(shape) if normed_dtype != computed or buffer is not None else None
    rounded = hidden.new_empty(shape) if casting == "llama" and buffer is not None else None
    norms = () if norm is None else (norm,)
    for tile, s, y, z, *kept in tiled(height, hidden, inverse_rms, normed, projection, *norms):
        h = converted(tile, buffer)
        of_rows = kept[0] if kept else s
        torch.linalg.vector_norm(h, dim=1, out=of_rows)
        torch.square(of_rows, out=s).div_(columns).add_(eps).rsqrt_()
        project_tile(h, directions, z)
        n = torch.mul(h, s.unsqueeze(1), out=y if scratch is None else scratch[: h.shape[0]])
        if casting == "llama":
            torch.mul(converted(n, rounded), v, out=y)
        elif scratch is None:
            y.mul_(v)
        else:
            y.copy_(n.mul_(v))
    if direction is None:
        return normed, inverse_rms, inverse_rms.new_empty(0), projection
    found = penalize_projection(projection, anchor, weight, penalty, norm, reach)
    return normed, inverse_rms, *found


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
    rows, columns = hidden.shape
    computed = inverse_rms.dtype
    v = norm_weight.to(computed)
    v = v + offset if offset else v
    gradient = hidden.new_empty((rows, columns))
    total = inverse_rms.new_zeros(columns) if needs_weight else None
    if upstream is not None:
        coefficient = scaled(coefficient, upstream)

    height = tile_height(inverse_rms, columns)
    shape = (min(height, rows), columns)
    h_buffer = inverse_rms.new_empty(shape) if hidden.dtype != computed else None
    g_buffer = inverse_rms.new_empty(shape) if incoming.dtype != computed else None
    scratch = inverse_rms.new_empty(shape)
    mean = inverse_rms.new_empty(shape[0])
    for h_tile, g_tile, s, c, target in tiled(height, hidden, incoming, inverse_rms, coefficient, gradient):
        h, g = converted(h_tile, h_buffer), converted(g_tile, g_buffer)
        work = torch.mul(g, h, out=scratch[: h.shape[0]])
        # What n_t mean_d(m_t n_t) multiplies h_t with, times D: n is s h, twice over.
        shrink = torch.mv(work, v, out=mean[: h.shape[0]]).mul_(s).mul_(s)
        if total is not None:
            torch.addmv(total, work.t(), s, out=total)
        dh = target if h_buffer is None else work
        torch.mul(g, v, out=dh)
        torch.addcmul(dh, h, shrink.unsqueeze(1), value=-1 / columns, out=dh)
        dh.mul_(s.unsqueeze(1))
        if upstream is not None and direction is not None:
            add_outer_products(dh, c, direction, dh)
        if h_buffer is not None:
            target.copy_(dh)
    return gradient, norm_weight.new_empty(0) if total is None else total.to(norm_weight.dtype)
