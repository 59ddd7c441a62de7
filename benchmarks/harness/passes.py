"""Forward, backward, or both, of one differentiable function over buffers in rotation."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
import torch._functorch.config
from torch import Tensor

from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.machine import DEVICE, SMOKE, last_level_cache
from benchmarks.harness.timers import gpu_time, wall_time

PASSES = ("forward", "backward", "both")

#: Compiled code may not reuse the memory of saved tensors: the backward alone runs again and again over one graph.
repeatable_backward = torch._functorch.config.patch(donated_buffer=False)

Function = Callable[[Tensor], tuple[Tensor, ...]]


class Shape(NamedTuple):
    """An ``[N, D]`` tensor, and whether each call finds its input in the last-level cache."""

    rows: int
    size: int
    dtype: torch.dtype
    cache: str

    def __str__(self) -> str:
        return f"{self.rows}x{self.size}-{str(self.dtype).removeprefix('torch.')}-{self.cache}"

    @property
    def unit(self) -> int:
        """Bytes of the tensor."""
        return self.rows * self.size * self.dtype.itemsize


class Buffer(NamedTuple):
    hidden: Tensor
    arriving: tuple[Tensor, Tensor]  # for the hidden states, and for the penalty of those who give one


def shapes(smoke: torch.dtype) -> list[Shape]:
    """The tensors that kernels are timed on, the most telling first: a run may be stopped.

    Args:
        smoke: dtype of the only one of size smoke.
    """
    bf16, fp32 = torch.bfloat16, torch.float32
    if SMOKE:
        return [Shape(16, 64, smoke, "hot")]
    if DEVICE == "cuda":
        large = [Shape(rows, 4096, bf16, "cold") for rows in (8192, 32768)]
        others = [Shape(8192, size, bf16, "cold") for size in (8192, 2048, 576)]
        return [*large, *others, Shape(8192, 4096, fp32, "cold"), Shape(1024, 4096, bf16, "hot")]
    return [Shape(768, 576, dtype, cache) for dtype in (bf16, fp32) for cache in ("cold", "hot")]


def make_buffers(shape: Shape) -> list[Buffer]:
    """One pair of tensors, or for a cold cache as many as fill the last-level cache twice."""
    count = 1 if shape.cache == "hot" else max(2, math.ceil(last_level_cache() / shape.unit))
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random() -> Tensor:
        return torch.randn(shape.rows, shape.size, generator=generator, device=DEVICE).to(shape.dtype)

    one = torch.ones((), device=DEVICE)
    return [Buffer(random().requires_grad_(), (random(), one)) for _ in range(count)]


def run_forward(function: Function, buffer: Buffer) -> tuple[Tensor, ...]:
    # A block's input is never a leaf of the graph.
    return function(buffer.hidden.view_as(buffer.hidden))


def run_backward(
    outputs: tuple[Tensor, ...], buffer: Buffer, parameters: Sequence[Tensor], retain_graph: bool = False
) -> tuple[Tensor, ...]:
    """Gradients for the input and the parameters."""
    leaves, arriving = (buffer.hidden, *parameters), buffer.arriving[: len(outputs)]
    return torch.autograd.grad(outputs, leaves, arriving, retain_graph=retain_graph)


def time_calls(calls: Mapping[str, Callable[[], object]]) -> Samples:
    """Samples of each, on the GPU's clock if there is one."""
    return interleave(
        calls,
        gpu_time if DEVICE == "cuda" else wall_time,
        rounds=3 if SMOKE else 31,
        sample_seconds=1e-4 if SMOKE else 5e-3,
        most_calls=16,
    )


def time_passes(
    functions: dict[str, Function], buffers: list[Buffer], parameters: Sequence[Tensor] = ()
) -> dict[str, Samples]:
    """Samples of every function in each of the three passes."""

    def forward(function: Function) -> Callable[[], object]:
        turn = cycle(buffers)
        return lambda: run_forward(function, next(turn))

    def backward(function: Function) -> Callable[[], object]:
        turn = cycle([(run_forward(function, buffer), buffer) for buffer in buffers])
        return lambda: run_backward(*next(turn), parameters, retain_graph=True)

    def both(function: Function) -> Callable[[], object]:
        turn = cycle(buffers)

        def call() -> object:
            buffer = next(turn)
            return run_backward(run_forward(function, buffer), buffer, parameters)

        return call

    makers = zip(PASSES, (forward, backward, both), strict=True)
    return {
        name: time_calls({contender: make(function) for contender, function in functions.items()})
        for name, make in makers
    }
