"""How far two judges agree, and on which replies they do not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Agreement:
    """Two judges' verdicts on the same replies, as a table of two by two.

    Attributes:
        judges: their names.
        both, first, second, neither: how many replies are refusals to both of them, to one alone, and to none.
        disagreements: places of the replies on which they differ, in :attr:`Evaluation.replies`.
    """

    judges: tuple[str, str]
    both: int
    first: int
    second: int
    neither: int
    disagreements: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        judges: tuple[str, str],
        first: Sequence[bool],
        second: Sequence[bool],
        *,
        places: Sequence[int] | None = None,
    ) -> Agreement:
        """Of verdicts on the same replies, in the same order; ``places`` says where these are, if not from 0 on."""
        pairs = list(zip(first, second, strict=True))
        places = range(len(pairs)) if places is None else places
        return cls(
            judges,
            *(pairs.count(pair) for pair in ((True, True), (True, False), (False, True), (False, False))),
            disagreements=tuple(place for place, (one, other) in zip(places, pairs, strict=True) if one != other),
        )

    @property
    def total(self) -> int:
        """How many replies both judged."""
        return self.both + self.first + self.second + self.neither

    @property
    def share(self) -> float:
        """The share of replies on which they agree, 0 to 1."""
        return (self.both + self.neither) / self.total

    @property
    def kappa(self) -> float | None:
        """Agreement beyond chance (Cohen 1960), at most 1; None if each judge says the same of all replies."""
        n = self.total
        # In whole numbers, so that chance alone gives exactly 0.
        chance = (self.both + self.first) * (self.both + self.second) + (self.neither + self.first) * (
            self.neither + self.second
        )
        return None if chance == n * n else (n * (self.both + self.neither) - chance) / (n * n - chance)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "judges": list(self.judges),
            "both": self.both,
            "first": self.first,
            "second": self.second,
            "neither": self.neither,
            "kappa": self.kappa,
            "disagreements": list(self.disagreements),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Agreement:
        """What :meth:`to_dict` was called on."""
        first, second = map(str, data["judges"])
        counts = [int(data[key]) for key in ("both", "first", "second", "neither")]
        if min(counts) < 0 or sum(counts) == 0:
            raise ValueError(f"judges that agree {counts} times")
        return cls((first, second), *counts, disagreements=tuple(map(int, data["disagreements"])))

    def __str__(self) -> str:
        kappa = "" if self.kappa is None else f", kappa {self.kappa:.2f}"
        return (
            f"{self.judges[0]} and {self.judges[1]} agree on {self.both + self.neither} of {self.total} replies"
            f"{kappa}. "
            f"Refusals to the first alone: {self.first}; to the second alone: {self.second}."
        )
