"""One call of every kernel, through the launchers that the library uses: what the traffic and builds audits run."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from procon.kernels import projection_penalty, rms_norm_penalty

#: Of bfloat16 and float16, as :mod:`procon.ops.functional` has it: compiled in if the penalty is absolute.
ROUNDING = 1 / 256


class Call(NamedTuple):
    """``rows`` are those whose hidden states or gradients the call has to move."""

    run: Callable[[], object]
    rows: int


def calls(
    rows: int,
    size: int,
    directions: int,
    dtype: torch.dtype,
    penalty: str = "absolute",
    casting: str = "llama",
) -> dict[str, Call]:
    """By name, on random inputs of ``rows`` tokens of width ``size``, every second of which has weight 0."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, size).to(dtype)
    incoming = torch.randn(rows, size).to(dtype)
    norm_weight = torch.randn(size).to(dtype)
    direction = torch.randn(directions, size)
    anchor = torch.randn(rows, directions)
    weight = torch.arange(rows).remainder(2).float()
    coefficient = weight.unsqueeze(1) * torch.randn(rows, directions)
    upstream = torch.tensor(0.5)
    reach = ROUNDING * torch.linalg.vector_norm(direction, dim=1)
    inverse_rms = torch.rand(rows)
    nothing = torch.empty(0)
    eps, offset = 1e-6, 1.0 if casting == "gemma" else 0.0
    live = rows // 2

    def project():
        return projection_penalty.project(hidden, direction)

    def penalize():
        return projection_penalty.penalize(hidden, direction, anchor, weight, penalty, reach)

    def accumulate(arrived):
        return projection_penalty.accumulate_gradient(arrived, upstream, coefficient, direction, dtype)

    def norm(*constraint):
        return rms_norm_penalty.rms_norm_penalize(
            hidden, norm_weight, eps, casting, offset, *constraint, penalty, reach
        )

    def norm_gradient(upstream, coefficient, direction, needs_weight):
        return rms_norm_penalty.rms_norm_gradient(
            incoming,
            upstream,
            hidden,
            norm_weight,
            inverse_rms,
            coefficient,
            direction,
            offset,
            needs_weight,
        )

    unconstrained = (None, nothing, None)
    constrained = (upstream, coefficient, direction)
    return {
        "projection": Call(project, rows),
        "pass-through forward": Call(penalize, live),
        "pass-through backward": Call(lambda: accumulate(incoming), rows),
        "pass-through backward, no gradient arrives": Call(lambda: accumulate(None), rows),
        "norm forward": Call(lambda: norm(None, None, None), rows),
        "norm backward": Call(lambda: norm_gradient(*unconstrained, True), rows),
        "norm backward, weight frozen": Call(lambda: norm_gradient(*unconstrained, False), rows),
        "fused forward": Call(lambda: norm(direction, anchor, weight), rows),
        "fused backward": Call(lambda: norm_gradient(*constrained, True), rows),
        "fused backward, weight frozen": Call(lambda: norm_gradient(*constrained, False), rows),
    }
