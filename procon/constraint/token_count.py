"""What a mean over constrained tokens divides by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from procon.errors import ProConError


def constrained_tokens(
    batches: Iterable[Mapping[str, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
    *,
    device: torch.device | str | None = None,
) -> Tensor:
    """What :meth:`ProjectionConstraint.penalty` divides by: the constrained tokens of an optimiser step, or 1.

    Of masks with weights other than 1, the sum of the weights.

    Args:
        batches: the step's micro-batches of this rank, as an AnchoredCollator makes them.
        reduce: gives the sum of a tensor over the ranks, such as ``accelerator.reduce``; not needed on one rank.
        device: where to count, and reduce; on the device of the batches if not given.

    Raises:
        ProConError: for a batch without ``constraint_mask``.
    """
    tokens = torch.zeros((), device=device)
    for batch in batches:
        if "constraint_mask" not in batch:
            raise ProConError("the batch has no anchors: make batches with an AnchoredCollator that has been given any")
        tokens = tokens + batch["constraint_mask"].sum().to(device)
    return _at_least_some(tokens if reduce is None else reduce(tokens))


def divisor(tokens: Tensor | float | None, mask: Tensor, device: torch.device) -> Tensor | float:
    """The number of tokens that a mean is over: those of ``mask`` if not given."""
    if tokens is None:
        tokens = _at_least_some(mask.sum())
    if isinstance(tokens, Tensor) and not (tokens.is_cpu and tokens.dim() == 0):  # one number need not be copied
        tokens = tokens.to(device)
    return tokens


def _at_least_some(tokens: Tensor) -> Tensor:
    """``tokens``, or 1 if there are none; weights may well add up to less."""
    # Not torch.where with a number, which would be copied to the device.
    return tokens + (tokens == 0)
