"""What does the constraint cost inside RMSNorm, compared with the norms that one would use without it?

Each contender maps hidden states ``[N, D]`` to their norm; the constrained ones also give the penalty. The bytes are
the fewest that a norm takes, with ``U = N * D * itemsize``: forward 2U, backward 3U. The constraint should add none.
``separate`` is the op called before transformers' norm.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.machine import COMPILED, DEVICE, SMOKE, why_no_liger
from benchmarks.harness.passes import (
    PASSES,
    Function,
    Shape,
    make_buffers,
    repeatable_backward,
    run_backward,
    run_forward,
    time_passes,
)
from benchmarks.harness.throughput import throughput
from procon.ops import constrain, rms_norm, rms_norm_constrain

UNITS = {"forward": 2, "backward": 3, "both": 5}
#: Per element: square, sum, and two products; in the backward about twice that.
FLOPS = {"forward": 4, "backward": 8, "both": 12}
UNCONSTRAINED = ("transformers", "compiled", "liger", "torch", "ours")
CONSTRAINED = ("separate", "ours_constrained")
BASELINE = "transformers"
EPS = 1e-5


def _why_left_out() -> dict[str, str]:
    reasons = {}
    if COMPILED == "none":
        reasons["compiled"] = "torch.compile is left out: PROCON_BENCHMARK_COMPILE"
    if reason := why_no_liger():
        reasons["liger"] = reason
    return reasons


LEFT_OUT = _why_left_out()


def _shapes() -> list[Shape]:
    bf16, fp32 = torch.bfloat16, torch.float32
    if SMOKE:
        return [Shape(16, 64, fp32, "hot")]
    if DEVICE == "cuda":
        return [*(Shape(8192, size, bf16, "cold") for size in (576, 2048, 4096, 8192)), Shape(1024, 4096, bf16, "hot")]
    return [Shape(768, 576, dtype, cache) for dtype in (fp32, bf16) for cache in ("cold", "hot")]


def _liger(weight: Tensor) -> Function:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    # Not in place, which is its default: the gradient that arrives is timed again.
    return lambda hidden: (LigerRMSNormFunction.apply(hidden, weight, EPS, 0.0, "llama", False),)


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

    make: dict[str, Callable[[], Function]] = {
        "transformers": lambda: lambda hidden: (norm(hidden),),
        "compiled": compiled,
        "liger": lambda: _liger(weight),
        "torch": lambda: lambda hidden: (torch.nn.functional.rms_norm(hidden, (shape.size,), weight, EPS),),
        "ours": lambda: lambda hidden: (rms_norm(hidden, weight, EPS),),
        "separate": lambda: separate,
        "ours_constrained": lambda: (
            lambda hidden: rms_norm_constrain(hidden, weight, EPS, direction, anchor, token_weight)
        ),
    }
    return {name: build() for name, build in make.items() if name not in LEFT_OUT}, weight


@cache
@repeatable_backward
def _measure(shape: Shape):
    torch._dynamo.reset()
    functions, weight = _functions(shape)
    buffers = make_buffers(shape)
    results = {}
    for name, function in functions.items():
        outputs = run_forward(function, buffers[0])
        results[name] = (*outputs, *run_backward(outputs, buffers[0], [weight]))
    for names in (UNCONSTRAINED, CONSTRAINED):
        check_agreement({name: results[name] for name in names if name in results}, 2e-2)
    return time_passes(functions, buffers, [weight])


@pytest.mark.parametrize("contender", UNCONSTRAINED + CONSTRAINED)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("shape", _shapes(), ids=str)
def test_norm(replay, shape: Shape, which: str, contender: str):
    if contender in LEFT_OUT:
        pytest.skip(LEFT_OUT[contender])
    samples = _measure(shape)[which]
    work = throughput(
        samples.seconds[contender],
        formula=f"{UNITS[which]} U, U = N * D * itemsize",
        moved=UNITS[which] * shape.unit,
        flops=FLOPS[which] * shape.rows * shape.size,
    )
    replay(f"norm {shape} {which}", samples, contender, BASELINE, **work)
