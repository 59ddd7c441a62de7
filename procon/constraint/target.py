"""What a forward is constrained to, what its constraint has come to, and what a mean of it divides by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops import project
from procon.ops.backends import choose_backend
from procon.ops.functional import rounding
from procon.settings import Backend, Penalty

#: Four units in the last place of TF32, in which GPUs may multiply float32.
_TF32 = 2.0**-8


class Placed(NamedTuple):
    """What the blocks on one device take of a target."""

    anchors: tuple[Tensor, ...]  # by column, [N, K]
    mask: Tensor  # [N]
    backend: str


@dataclass
class Target:
    """What one forward is constrained to, and the penalties that it has come to so far."""

    anchors: Tensor  # [blocks, B, T, K]
    mask: Tensor  # [B, T]
    #: First block whose input training can move.
    first_moving: int
    #: Whether nothing is penalised: the forward is only to save what it saves when its blocks run again.
    idle: bool = False
    #: Whether the decoder ran with gradients.
    trained: bool = False
    #: By column of the anchors: the penalty of each token, [N], in the forward that trains, or of all in one, [1]; None
    #: if the block's input cannot move.
    terms: dict[int, Tensor | None] = field(default_factory=dict)
    #: By column: those of the last forward without gradients.
    values: dict[int, Tensor] = field(default_factory=dict)
    #: By column: what a block was called with, until the block's norm is called.
    called_with: dict[int, Tensor] = field(default_factory=dict)
    _placed: dict[torch.device, Placed] = field(default_factory=dict)

    def on(self, device: torch.device, backend: Backend) -> Placed:
        """What the blocks on ``device`` take: moved and chosen once, whatever their number."""
        if (placed := self._placed.get(device)) is None:
            anchors = self.anchors.to(device).flatten(1, -2).unbind()
            mask = self.mask.to(device).flatten()
            placed = self._placed[device] = Placed(anchors, mask, choose_backend(backend, device.type))
        return placed

    def keep(self, column: int, tokens: Tensor) -> None:
        """Note the penalty of a block, by token."""
        kept = self.terms if torch.is_grad_enabled() else self.values
        kept[column] = tokens


@dataclass
class State:
    """What all constrained blocks of a model go by."""

    penalty: Penalty
    backend: Backend
    enabled: bool = True
    target: Target | None = None
    #: Of each block and forward, what :func:`typical_departure` gives; None if nobody asks.
    departures: list[Tensor] | None = None
    #: That of the last target, which may be released when blocks run again within backward; None before the first one.
    first_moving: int | None = None


def sums(terms: Sequence[Tensor], device: torch.device) -> Tensor:
    """``[blocks]`` on ``device``: the sum of each block's penalties over its tokens."""
    if any(term.shape != terms[0].shape for term in terms):  # some blocks have one number for all tokens
        terms = [term.sum(0, keepdim=True) for term in terms]
    return torch.stack([term.to(device) for term in terms]).sum(1)


def on_device(copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    """A constant on ``device``, moved there once: ``copies`` of it are kept by device."""
    if device not in copies:
        copies[device] = next(iter(copies.values())).to(device)
    return copies[device]


@torch.no_grad()
def typical_departure(hidden: Tensor, vectors: Tensor, anchors: Tensor, mask: Tensor, backend: Backend) -> Tensor:
    """Median over a block's constrained tokens of how far they are from their anchors: 1 is as far as rounding takes.

    A scalar, NaN without tokens; waits for the device. Of several directions, the farthest counts. A median, as tokens
    a hundred times as long as others, such as a sequence's first, hand down the rounding of that length.

    Args:
        hidden: ``[..., D]``.
        vectors, anchors, mask: ``[K, D]``, ``[N, K]`` and ``[N]``.
    """
    constrained = mask > 0
    states = hidden.flatten(0, -2)[constrained]
    departures = project(states, vectors, backend=backend) - anchors[constrained]
    states = states.float()  # anchors are fp32, whatever the states are
    # The older question is an error once the newer setting was made.
    uses_tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" or torch.get_float32_matmul_precision() != "highest"
    share = max(rounding(hidden, "absolute"), rounding(states, "absolute"), _TF32 if uses_tf32 else 0)
    reach = share * torch.outer(*(torch.linalg.vector_norm(each, dim=1) for each in (states, vectors)))
    return (departures.abs() / reach).amax(1).median()


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
