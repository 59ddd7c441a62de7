"""A control: random directions at the same blocks and with the same gaps as the given ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from procon.directions.directions import Directions


def randomized(directions: Directions, seed: int) -> Directions:
    """The control for *any* direction: isotropic random unit directions at the same blocks, with the same gaps.

    If this control preserves refusals too, the protection comes from anchoring hidden states along *any* direction.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks, width = directions.block_count, directions.basis.shape[2]
    # The first of several are drawn first, so that they are what one direction per block would be.
    draws = [torch.randn(blocks, count, width, generator=generator) for count in (1, directions.k - 1)]
    return along(directions, torch.cat(draws, 1), {"random_seed": seed})


def along(directions: Directions, vectors: Tensor, provenance: dict[str, Any]) -> Directions:
    """Directions along ``vectors [L, K, D]``, orthonormalised, where there are any."""
    # Gram-Schmidt in fp64: row k lies in the span of the first k.
    q, r = torch.linalg.qr(vectors.double().mT)
    further = (q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]).mT[:, 1:]
    basis = torch.cat([normalize(vectors[:, :1], dim=-1).float(), further.float()], 1)
    return replace(directions, basis=basis * (directions.gaps != 0)[..., None], provenance=provenance)
