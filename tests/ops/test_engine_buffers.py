"""When the penalty's gradient is added to the engine's own buffer: with a stand-in for the engine of torch 2.15.

``test_autograd.py`` has the same with the engine itself, and is skipped by earlier versions.
"""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from procon.ops import autograd, constrain
from procon.ops.autograd import Constrain

SHAPE = (2, 3, 8)


@pytest.fixture(autouse=True)
def _engine_has_buffers(monkeypatch):
    monkeypatch.setattr(autograd, "HAS_INPUT_GRAD_BUFFERS", True)


def context(buffer: Tensor | None, dtype: torch.dtype = torch.float32) -> SimpleNamespace:
    make = torch.Generator().manual_seed(2)
    coefficient, direction = torch.randn(6, 2, generator=make), torch.randn(2, 8, generator=make)
    return SimpleNamespace(
        coefficient=coefficient,
        direction=direction,
        version=direction._version,
        saved_tensors=(coefficient, direction),
        input_grad_buffers=(buffer, torch.zeros(SHAPE), *(None,) * 6),
        needs_input_grad=(True, *(False,) * 7),
        shape=torch.Size(SHAPE),
        dtype=dtype,
        backend="eager",
    )


@torch.no_grad()
def backward(ctx: SimpleNamespace, arriving: Tensor | None, upstream: float | None = 0.3) -> Tensor | None:
    gradient, *others = Constrain.backward(ctx, arriving, None if upstream is None else torch.tensor(upstream))
    assert others == [None] * len(others)
    return gradient


def penalty_gradient(ctx: SimpleNamespace) -> Tensor:
    return (0.3 * ctx.coefficient.double() @ ctx.direction.double()).view(SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_added_to_the_buffer(dtype):
    gathered = torch.randn(SHAPE).to(dtype)
    buffer = gathered.clone()
    ctx = context(buffer, dtype)
    assert backward(ctx, None) is None
    exact = gathered.double() + penalty_gradient(ctx)
    torch.testing.assert_close(buffer, exact.to(dtype))


@pytest.mark.parametrize(
    "buffer",
    [
        None,
        torch.zeros(SHAPE, dtype=torch.bfloat16),
        torch.zeros(6, 8),
        torch.zeros(8, 3, 2).permute(2, 1, 0),
        torch.zeros(1, 1, 8).expand(SHAPE),
    ],
    ids=["none", "another dtype", "another shape", "permuted", "expanded"],
)
def test_a_buffer_that_does_not_fit_is_left_alone(buffer):
    ctx = context(buffer)
    torch.testing.assert_close(backward(ctx, None).double(), penalty_gradient(ctx))
    assert buffer is None or not buffer.any()


def test_a_gradient_that_arrives_is_added_to_and_not_the_buffer():
    buffer, arriving = torch.zeros(SHAPE), torch.randn(SHAPE)
    before = arriving.clone()
    ctx = context(buffer)
    torch.testing.assert_close(backward(ctx, arriving).double(), arriving.double() + penalty_gradient(ctx))
    assert not buffer.any()
    assert torch.equal(arriving, before)


def test_without_the_penalty_nothing_is_added():
    buffer, arriving = torch.zeros(SHAPE), torch.randn(SHAPE)
    assert backward(context(buffer), arriving, upstream=None) is arriving
    assert backward(context(buffer), None, upstream=None) is None
    assert not buffer.any()


@pytest.mark.parametrize("reason", ["derivatives are recorded", "it is compiled", "earlier version"])
def test_no_buffer_is_written_to_if(monkeypatch, reason):
    if reason == "it is compiled":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    if reason == "earlier version":
        monkeypatch.setattr(autograd, "HAS_INPUT_GRAD_BUFFERS", False)
    buffer = torch.zeros(SHAPE)
    ctx = context(buffer)
    with torch.set_grad_enabled(reason == "derivatives are recorded"):
        gradient, *_ = Constrain.backward(ctx, None, torch.tensor(0.3))
    torch.testing.assert_close(gradient.detach().double(), penalty_gradient(ctx))
    assert not buffer.any()


def test_hidden_states_need_not_pass_through(monkeypatch):
    """A pass-through would make the engine gather the gradient before the op, where it cannot be added to."""
    hidden, direction = torch.randn(SHAPE, requires_grad=True), torch.randn(8)
    assert constrain(hidden, direction, backend="eager")[0] is hidden
    monkeypatch.setattr(autograd, "HAS_INPUT_GRAD_BUFFERS", False)
    passed, _ = constrain(hidden, direction, backend="eager")
    assert passed is not hidden
    assert passed.data_ptr() == hidden.data_ptr()
