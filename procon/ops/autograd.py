"""Gradients of the fused ops.

What is kept for backward are coefficients ``[N, K]``, the directions and, for RMSNorm, what any RMSNorm saves: never a
copy of the hidden states.

Coefficients and directions are kept on the context, not among the saved tensors. Gradient checkpointing drops those and
makes them again by another forward within backward, when other anchors may be due: the coefficients of the forward that
made the penalty are the ones to use, and are small. :func:`constrain` and :func:`rms_norm_constrain` save the same
tensors as the identity and :func:`rms_norm`, so that other forward needs no penalty.
"""

from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVarTuple, overload

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from procon.errors import ProConError
from procon.ops import operators
from procon.ops.operators import version_of

#: Since 2.15 the engine lets a backward add to the gradient that it has gathered for an input so far.
HAS_INPUT_GRAD_BUFFERS = hasattr(FunctionCtx, "input_grad_buffers")

Arguments = TypeVarTuple("Arguments")


class _Context(Protocol):
    """A ``FunctionCtx`` as these functions use it: the stubs leave out what the C++ side adds, and what a user sets."""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]
    #: Only if HAS_INPUT_GRAD_BUFFERS.
    input_grad_buffers: tuple[Tensor | None, ...]

    shape: torch.Size
    dtype: torch.dtype
    coefficient: Tensor
    direction: Any  # a tensor; None if RMSNorm alone is asked for
    version: int  # of the direction
    offset: float
    backend: str

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...

    def set_materialize_grads(self, value: bool) -> None: ...


class _MadeOf(torch.autograd.Function):
    """``tensor``, which in autograd's graph then comes of ``hidden``, whose memory it does not keep."""

    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, tensor: Tensor) -> Tensor:
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> tuple[None, None]:
        return None, None


def _made_of(hidden: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, through which :class:`_DifferentiableOnce` is found from ``hidden``. It takes no operation."""
    if torch.compiler.is_compiling() or not hidden.requires_grad:
        return tensor
    with torch.enable_grad():
        return _MadeOf.apply(hidden, tensor)


class _DifferentiableOnce(torch.autograd.Function):
    """A gradient as it is, made of ``sources``. Taking its derivative is an error; that of a plain tensor would be 0.

    Of all that the gradient depends on, because ``torch.autograd.grad`` leaves out what leads to none of its inputs.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: FunctionCtx, *gradients: Tensor) -> NoReturn:
        raise ProConError(
            "the projection penalty has no second derivative: leave it out of what create_graph=True covers"
        )


@overload
def _differentiable_once(operation: Callable[[*Arguments], Tensor], *arguments: *Arguments) -> Tensor: ...
@overload
def _differentiable_once(
    operation: Callable[[*Arguments], tuple[Tensor, Tensor]], *arguments: *Arguments
) -> tuple[Tensor, Tensor]: ...
def _differentiable_once(
    operation: Callable[[*Arguments], Tensor | tuple[Tensor, Tensor]], *arguments: *Arguments
) -> Tensor | tuple[Tensor, ...]:
    """A backward's result: one tensor, or several."""
    if not torch.is_grad_enabled():
        return operation(*arguments)
    with torch.no_grad():
        result = operation(*arguments)
    if torch.compiler.is_compiling():
        return result
    sources = [argument for argument in arguments if isinstance(argument, Tensor)]
    if isinstance(result, Tensor):
        return _DifferentiableOnce.apply(result.requires_grad_(), *sources)
    return tuple(_DifferentiableOnce.apply(tensor.requires_grad_(), *sources) for tensor in result)


