"""Gradients of the fused op, and its registration with ``torch.library``.

Both backends offer the same three functions on two-dimensional tensors: ``project``, ``penalize`` and
``accumulate_gradient`` (described in :mod:`procon.eager`). The autograd functions here save the coefficients ``[N, K]``
and the directions, never the hidden states.

Eager code calls the backend at once; under ``torch.compile`` the call goes through the registered operators, which a
graph can hold, because the dispatcher would cost an eager call as much again as the op's own launch.
"""

from collections.abc import Callable
from importlib import import_module
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from procon.errors import ProConError

_MODULES = {"eager": "procon.eager", "triton": "procon.kernels.projection_penalty"}
_library = torch.library.Library("procon", "DEF")


def _backend(name: str) -> ModuleType:
    return import_module(_MODULES[name])


def _rows(tensor: Tensor) -> Tensor:
    """``[..., D]`` as ``[N, D]`` with unit stride along ``D``; a view where the strides allow one."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _operator(schema: str, fake: Callable) -> Callable[[Callable], Callable]:
    """Register an implementation as ``procon::<name>``; the result calls the operator only while compiling."""
    name = schema.partition("(")[0]

    def register(implementation: Callable) -> Callable:
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"procon::{name}", fake, lib=_library)
        operator = getattr(torch.ops.procon, name).default

        def call(*arguments):
            return operator(*arguments) if torch.compiler.is_compiling() else implementation(*arguments)

        return call

    return register


def _fake_project(hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
    return direction.new_empty((hidden.numel() // hidden.shape[-1], direction.shape[0]))


@_operator("project(Tensor hidden, Tensor direction, str backend) -> Tensor", _fake_project)
def _project(hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
    return _backend(backend).project(_rows(hidden), direction)


def _fake_penalize(hidden, direction, anchor, weight, penalty, backend) -> tuple[Tensor, Tensor]:
    rows = hidden.numel() // hidden.shape[-1]
    return direction.new_empty((rows,)), direction.new_empty((rows, direction.shape[0]))


@_operator(
    "penalize(Tensor hidden, Tensor direction, Tensor? anchor, Tensor? weight, str penalty, str backend)"
    " -> (Tensor, Tensor)",
    _fake_penalize,
)
def _penalize(
    hidden: Tensor, direction: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: str, backend: str
) -> tuple[Tensor, Tensor]:
    return _backend(backend).penalize(_rows(hidden), direction, anchor, weight, penalty)


def _fake_accumulate_gradient(incoming, upstream, coefficient, direction, shape, dtype, backend) -> Tensor:
    return direction.new_empty(shape, dtype=dtype)


@_operator(
    "accumulate_gradient(Tensor? incoming, Tensor? upstream, Tensor coefficient, Tensor direction, SymInt[] shape,"
    " ScalarType dtype, str backend) -> Tensor",
    _fake_accumulate_gradient,
)
def _accumulate_gradient(
    incoming: Tensor | None,
    upstream: Tensor | None,
    coefficient: Tensor,
    direction: Tensor,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    incoming = None if incoming is None else _rows(incoming)
    gradient = _backend(backend).accumulate_gradient(incoming, upstream, coefficient, direction, dtype)
    return gradient.view(shape)


class _DifferentiableOnce(torch.autograd.Function):
    """Identity on a gradient; taking its derivative is an error, where a plain tensor would count as a constant."""

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_gradient: Tensor):
        raise ProConError(
            "the projection penalty has no second derivative: leave it out of what create_graph=True covers"
        )


def _gradient(
    ctx: FunctionCtx, incoming: Tensor | None, upstream: Tensor | None, coefficient: Tensor, direction: Tensor
) -> Tensor:
    with torch.no_grad():
        gradient = _accumulate_gradient(incoming, upstream, coefficient, direction, ctx.shape, ctx.dtype, ctx.backend)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _DifferentiableOnce.apply(gradient.requires_grad_())
    return gradient


class Project(torch.autograd.Function):
    """``hidden [..., D]``, ``direction [K, D]`` -> projection ``[N, K]``."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return _project(hidden, direction, backend)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_projection: Tensor):
        (direction,) = ctx.saved_tensors
        return _gradient(ctx, None, None, grad_projection, direction), None, None


class Constrain(torch.autograd.Function):
    """``hidden [..., D]`` -> ``hidden`` itself and the penalty, summed or of each token ``[N]``.

    Because the hidden states pass through, the backward adds the penalty's gradient to the one that arrives for them
    in the write that it makes anyway. Called for the penalty alone it is an ordinary loss.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden: Tensor,
        direction: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str,
        per_token: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tokens, coefficient = _penalize(hidden, direction, anchor, weight, penalty, backend)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(coefficient, direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return hidden, tokens if per_token else tokens.sum()

    @staticmethod
    def backward(ctx: FunctionCtx, grad_hidden: Tensor | None, grad_penalty: Tensor | None):
        if grad_penalty is not None:
            grad_hidden = _gradient(ctx, grad_hidden, grad_penalty, *ctx.saved_tensors)
        return grad_hidden, None, None, None, None, None, None
