"""How many microseconds does a call take on the host, if the tensors are too small to matter?

Forward and backward of each function of the library, and of a small model with and without the constraint attached. The
functions are compared with three autograd.Functions that check nothing and choose nothing, and with a norm:

- ``bare`` makes the same calls to the same backend: the time that ``procon`` takes beyond it is its host overhead;
- ``by_hand`` does the mathematics in the fewest operations, for one direction in float32;
- ``no_op`` does nothing;
- ``transformers`` is LlamaRMSNorm, which the fused norm takes the place of, without any constraint.

For each, the operations of PyTorch and the kernel launches of Triton are counted, and for the model those per block. On
a CPU the norms are timed on the tokens of a training step too, on one thread.

On a GPU too the time is the host's: the queue of launches is waited for only at the end of a sample.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks.harness.agreement import check_agreement
from benchmarks.harness.interleaved import Samples, interleave
from benchmarks.harness.machine import DEVICE, SMOKE
from benchmarks.harness.shapes import SHAPES, make_batch, make_directions, make_model
from benchmarks.harness.timers import wall_time
from procon import ProjectionConstraint
from procon.ops import constrain, rms_norm_constrain

if DEVICE == "cuda":
    import triton

    from procon.kernels import projection_penalty, rms_norm_penalty
else:
    from procon.eager import projection_penalty, rms_norm_penalty

TOKENS, SIZE, EPS = 4, 64, 1e-5


class _NoOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor) -> Tensor:
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_hidden: Tensor) -> Tensor:
        return grad_hidden


class _BareConstrain(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, direction: Tensor, anchor: Tensor, weight: Tensor):
        tokens, coefficient = projection_penalty.penalize(hidden, direction, anchor, weight, "squared")
        ctx.save_for_backward(coefficient, direction)
        return hidden, tokens.sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_hidden: Tensor, grad_penalty: Tensor):
        arguments = (grad_hidden, grad_penalty, *ctx.saved_tensors, grad_hidden.dtype)
        return projection_penalty.accumulate_gradient(*arguments), None, None, None


class _BareNormConstrain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, norm_weight: Tensor, direction: Tensor, anchor: Tensor, weight: Tensor
    ):
        rest = (EPS, "llama", 0.0, direction, anchor, weight, "squared")
        normed, inverse_rms, tokens, coefficient = rms_norm_penalty.rms_norm_penalize(hidden, norm_weight, *rest)
        ctx.save_for_backward(hidden, norm_weight, inverse_rms, coefficient, direction)
        return normed, tokens.sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_normed: Tensor, grad_penalty: Tensor):
        arguments = (grad_normed, grad_penalty, *ctx.saved_tensors, 0.0, True)
        return *rms_norm_penalty.rms_norm_gradient(*arguments), None, None, None


class _ConstrainByHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, direction: Tensor, anchor: Tensor, weight: Tensor):
        error = (torch.mv(hidden, direction) - anchor).masked_fill_(weight.logical_not(), 0.0)
        weighted = error * weight
        ctx.save_for_backward(weighted + weighted, direction)
        return hidden, torch.dot(weighted, error)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_hidden: Tensor, grad_penalty: Tensor):
        coefficient, direction = ctx.saved_tensors
        return torch.addr(grad_hidden, coefficient * grad_penalty, direction), None, None, None


class _NormConstrainByHand(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden: Tensor, norm_weight: Tensor, direction: Tensor, anchor: Tensor, weight: Tensor
    ):
        error = (torch.mv(hidden, direction) - anchor).masked_fill_(weight.logical_not(), 0.0)
        weighted = error * weight
        inverse_rms = torch.rsqrt(hidden.square().mean(1, keepdim=True) + EPS)
        ctx.save_for_backward(hidden, inverse_rms, norm_weight, weighted + weighted, direction)
        return hidden * inverse_rms * norm_weight, torch.dot(weighted, error)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_normed: Tensor, grad_penalty: Tensor):
        hidden, inverse_rms, norm_weight, coefficient, direction = ctx.saved_tensors
        unit = hidden * inverse_rms
        scaled = grad_normed * norm_weight
        gradient = inverse_rms * (scaled - unit * (scaled * unit).mean(1, keepdim=True))
        gradient.addr_(coefficient * grad_penalty, direction)
        return gradient, (grad_normed * unit).sum(0), None, None, None


def _calls(function: str, tokens: int = TOKENS, size: int = SIZE) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(DEVICE)

    hidden, arriving, one = random(tokens, size).requires_grad_(), random(tokens, size), torch.ones((), device=DEVICE)
    direction, anchor, weight = random(size), random(tokens), random(tokens)
    norm_weight = random(size).requires_grad_()
    # A block's input is never a leaf of the graph.
    passed = hidden.view_as(hidden)
    rest = (direction, anchor, weight)
    of_backend = (direction[None], anchor[:, None], weight)
    if function == "constrain":
        leaves = [hidden]
        functions = {
            "bare": lambda: _BareConstrain.apply(passed, *of_backend),
            "by_hand": lambda: _ConstrainByHand.apply(passed, *rest),
            "procon": lambda: constrain(passed, *rest),
        }
    else:
        leaves = [hidden, norm_weight]
        functions = {
            "bare": lambda: _BareNormConstrain.apply(passed, norm_weight, *of_backend),
            "by_hand": lambda: _NormConstrainByHand.apply(passed, norm_weight, *rest),
            "procon": lambda: rms_norm_constrain(passed, norm_weight, EPS, *rest),
        }

    def forward_and_backward(function: Callable[[], tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        return lambda: torch.autograd.grad(function(), leaves, (arriving, one))

    calls = {name: forward_and_backward(function) for name, function in functions.items()}
    calls["no_op"] = lambda: torch.autograd.grad(_NoOp.apply(passed), hidden, arriving)
    if function == "rms_norm_constrain":
        norm = LlamaRMSNorm(size, EPS)
        norm.weight = nn.Parameter(norm_weight.detach())
        calls["transformers"] = lambda: torch.autograd.grad(norm(passed), (hidden, norm.weight), arriving)
    return calls


class _Operations(TorchDispatchMode):
    """Counts the operations that PyTorch runs within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def _counts(call: Callable[[], object]) -> dict[str, int]:
    """Of one call: operations of PyTorch, and launches of Triton kernels, which are none of them."""
    call()
    launches = 0

    def launched(*_: object) -> None:
        nonlocal launches
        launches += 1

    with ExitStack() as undo:
        if DEVICE == "cuda":
            hooks = triton.knobs.runtime.launch_enter_hook
            hooks.add(launched)
            undo.callback(hooks.remove, launched)
        operations = undo.enter_context(_Operations())
        call()
    return {"operations": operations.count, "kernel_launches": launches}


