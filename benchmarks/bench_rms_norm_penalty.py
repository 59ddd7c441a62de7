"""What does the constraint cost inside RMSNorm, compared with the norms that one would use without it?

Each contender maps hidden states ``[N, D]`` to their norm; the constrained ones also give the penalty. The bytes are
the fewest that a norm takes, with ``U = N * D * itemsize``: forward 2U, backward 3U. The constraint should add none.
``separate`` is the op called before transformers' norm, and ``compiled_constrained`` is what torch.compile makes of
that norm and the penalty in one function.

Norms of other libraries take part if they are installed (:mod:`benchmarks.harness.peers`). If one fails, or gives
something else, it is left out and the reason is reported.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.interleaved import Samples
from benchmarks.harness.machine import COMPILED, DEVICE
from benchmarks.harness.passes import (
    PASSES,
    Function,
    Shape,
    make_buffers,
    repeatable_backward,
    run_backward,
    run_forward,
    shapes,
    time_passes,
)
from benchmarks.harness.peers import PEERS, first_line, norm_of, why_left_out
from benchmarks.harness.throughput import throughput
from procon.ops import constrain, rms_norm, rms_norm_constrain

UNITS = {"forward": 2, "backward": 3, "both": 5}
#: Per element: square, sum, and two products; in the backward about twice that.
FLOPS = {"forward": 4, "backward": 8, "both": 12}
UNCONSTRAINED = ("transformers", "compiled", *PEERS, "torch", "ours")
CONSTRAINED = ("separate", "compiled_constrained", "ours_constrained")
BASELINE = "transformers"
EPS = 1e-5
TOLERANCE = 2e-2


def _why_left_out() -> dict[str, str]:
    reasons = {}
    if COMPILED == "none":
        reason = "torch.compile is left out: PROCON_BENCHMARK_COMPILE"
        reasons |= dict.fromkeys(("compiled", "compiled_constrained"), reason)
    return reasons | {name: reason for name in PEERS if (reason := why_left_out(name))}


LEFT_OUT = _why_left_out()


def _functions(shape: Shape) -> tuple[dict[str, Function], Tensor]:
    """The contenders, and the norm's weight that all of them share."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(shape.size, generator=generator), dim=0).to(DEVICE)
    anchor = torch.randn(shape.rows, generator=generator).to(DEVICE)
    token_weight = (torch.rand(shape.rows, generator=generator) < 0.75).float().to(DEVICE)
    norm = LlamaRMSNorm(shape.size, EPS).to(DEVICE, shape.dtype)
    weight = norm.weight

    def separate(hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden, penalty = constrain(hidden, direction, anchor, token_weight)
        return norm(hidden), penalty

    def compiled() -> Function:
        forward = torch.compile(norm.forward)
        return lambda hidden: (forward(hidden),)

    def norm_and_penalty(hidden: Tensor) -> tuple[Tensor, Tensor]:
        # A sum of products and not a matrix product, which Inductor would not fuse with the norm.
        error = (hidden.float() * direction).sum(-1) - anchor
        return norm(hidden), (error.square() * token_weight).sum()

    def peer(name: str) -> Function:
        call = norm_of(name)
        return lambda hidden: (call(hidden, weight, EPS),)

    make: dict[str, Callable[[], Function]] = {
        "transformers": lambda: lambda hidden: (norm(hidden),),
        "compiled": compiled,
        **{name: partial(peer, name) for name in PEERS},
        "torch": lambda: lambda hidden: (torch.nn.functional.rms_norm(hidden, (shape.size,), weight, EPS),),
        "ours": lambda: lambda hidden: (rms_norm(hidden, weight, EPS),),
        "separate": lambda: separate,
        "compiled_constrained": lambda: torch.compile(norm_and_penalty),
        "ours_constrained": lambda: (
            lambda hidden: rms_norm_constrain(hidden, weight, EPS, direction, anchor, token_weight)
        ),
    }
    return {name: build() for name, build in make.items() if name not in LEFT_OUT}, weight


class _Result(NamedTuple):
    samples: dict[str, Samples]
    failures: dict[str, str]  # of other libraries


@cache
@repeatable_backward
def _measure(shape: Shape) -> _Result:
    torch._dynamo.reset()
    functions, weight = _functions(shape)
    buffers = make_buffers(shape)

    results, failures = {}, {}
    for name, function in list(functions.items()):
        try:
            outputs = run_forward(function, buffers[0])
            results[name] = (*outputs, *run_backward(outputs, buffers[0], [weight]))
            if name in PEERS:
                check_agreement({BASELINE: results[BASELINE], name: results[name]}, TOLERANCE)
        # Whatever it is, another library's must not take ours along.
        except Exception as error:
            if name not in PEERS:
                raise
            failures[name] = f"failed: {first_line(error)}"
            del functions[name]
    for names in (UNCONSTRAINED, CONSTRAINED):
        check_agreement({name: results[name] for name in names if name in functions}, TOLERANCE)
    return _Result(time_passes(functions, buffers, [weight]), failures)


@pytest.mark.parametrize("contender", UNCONSTRAINED + CONSTRAINED)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", shapes(torch.float32), ids=str)
def test_norm(replay, shape: Shape, which: str, contender: str):
    if contender in LEFT_OUT:
        pytest.skip(LEFT_OUT[contender])
    result = _measure(shape)
    if contender in result.failures:
        pytest.skip(result.failures[contender])
    samples = result.samples[which]
    work = throughput(
        samples.seconds[contender],
        formula=f"{UNITS[which]} U, U = N * D * itemsize",
        moved=UNITS[which] * shape.unit,
        flops=FLOPS[which] * shape.rows * shape.size,
    )
    replay(f"norm {shape} {which}", samples, contender, BASELINE, **work)
