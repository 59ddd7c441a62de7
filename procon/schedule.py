"""The strength of the constraint, alpha, over training."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from procon.errors import ProConError

_PHASE = re.compile(r"(?P<alpha>[^@\s]+)(?:@(?P<length>[\d.]+(?:[eE][+-]?\d+)?)(?P<unit>ep|steps))?")

_GRAMMAR = "'procon_s', 'procon_wu', 'procon_wu:ALPHA@4ep', or phases such as '1@2ep,0.1@200steps,0'"

#: Alpha throughout, if none is given.
_ALPHA = 0.2

#: Below this, float32 has no room for what alpha multiplies: it would be 0, and the constraint off, without a word.
_LEAST_ALPHA = float(2**-100)

#: More steps or epochs than anyone trains.
_GREATEST_LENGTH = 1e12


@dataclass(frozen=True)
class Phase:
    """Constant ``alpha`` for ``length`` epochs or steps, at least one step; a length of None lasts to the end."""

    alpha: float
    length: float | None = None
    unit: Literal["ep", "steps"] = "ep"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ProConError(f"alpha is {self.alpha:g}: give a finite number, 0 or more")
        if 0 < self.alpha < _LEAST_ALPHA:
            raise ProConError(
                f"alpha is {self.alpha:g}, too small for float32, so nothing is constrained: give 0 or more"
            )
        if self.length is None:
            return
        if not 0 < self.length <= _GREATEST_LENGTH:
            raise ProConError(f"a schedule phase is {self.length:g} {self.unit} long: give a positive length")
        if self.unit == "steps" and self.length != int(self.length):
            raise ProConError(f"a schedule phase is {self.length:g} steps long: give a whole number, or epochs (ep)")

    def steps(self, steps_per_epoch: int) -> float:
        """Length in optimiser steps."""
        if self.length is None:
            return math.inf
        if self.unit == "steps":
            return self.length
        # Rounded first: 0.7 epochs of 10 steps are 7, though 0.7 * 10 is a little more in floating point.
        return max(1, math.ceil(round(self.length * steps_per_epoch, 6)))

    def __str__(self) -> str:
        """Text that :meth:`AlphaSchedule.parse` reads as this phase."""
        alpha = _number(self.alpha)
        return alpha if self.length is None else f"{alpha}@{_number(self.length)}{self.unit}"


@dataclass(frozen=True)
class AlphaSchedule:
    """A step schedule (paper section III-C2): phases one after the other, the last one to the end.

    Attributes:
        phases: the phases in order.
        extra: how many of them, from the first, are added to the training length asked for: the warm-up of
            ProCon_wu comes before the normal epochs, not out of them.
    """

    phases: tuple[Phase, ...]
    extra: int = 0

    def __post_init__(self) -> None:
        if not self.phases:
            raise ProConError(f"the alpha schedule is empty: give {_GRAMMAR}")
        if any(phase.length is None for phase in self.phases[: max(self.extra, len(self.phases) - 1)]):
            raise ProConError("only the last phase of an alpha schedule may have no length: add @Nep or @Nsteps")
        if any(phase.alpha == 0 for phase in self.phases[: self.extra]):
            raise ProConError(
                "the warm-up of an alpha schedule has alpha 0, so it would train longer and constrain nothing: give an "
                "alpha above 0, or schedule '0' to switch the constraint off"
            )

    @classmethod
    def constant(cls, alpha: float = _ALPHA) -> AlphaSchedule:
        """ProCon_s: the same ``alpha`` throughout (paper: 0.1 or 0.2)."""
        return cls((Phase(alpha),))

    @classmethod
    def warmup(cls, alpha: float = 1.0, epochs: float = 4) -> AlphaSchedule:
        """ProCon_wu: extra warm-up epochs under a strong ``alpha`` (paper: 1 or 2), then the normal ones without."""
        return cls((Phase(alpha, epochs), Phase(0.0)), extra=1)

    @classmethod
    def parse(cls, text: str) -> AlphaSchedule:
        """A schedule from a short string.

        ``procon_s`` or ``procon_s:ALPHA``; ``procon_wu`` or ``procon_wu:ALPHA@LENGTH``;
        or phases ``ALPHA@LENGTH`` joined by commas, where LENGTH is like ``2ep`` or ``300steps`` and the last phase
        needs none.

        Raises:
            ProConError: on anything else, and on a negative alpha.
        """
        name, colon, rest = text.strip().partition(":")
        if name == "procon_s":
            if not colon:
                return cls.constant()
            phase = _parse_phase(rest)
            if phase.length is not None:
                raise ProConError(f"alpha schedule {text!r} has a length, but procon_s lasts throughout: drop '@...'")
            return cls.constant(phase.alpha)
        if name == "procon_wu":
            if not colon:
                return cls.warmup()
            phase = _parse_phase(rest)
            return cls((phase, Phase(0.0)), extra=1) if phase.length else cls.warmup(phase.alpha)
        return cls(tuple(_parse_phase(part) for part in text.split(",")))

    def extra_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps on top of the training length asked for."""
        return int(sum(phase.steps(steps_per_epoch) for phase in self.phases[: self.extra]))

    def alpha(self, step: int, steps_per_epoch: int) -> float:
        """Alpha at optimiser step ``step``, counted from 0."""
        end = 0.0
        for phase in self.phases:
            end += phase.steps(steps_per_epoch)
            if step < end:
                return phase.alpha
        return self.phases[-1].alpha

    def constrained_steps(self, steps: int, steps_per_epoch: int) -> int:
        """Of the first ``steps`` optimiser steps, how many have an alpha above 0."""
        found, begin = 0, 0.0
        for number, phase in enumerate(self.phases):
            last = number == len(self.phases) - 1
            end = steps if last else min(steps, begin + phase.steps(steps_per_epoch))
            if phase.alpha > 0:
                found += max(0, int(end - begin))
            begin = end
        return found

    @property
    def active(self) -> bool:
        """Whether alpha is ever above 0."""
        return any(phase.alpha > 0 for phase in self.phases)

    def __str__(self) -> str:
        phases = ",".join(map(str, self.phases))
        return f"procon_wu:{self.phases[0]}" if self.extra else phases


def _number(value: float) -> str:
    short = f"{value:.15g}"
    return short if float(short) == value else repr(value)


def _parse_phase(text: str) -> Phase:
    match = _PHASE.fullmatch(text.strip())
    try:
        if match is None:
            raise ValueError
        alpha = float(match["alpha"])
        length = float(match["length"]) if match["length"] else None
    except ValueError:
        raise ProConError(f"alpha schedule {text!r} is not understood: give {_GRAMMAR}") from None
    return Phase(alpha, length, "steps" if match["unit"] == "steps" else "ep")
