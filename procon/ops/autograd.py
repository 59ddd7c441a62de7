"""Gradients of the fused ops.

What is kept for backward are coefficients ``[N, K]``, the directions and, for RMSNorm, what any RMSNorm saves: never a
copy of the hidden states.

Coefficients and directions are kept on the context, not among the saved tensors. Gradient checkpointing drops those and
makes them again by another forward within backward, when other anchors may be due: the coefficients of the forward that
made the penalty are the ones to use, and are small. :func:`constrain` and :func:`rms_norm_constrain` save the same
tensors as the identity and :func:`rms_norm`, so that other forward needs no penalty.
"""

from typing import Any

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops import backends


def _refuse_second_derivative() -> None:
    """Raise ProConError if a backward is to be differentiated, which plain tensors would take for 0."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ProConError(
            "the projection penalty has no second derivative: leave it out of what create_graph=True covers"
        )


def _version(tensor: Tensor | None) -> int:
    """Counts the changes in place; 0 if nothing counts them."""
    if tensor is None or torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version


def _direction(ctx: Any) -> Any:
    """The directions, whose changes torch does not count where they are kept."""
    if _version(ctx.direction) != ctx.version:
        raise ProConError("direction was changed in place between forward and backward: give the op a clone of it")
    return ctx.direction


class Project(torch.autograd.Function):
    """``hidden [..., D]``, ``direction [K, D]`` -> projection ``[N, K]``."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return backends.project(backend, hidden, direction)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        _refuse_second_derivative()
        (direction,) = ctx.saved_tensors
        gradient = backends.accumulate_gradient(ctx.backend, None, None, gradients[0], direction, ctx.dtype)
        return gradient.view(ctx.shape), None, None


class Constrain(torch.autograd.Function):
    """``hidden [..., D]`` -> ``hidden`` itself and the penalty, summed or of each token ``[N]``.

    The backward adds the penalty's gradient to the one that arrives for the hidden states in the write that it makes
    anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        direction: Tensor,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str,
        reach: Tensor | None,
        per_token: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        tokens, ctx.coefficient = backends.penalize(backend, hidden, direction, anchor, weight, penalty, reach)
        ctx.set_materialize_grads(False)
        ctx.direction, ctx.version = direction, _version(direction)
        ctx.shape, ctx.dtype, ctx.backend = hidden.shape, hidden.dtype, backend
        return hidden, tokens if per_token else tokens.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_penalty = gradients
        if grad_penalty is not None:
            _refuse_second_derivative()
            arriving = ctx.backend, grad_hidden, grad_penalty
            gradient = backends.accumulate_gradient(*arriving, ctx.coefficient, _direction(ctx), ctx.dtype)
            grad_hidden = gradient.view(ctx.shape)
        return grad_hidden, *(None,) * 7


class RmsNormConstrain(torch.autograd.Function):
    """``hidden [..., D]``, ``norm_weight [D]`` -> normed states ``[..., D]`` and the penalty.

    The penalty is summed, or of each token ``[N]``; then too its gradient has to be one number for all of them. The
    norm's backward writes the gradient of the hidden states anyway, and adds the penalty's to it before it rounds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        norm_weight: Tensor,
        eps: float,
        casting: str,
        offset: float,
        direction: Tensor | None,
        anchor: Tensor | None,
        weight: Tensor | None,
        penalty: str,
        reach: Tensor | None,
        per_token: bool,
        backend: str,
    ) -> tuple[Tensor, Tensor]:
        normed, inverse_rms, tokens, ctx.coefficient = backends.rms_norm_penalize(
            backend, hidden, norm_weight, eps, casting, offset, direction, anchor, weight, penalty, reach
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, norm_weight, inverse_rms)
        ctx.direction, ctx.version = direction, _version(direction)
        ctx.offset, ctx.backend = offset, backend
        return normed.view(hidden.shape), tokens if per_token else tokens.sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_normed, grad_penalty = gradients
        _refuse_second_derivative()
        hidden, norm_weight, inverse_rms = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        grad_hidden = grad_weight = None
        if grad_penalty is not None and grad_penalty.dim():
            # Of no tokens it multiplies nothing.
            grad_penalty = grad_penalty[0] if grad_penalty.shape[0] else grad_penalty.sum()
        if grad_normed is not None:
            saved = hidden, norm_weight, inverse_rms, ctx.coefficient, _direction(ctx), ctx.offset
            arriving = ctx.backend, grad_normed, grad_penalty
            grad_hidden, grad_weight = backends.rms_norm_gradient(*arriving, *saved, needs_weight)
        elif grad_penalty is not None:
            saved = ctx.coefficient, _direction(ctx), hidden.dtype
            grad_hidden = backends.accumulate_gradient(ctx.backend, None, grad_penalty, *saved)
        if grad_hidden is not None:
            grad_hidden = grad_hidden.view(hidden.shape)
        return grad_hidden if needs_hidden else None, grad_weight if needs_weight else None, *(None,) * 10
