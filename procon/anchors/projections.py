"""The projections of a decoder's sites, taken while it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.models import Decoder, observe_sites
from procon.ops import project
from procon.settings import Backend

_Result = TypeVar("_Result")


def project_sites(
    run: Callable[[], _Result],
    decoder: Decoder,
    basis: Tensor,
    sites: Sequence[int],
    *,
    rows: int,
    backend: Backend,
    device: torch.device | str,
) -> tuple[_Result, Tensor]:
    """What ``run()`` gives, and the projections ``[rows, T, len(sites) * K]`` fp32 of the sequences that it runs.

    Args:
        run: makes one forward of ``decoder``, or several, each on some of the rows; what comes after them is left out.
        basis: ``[L, K, D]`` unit directions of all sites.
        sites: indices of blocks, whose inputs they are; ``len(decoder.blocks)`` is the last one's output.
        device: where the projections go.

    Raises:
        ProConError: if a site is not passed, or not by all rows.
    """
    found: dict[int, list[Tensor]] = {site: [] for site in sites}

    def observe(site: int, hidden: Tensor) -> None:
        taken = found.get(site)
        if taken is not None and sum(map(len, taken)) < rows:
            z = project(hidden, basis[site].to(hidden.device), backend=backend)
            taken.append(z.to(device, torch.float32))

    with observe_sites(decoder, observe):
        result = run()
    for site, taken in found.items():
        if sum(map(len, taken)) != rows:
            raise ProConError(
                f"block {site} ran on {sum(map(len, taken))} of {rows} sequences, so they have no anchors: constrain "
                "only blocks that run"
            )
    z = torch.stack([taken[0] if len(taken) == 1 else torch.cat(taken) for taken in found.values()], -2)
    return result, z.flatten(-2)
