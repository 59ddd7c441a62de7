"""Several directions per block: the difference in means first, then the main ways in which categories depart from it.

The paper (section III-A) takes one direction per block. With prompt categories ``c``, their differences in means
``d_c = mean(malicious of c) - mean(benign of c)`` and the first direction ``r``, the further ones are the leading right
singular vectors of the matrix with the rows ``d_c - <d_c, r> r``: each takes up as much as one direction can of what
those before it leave of the categories' differences. Together they are orthonormal.
"""

from __future__ import annotations

import torch
from torch import Tensor


def further_directions(first: Tensor, differences: Tensor, count: int, smallest: Tensor) -> Tensor:
    """``[L, count, D]`` directions beside the first one, in the dtype of ``differences``.

    Signs are chosen so that the category with the largest difference along a direction, in magnitude, has a positive
    one.

    Args:
        first: ``[L, D]``, unit rows.
        differences: ``[C, L, D]``, malicious minus benign mean of each category, each counting alike; C > ``count``.
        smallest: ``[L]``, the singular value up to which a direction is rounding; its row is zero.
    """
    rows = differences.movedim(0, 1)
    rest = rows - (rows @ first[:, :, None]) * first[:, None]
    _, length, found = torch.linalg.svd(rest, full_matrices=False)
    length, found = length[:, :count], found[:, :count]
    along = rest @ found.mT  # [L, C, count]
    largest = along.gather(1, along.abs().argmax(1, keepdim=True)).movedim(1, 2)
    return torch.where((length > smallest[:, None])[:, :, None], found * largest.sign(), 0.0)


def orthonormalised(vectors: Tensor) -> Tensor:
    """Gram-Schmidt over the rows of ``[L, K, D]``, in fp64: row ``k`` lies in the span of the first ``k``."""
    q, r = torch.linalg.qr(vectors.double().mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT


def mean_squared_cosine(one: Tensor, other: Tensor) -> Tensor:
    """``[L]``: mean of the squared cosines of the principal angles between the spans of orthonormal ``[L, K, D]``.

    1 if the spans are the same, 0 if they are at right angles, ``K / D`` on average over random ones. The signed
    cosine of single directions would not do for spans, within which the directions may turn.
    """
    return (one.double() @ other.double().mT).square().sum((1, 2)) / one.shape[1]
