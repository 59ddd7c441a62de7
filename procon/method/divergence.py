"""How far a model has moved in what it says next: ``KL(start || model)``, over likely tokens and all others as one.

All is computed from differences of logarithms, so it is as right at 1e-6 nats as at 10, and nothing is clamped.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Below it, ``exp(d) - 1 - d`` is taken from its series: its terms cancel.
_SMALL = 1e-2


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Logarithms ``[N, k + 1]`` of the probabilities of ``tokens [N, k]`` and, last, of what all others add up to.

    Args:
        logits: ``[N, V]`` float32. If V is k, there are no others: the last is minus infinity.
    """
    return _Parts.apply(logits, tokens).log_softmax(1)


def divergence(start: Tensor, now: Tensor) -> Tensor:
    """``[N]``, in nats: ``KL(start || now)`` of log-probabilities ``[N, k + 1]`` that add up to 1 each.

    Each summand is ``q (exp(d) - 1 - d)`` of ``d = log p - log q``, and so at least 0, as both add up to 1. The
    gradient for ``now`` is ``p - q``, exactly, however far they are apart; none for ``start``.
    """
    return _Divergence.apply(start, now)


class _Parts(torch.autograd.Function):
    """Logits of some tokens, and the logarithm of the summed exponentials of all others: one copy of them is kept."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        others = logits.scatter(1, tokens, -torch.inf)
        rest = others.logsumexp(1, keepdim=True)
        ctx.save_for_backward(others, tokens, rest)
        return torch.cat([logits.gather(1, tokens), rest], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (gradient,), (others, tokens, rest) = gradients, ctx.saved_tensors
        found = (others - rest.masked_fill(rest == -torch.inf, 0)).exp_().mul_(gradient[:, -1:])
        return found.scatter_(1, tokens, gradient[:, :-1]), None


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, start: Tensor, now: Tensor) -> Tensor:
        p, q, d = now.exp(), start.exp(), now - start
        # p - q, of whose two forms each overflows where the other is taken.
        moved = torch.where(d > 0, -p * torch.expm1(-d), q * torch.expm1(d))
        series = q * d * d * (0.5 + d * (1 / 6 + d / 24))
        summands = torch.where(d.abs() < _SMALL, series, moved - q * d)
        none = q == 0  # q d is then 0, also if d is infinite or no number
        ctx.save_for_backward(torch.where(none, p, moved))
        return torch.where(none, p, summands).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, gradients[0][:, None] * ctx.saved_tensors[0]
