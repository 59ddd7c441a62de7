"""Methods that differ only in the strength of the constraint and the directions that it acts on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.study.plan import Method
from procon.schedule import AlphaSchedule

#: All settings but strength and directions, in a fixed order.
Recipe = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Sweep:
    """Methods of one recipe.

    Attributes:
        methods: by kind of directions (``refusal``, ``random``, ``within``, ``shuffled``) and alpha; the draws of a
            control are in one list.
    """

    recipe: Recipe
    methods: dict[str, dict[float, list[str]]]

    @property
    def alphas(self) -> list[float]:
        """All strengths."""
        return sorted({alpha for strengths in self.methods.values() for alpha in strengths})

    def title_among(self, sweeps: Sequence[Sweep]) -> str:
        """How this one differs from the others, for example ``units gap``; empty if there are none."""
        shared = set.intersection(*(set(sweep.recipe) for sweep in sweeps))
        differing = [(name, value) for name, value in self.recipe if (name, value) not in shared]
        return ", ".join(f"{name.removeprefix('procon_')} {value}" for name, value in differing)


@dataclass(frozen=True)
class Place:
    """Where a method stands in a sweep."""

    recipe: Recipe
    kind: str
    alpha: float

    @classmethod
    def of(cls, method: Method) -> Place | None:
        """None for a method without a constraint of constant strength."""
        schedule = method.config.get("procon_schedule", "")
        phases = AlphaSchedule.parse(schedule).phases if schedule else ()
        if len(phases) != 1:
            return None
        rest = {name: value for name, value in method.config.items() if name != "procon_schedule"}
        rest |= method.settings | {"defence": method.defence, "safety": method.safety, "length": method.length}
        recipe = tuple(sorted((name, str(value)) for name, value in rest.items()))
        return cls(recipe, method.directions.partition(":")[0], phases[0].alpha)


def find_sweeps(methods: Sequence[Method]) -> list[Sweep]:
    """The recipes among ``methods`` that have at least three strengths."""
    found: dict[Recipe, Sweep] = {}
    for method in methods:
        if place := Place.of(method):
            sweep = found.setdefault(place.recipe, Sweep(place.recipe, {}))
            sweep.methods.setdefault(place.kind, {}).setdefault(place.alpha, []).append(method.name)
    return [sweep for sweep in found.values() if len(sweep.alphas) > 2]