def _interleave(calls: dict[str, Callable[[], object]]) -> Samples:
    seconds = 1e-4 if SMOKE else 10e-3
    return interleave(calls, wall_time, rounds=3 if SMOKE else 41, sample_seconds=seconds)


@cache
def _measure_function(function: str) -> Samples:
    calls = _calls(function)
    check_agreement({name: calls[name]() for name in ("bare", "by_hand", "procon")}, tolerance=1e-5)
    return _interleave(calls)


@pytest.mark.parametrize("contender", ["bare", "by_hand", "procon", "no_op", "transformers"])
@pytest.mark.parametrize("function", ["constrain", "rms_norm_constrain"])
def test_call(replay, function: str, contender: str):
    if contender == "transformers" and function == "constrain":
        pytest.skip("transformers has no such function")
    samples = _measure_function(function)
    counts = _counts(_calls(function)[contender])
    microseconds = 1e6 * median(samples.seconds[contender])
    replay(f"host overhead of {function}", samples, contender, "by_hand", microseconds_per_call=microseconds, **counts)


@cache
def _measure_norm(tokens: int, size: int) -> Samples:
    calls = _calls("rms_norm_constrain", tokens, size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _interleave({name: calls[name] for name in ("transformers", "procon")})
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU bench_rms_norm_penalty.py times the norms")
@pytest.mark.parametrize("contender", ["transformers", "procon"])
@pytest.mark.parametrize(("tokens", "size"), [(8, 64)] if SMOKE else [(768, 576), (4096, 512)])
def test_norm_on_one_thread(replay, tokens: int, size: int, contender: str):
    replay(f"norm of {tokens}x{size} on one thread", _measure_norm(tokens, size), contender, "transformers")


@cache
def _steps() -> dict[str, Callable[[], None]]:
    batch = make_batch("smoke", 1, 12, packed=False)
    anchors = torch.zeros(1, 12, SHAPES["smoke"]["num_hidden_layers"], device=DEVICE)
    mask = torch.ones(1, 12, device=DEVICE)

    def step(fuse: str | None) -> Callable[[], None]:
        model = make_model("smoke", torch.float32, "full")
        constraint = ProjectionConstraint(make_directions("smoke"), penalty="squared")
        if fuse is not None:
            constraint.attach(model, fuse=fuse)

        def call() -> None:
            if fuse is None:
                model(**batch).loss.backward()
                return
            constraint.set_target(anchors, mask)
            (model(**batch).loss + constraint.penalty()).backward()
            constraint.release()

        return call

    return {"plain": step(None), "pass_through": step("never"), "fused": step("auto")}


@cache
def _measure_attach() -> Samples:
    return _interleave(_steps())


@pytest.mark.parametrize("contender", ["plain", "pass_through", "fused"])
def test_attach(replay, contender: str):
    samples = _measure_attach()
    plain = samples.seconds["plain"]
    added = median(a - b for a, b in zip(samples.seconds[contender], plain, strict=True))
    blocks = SHAPES["smoke"]["num_hidden_layers"]
    counts = {name: _counts(_steps()[name]) for name in ("plain", contender)}
    per_block = {
        f"{what}_per_block": (counts[contender][what] - counts["plain"][what]) / blocks for what in counts["plain"]
    }
    replay(
        "host overhead of attach", samples, contender, "plain", microseconds_per_block=1e6 * added / blocks, **per_block
    )