class Project(torch.autograd.Function):
    """``hidden [..., D]``, ``direction [K, D]`` -> projection ``[N, K]``."""

    @staticmethod
    def forward(ctx: _Context, hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return operators.project(hidden, direction, backend)

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (grad_projection,) = gradients
        (direction,) = ctx.saved_tensors
        arguments = (None, None, grad_projection, direction, ctx.shape, ctx.dtype, ctx.backend)
        return _differentiable_once(operators.accumulate_gradient, *arguments), None, None


class Constrain(torch.autograd.Function):
    """``hidden [..., D]`` -> ``hidden`` itself and the penalty, summed or of each token ``[N]``.

    If the hidden states pass through, the backward adds the penalty's gradient to the one that arrives for them in
    the write that it makes anyway. If only the penalty is used, it adds to the engine's own buffer if there is one
    that it may write to, and else returns a gradient of its own.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        direction: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str,
        rounding: float,
        sides: str,
        per_token: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tokens, coefficient = operators.penalize(hidden, direction, anchor, weight, penalty, rounding, sides, backend)
        ctx.set_materialize_grads(False)
        ctx.coefficient, ctx.direction, ctx.version = _made_of(hidden, coefficient), direction, version_of(direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return hidden, tokens if per_token else tokens.sum()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_penalty = gradients
        if grad_penalty is not None:
            coefficient, direction = ctx.coefficient, _unchanged_direction(ctx)
            buffer = None if grad_hidden is not None else _writable_buffer(ctx)
            if buffer is not None:
                operators.add_gradient(buffer, grad_penalty, coefficient, direction, ctx.backend)
            else:
                arguments = (grad_hidden, grad_penalty, coefficient, direction, ctx.shape, ctx.dtype, ctx.backend)
                grad_hidden = _differentiable_once(operators.accumulate_gradient, *arguments)
        return grad_hidden, *(None,) * 8


def pass_through(hidden: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """:class:`Constrain` of ``hidden`` and what else it takes: the hidden states to go on with, and the penalty."""
    passed, penalty = Constrain.apply(hidden, *arguments)
    if HAS_INPUT_GRAD_BUFFERS and not torch.compiler.is_compiling():
        # The engine's own buffer takes the gradient in place, so nothing has to pass through.
        return hidden, penalty
    return passed, penalty


def _unchanged_direction(ctx: _Context) -> Any:
    """The directions, whose changes torch does not count where they are kept."""
    if ctx.direction is not None and version_of(ctx.direction) != ctx.version:
        raise ProConError("direction was changed in place between forward and backward: give the op a clone of it")
    return ctx.direction


def _writable_buffer(ctx: _Context) -> Tensor | None:
    """The gradient gathered for the hidden states so far, if the engine says that it may be added to in place."""
    if not HAS_INPUT_GRAD_BUFFERS or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return None
    buffer = ctx.input_grad_buffers[0]
    if buffer is None or buffer.dtype != ctx.dtype or buffer.shape != ctx.shape or not buffer.is_contiguous():
        return None
    return buffer


class RmsNormConstrain(torch.autograd.Function):
    """``hidden [..., D]``, ``norm_weight [D]`` -> normed states ``[..., D]`` and the penalty.

    The penalty is summed, or of each token ``[N]``; then too its gradient has to be one number for all of them. The
    norm's backward writes the gradient of the hidden states anyway, and adds the penalty's to it before it rounds.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        hidden: Tensor,
        norm_weight: Tensor,
        eps: float,
        casting: str,
        offset: float,
        direction: Tensor | None,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str,
        rounding: float,
        sides: str,
        per_token: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        normed, inverse_rms, tokens, coefficient = operators.rms_norm_penalize(
            hidden, norm_weight, eps, casting, offset, direction, anchor, weight, penalty, rounding, sides, backend
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, norm_weight, inverse_rms)
        ctx.coefficient, ctx.direction = coefficient, direction
        ctx.version = 0 if direction is None else version_of(direction)
        ctx.offset, ctx.backend = offset, backend
        return normed, tokens if per_token else tokens.sum()

    @staticmethod
    def backward(ctx: _Context, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_normed, grad_penalty = gradients
        hidden, norm_weight, inverse_rms = ctx.saved_tensors
        coefficient, direction = ctx.coefficient, _unchanged_direction(ctx)
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = grad_weight = None
        if grad_penalty is not None and grad_penalty.dim():
            # Of no tokens it multiplies nothing.
            grad_penalty = grad_penalty[0] if grad_penalty.shape[0] else grad_penalty.sum()
        if grad_normed is not None:
            saved = (hidden, norm_weight, inverse_rms, coefficient, direction)
            options = (ctx.offset, needs_weight, ctx.backend)
            grad_hidden, grad_weight = _differentiable_once(
                operators.rms_norm_gradient, grad_normed, grad_penalty, *saved, *options
            )
        elif grad_penalty is not None:
            coefficient = _made_of(hidden, coefficient)
            arguments = (None, grad_penalty, coefficient, direction, hidden.shape, hidden.dtype, ctx.backend)
            grad_hidden = _differentiable_once(operators.accumulate_gradient, *arguments)
        return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None, *(None,) * 11
