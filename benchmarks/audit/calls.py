"""One call of every kernel, through the launchers that the library uses: what the traffic and builds audits run."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from procon.kernels import projection_penalty


class Call(NamedTuple):
    """``rows`` are those whose hidden states or gradients the call has to move."""

    run: Callable[[], object]
    rows: int


def calls(rows: int, size: int, directions: int, dtype: torch.dtype, penalty: str = "squared") -> dict[str, Call]:
    """By name, on random inputs of ``rows`` tokens of width ``size``, every second of which has weight 0."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, size).to(dtype)
    incoming = torch.randn(rows, size).to(dtype)
    direction = torch.randn(directions, size)
    anchor = torch.randn(rows, directions)
    weight = torch.arange(rows).remainder(2).float()
    coefficient = weight[:, None] * torch.randn(rows, directions)
    upstream = torch.tensor(0.5)
    live = int(weight.sum())

    def project():
        return projection_penalty.project(hidden, direction)

    def penalize():
        return projection_penalty.penalize(hidden, direction, anchor, weight, penalty)

    def accumulate(arrived):
        return projection_penalty.accumulate_gradient(arrived, upstream, coefficient, direction, dtype)

    return {
        "projection": Call(project, rows),
        "pass-through forward": Call(penalize, live),
        "pass-through backward": Call(lambda: accumulate(incoming), rows),
        "pass-through backward, no gradient arrives": Call(lambda: accumulate(None), rows),
    }
