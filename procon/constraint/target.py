"""What a forward is constrained to, and what its constraint has come to."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from procon.ops.backends import choose_backend
from procon.ops.operators import folded
from procon.settings import Backend, Penalty, Sides, Units


class Placed(NamedTuple):
    """What the blocks on one device take of a target."""

    anchors: tuple[Tensor, ...]  # by column, [N, K], folded for the backend
    mask: Tensor  # [N]
    backend: str


@dataclass
class Target:
    """What one forward is constrained to, and the penalties that it has come to so far."""

    anchors: Tensor  # [blocks, B, T, K]
    mask: Tensor  # [B, T]
    penalty: Penalty
    units: Units
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
    #: By column: what a block was called with, and its version, until the block's norm is called.
    called_with: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _placed: dict[torch.device, Placed] = field(default_factory=dict)

    def on(self, device: torch.device, backend: Backend) -> Placed:
        """What the blocks on ``device`` take: moved and chosen once, whatever their number."""
        if (placed := self._placed.get(device)) is None:
            chosen = choose_backend(backend, device.type)
            anchors, mask = self.anchors.to(device), self.mask.to(device)
            anchors = folded(anchors.flatten(1, -2), -1, chosen)
            placed = self._placed[device] = Placed(anchors.unbind(), mask.flatten(), chosen)
        return placed

    def keep(self, column: int, tokens: Tensor) -> None:
        """Note the penalty of a block, by token."""
        kept = self.terms if torch.is_grad_enabled() else self.values
        kept[column] = tokens


@dataclass
class State:
    """What all constrained blocks of a model go by."""

    backend: Backend
    sides: Sides = "both"
    enabled: bool = True
    target: Target | None = None
    #: Of each block and forward, what :func:`procon.constraint.departure.typical_departure` gives; None if nobody asks.
    departures: list[Tensor] | None = None
    #: That of the last target, which may be released when blocks run again within backward; None before the first one.
    first_moving: int | None = None


def sums(terms: Sequence[Tensor], device: torch.device) -> Tensor:
    """``[blocks]`` on ``device``: the sum of each block's penalties over its tokens."""
    if any(term.shape != terms[0].shape for term in terms):  # some blocks have one number for all tokens
        terms = [term.sum(0, keepdim=True) for term in terms]
    return torch.stack([term.to(device) for term in terms]).sum(1)


def at_columns(values: Tensor, columns: Collection[int]) -> Tensor:
    """Those of ``values [blocks]`` that belong to ``columns``, in their order."""
    if [*columns] == [*range(len(values))]:
        return values
    # Not by a list of indices, which would be copied to the device.
    apart = values.unbind()
    return torch.stack([apart[column] for column in columns])


def on_device(copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    """A constant on ``device``, moved there once: ``copies`` of it are kept by device."""
    if device not in copies:
        copies[device] = next(iter(copies.values())).to(device)
    return copies[device]
