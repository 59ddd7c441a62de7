"""What does the penalty with pass-through cost, compared with what one would write instead?

Each contender maps hidden states ``[N, D]`` to themselves and the penalty; in the backward a gradient arrives for both.
The bytes are the fewest that do it, with ``U = N * D * itemsize``: forward U, backward 2U. A contender's GB/s are these
bytes over its time, whatever it moves.
"""

from functools import cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.machine import COMPILED, DEVICE, SMOKE
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
from benchmarks.harness.throughput import throughput
from procon.ops import constrain

UNITS = {"forward": 1, "backward": 2, "both": 3}
CONTENDERS = ("eager_fp32", "eager_bf16", "compiled", "pass_through")
BASELINE = "eager_fp32"


class Case(NamedTuple):
    shape: Shape
    directions: int

    def __str__(self) -> str:
        return f"{self.shape}-k{self.directions}"


def _cases() -> list[Case]:
    tensors = shapes(torch.bfloat16)
    if SMOKE:
        return [Case(tensors[0], 2)]
    return [Case(tensors[0], 1), Case(tensors[0], 4), *(Case(shape, 1) for shape in tensors[1:])]


def _functions(case: Case) -> dict[str, Function]:
    rows, size = case.shape.rows, case.shape.size
    generator = torch.Generator().manual_seed(1)
    direction = torch.nn.functional.normalize(torch.randn(case.directions, size, generator=generator), dim=1).to(DEVICE)
    anchor = torch.randn(rows, case.directions, generator=generator).to(DEVICE)
    weight = (torch.rand(rows, generator=generator) < 0.75).float().to(DEVICE)
    # One direction is a vector: the matrix product of several is cuBLAS's (on CPU oneDNN's) skinny one.
    matrix = direction[0] if case.directions == 1 else direction.T
    anchors = anchor[:, 0] if case.directions == 1 else anchor
    weights = weight if case.directions == 1 else weight[:, None]
    matrix_bf16 = matrix.bfloat16()

    def penalty_fp32(hidden: Tensor) -> Tensor:
        return ((hidden.float() @ matrix - anchors).square() * weights).sum()

    def penalty_bf16(hidden: Tensor) -> Tensor:
        return ((hidden.bfloat16() @ matrix_bf16 - anchors).square() * weights).sum()

    functions = {
        "eager_fp32": lambda hidden: (hidden, penalty_fp32(hidden)),
        "eager_bf16": lambda hidden: (hidden, penalty_bf16(hidden)),
        "pass_through": lambda hidden: constrain(hidden, direction, anchor, weight),
    }
    if COMPILED != "none":
        compiled = torch.compile(penalty_fp32)
        functions["compiled"] = lambda hidden: (hidden, compiled(hidden))
    return functions


@cache
@repeatable_backward
def _measure(case: Case):
    torch._dynamo.reset()
    functions = _functions(case)
    buffers = make_buffers(case.shape)
    results = {}
    for name, function in functions.items():
        outputs = run_forward(function, buffers[0])
        results[name] = (*outputs, *run_backward(outputs, buffers[0], ()))
    check_agreement(results, 2e-2)
    return time_passes(functions, buffers)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("which", PASSES)
@pytest.mark.parametrize("case", _cases(), ids=str)
def test_op(replay, case: Case, which: str, contender: str):
    if contender == "compiled" and COMPILED == "none":
        pytest.skip("torch.compile is left out: PROCON_BENCHMARK_COMPILE")
    samples = _measure(case)[which]
    rows, size = case.shape.rows, case.shape.size
    work = throughput(
        samples.seconds[contender],
        formula=f"{UNITS[which]} U, U = N * D * itemsize",
        moved=UNITS[which] * case.shape.unit,
        flops=(4 if which == "both" else 2) * rows * size * case.directions,
    )
    replay(f"op {case} {which}", samples, contender, BASELINE, **work)
