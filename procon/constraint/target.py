"""What a forward is constrained to, and what its constraint has come to."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from procon.settings import DEFAULTS, Backend, Penalty, Sides, Units


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
    #: By column of the anchors: penalties of the forward that trains; None if the block's input cannot move.
    terms: dict[int, Tensor | None] = field(default_factory=dict)
    #: By column: penalties of the last forward without gradients.
    values: dict[int, Tensor] = field(default_factory=dict)
    #: By column: what a block was called with, and its version, until the block's norm is called.
    called_with: dict[int, tuple[Tensor, int]] = field(default_factory=dict)
    _moved: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Anchors and mask on ``device``: moved once, whatever the number of blocks there."""
        if device not in self._moved:
            self._moved[device] = self.anchors.to(device), self.mask.to(device)
        return self._moved[device]

    def keep(self, column: int, term: Tensor) -> None:
        """Note the penalty of a block."""
        kept = self.terms if torch.is_grad_enabled() else self.values
        kept[column] = term


@dataclass
class State:
    """What all constrained blocks of a model go by."""

    backend: Backend
    sides: Sides = DEFAULTS.sides
    enabled: bool = True
    target: Target | None = None
    #: That of the last target, which may be released when blocks run again within backward; None before the first one.
    first_moving: int | None = None


def on_device(copies: dict[torch.device, Tensor], device: torch.device) -> Tensor:
    """A constant on ``device``, moved there once: ``copies`` of it are kept by device."""
    if device not in copies:
        copies[device] = next(iter(copies.values())).to(device)
    return copies[device]
