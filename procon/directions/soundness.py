"""Can these be directions? They are unit vectors, orthogonal at each block, and at one block there is one at least."""

from __future__ import annotations

import torch
from torch import Tensor

#: How far from 1 a length may be, and from 0 a cosine: bfloat16 rounds each value by 2**-9 of it at most.
_TOLERANCE = 2**-8


def flaw(basis: Tensor, gap: Tensor, malicious: Tensor, benign: Tensor) -> str | None:
    """What is wrong with directions ``basis [L, K, D]`` and what was measured with them ``[L]``; None if nothing is."""
    if not all(torch.isfinite(values).all() for values in (basis, gap, malicious, benign)):
        return "NaN or infinite values"
    if (gap < 0).any():
        return "a negative gap"
    usable = gap > 0
    if not usable.any():
        return "no direction for any block"
    lengths = basis.double().norm(dim=-1)
    unit = (lengths - 1).abs() <= _TOLERANCE
    # At a block without a direction the row is zero, and so is a further one if the prompts do not differ further.
    may_be_zero = torch.ones_like(unit)
    may_be_zero[:, 0] = ~usable
    bad = ~(unit | (may_be_zero & (lengths == 0)))
    if bad.any():
        block, number = bad.nonzero()[0].tolist()
        return f"a vector of length {lengths[block, number]:.4g} for block {block}, not a unit vector"
    cosines = torch.einsum("lkd,lmd->lkm", basis.double(), basis.double())
    cosines.diagonal(dim1=1, dim2=2).zero_()
    if (cosines.abs() > _TOLERANCE).any():
        block = int((cosines.abs() > _TOLERANCE).nonzero()[0, 0])
        return f"directions for block {block} that are not orthogonal"
    return None
