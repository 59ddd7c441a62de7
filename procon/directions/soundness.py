"""Can these be directions? They are unit vectors, and at one block there is one at least.

Those of refusal are orthogonal at each block. Those of several concepts need not be: each is what its name says.
"""

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
    # At a block without a direction the row is zero, and so is a further one if the prompts do not differ further.
    may_be_zero = torch.ones(basis.shape[:2], dtype=torch.bool)
    may_be_zero[:, 0] = ~usable
    if reason := _no_unit_vector(basis, may_be_zero):
        return reason
    cosines = torch.einsum("lkd,lmd->lkm", basis.double(), basis.double())
    cosines.diagonal(dim1=1, dim2=2).zero_()
    if (cosines.abs() > _TOLERANCE).any():
        block = int((cosines.abs() > _TOLERANCE).nonzero()[0, 0])
        return f"directions for block {block} that are not orthogonal"
    return None


def concepts_flaw(vectors: Tensor, scale: Tensor) -> str | None:
    """What is wrong with directions of concepts, ``[L, K, D]``, and their units ``[L, K]``; None if nothing is."""
    if not torch.isfinite(vectors).all():
        return "NaN or infinite values"
    there = vectors.any(-1)
    if not there.any():
        return "no direction for any block"
    # A unit may be unknown, and is 0 where there is no direction.
    if torch.isinf(scale).any() or (scale < 0).any() or ((scale == 0) & there).any():
        return "a unit that is no positive number"
    return _no_unit_vector(vectors, torch.ones_like(there))


def _no_unit_vector(basis: Tensor, may_be_zero: Tensor) -> str | None:
    lengths = basis.double().norm(dim=-1)
    bad = ~(((lengths - 1).abs() <= _TOLERANCE) | (may_be_zero & (lengths == 0)))
    if not bad.any():
        return None
    block, number = bad.nonzero()[0].tolist()
    return f"a vector of length {lengths[block, number]:.4g} for block {block}, not a unit vector"
