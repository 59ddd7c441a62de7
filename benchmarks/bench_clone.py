"""How fast can tensors go through memory at all? The ceiling of kernels that do little but read and write.

``clone`` reads a tensor ``[N, D]`` and writes another: 2 U, with ``U = N * D * itemsize``, like the forward of a norm.
``add`` reads two and writes one: 3 U, like its backward. Tensors, caches and timers are those of the kernels' suites.
"""

from collections.abc import Callable
from functools import cache
from itertools import cycle

import pytest
import torch
from torch import Tensor

from benchmarks.harness.passes import Buffer, Shape, make_buffers, shapes, time_calls
from benchmarks.harness.throughput import throughput

UNITS = {"clone": 2, "add": 3}
CONTENDERS: dict[str, Callable[[Buffer], Tensor]] = {
    "clone": lambda buffer: buffer.hidden.clone(),
    "add": lambda buffer: torch.add(buffer.hidden, buffer.arriving[0]),
}


@cache
def _measure(shape: Shape):
    buffers = make_buffers(shape)

    def over_all(call: Callable[[Buffer], Tensor]) -> Callable[[], Tensor]:
        turn = cycle(buffers)
        return lambda: call(next(turn))

    with torch.no_grad():
        return time_calls({name: over_all(call) for name, call in CONTENDERS.items()})


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("shape", shapes(torch.float32), ids=str)
def test_clone(replay, shape: Shape, contender: str):
    samples = _measure(shape)
    work = throughput(
        samples.seconds[contender],
        formula=f"{UNITS[contender]} U, U = N * D * itemsize",
        moved=UNITS[contender] * shape.unit,
        flops=shape.rows * shape.size if contender == "add" else 0,
    )
    replay(f"clone {shape}", samples, contender, "clone", **work)
