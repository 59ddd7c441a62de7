"""What is aimed at on a GPU, and whether it was reached."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from benchmarks.gpu_page.folder import Folder
from benchmarks.gpu_page.measured import Group, Shape, by_shape, ceilings, share
from benchmarks.harness.interleaved import Ratio

#: Least share of a clone's bandwidth, by pass, of the norm with the constraint at ``CONSTRAINED_SIZE``.
LEAST_SHARE = {"forward": 0.90, "backward": 0.80}
#: Most of Liger's time that the norm with the constraint takes there, forward and backward.
MOST_OF_LIGER = 1.02
#: Most of the plain step's time that a step of the 7B shape takes under LoRA.
MOST_OF_PLAIN = 1.00

#: Hidden size, and least number of tokens, that the goals for kernels are set for.
SIZE, ROWS = 4096, 8192
FROM_MEMORY = "cold"

Found = Iterator[tuple[str, Ratio]]


class Goal(NamedTuple):
    """A bound, and the figures that it is for, each with the place it was measured at."""

    words: str
    bound: float
    least: bool
    find: Callable[[Folder], Found]

    def judge(self, folder: Folder) -> Judgement:
        """By the worst of its figures."""
        found = sorted(self.find(folder), key=lambda item: item[1].median, reverse=not self.least)
        return Judgement(self, *found[0]) if found else Judgement(self, "", None)


class Judgement(NamedTuple):
    goal: Goal
    place: str
    figure: Ratio | None

    @property
    def verdict(self) -> str:
        if self.figure is None:
            return "not measured"
        reached = self.figure.median >= self.goal.bound if self.goal.least else self.figure.median <= self.goal.bound
        return "reached" if reached else "missed"


def in_goal(shape: Shape) -> bool:
    """Whether the goals for kernels are set for this shape."""
    return shape.size == SIZE and shape.rows >= ROWS and shape.cache == FROM_MEMORY


def _norms(folder: Folder, which: str) -> Iterator[tuple[Shape, Group]]:
    for shape, passes in by_shape(folder.groups("rms_norm_penalty")).items():
        if in_goal(shape) and "ours_constrained" in passes.get(which, {}):
            yield shape, passes[which]


def _share(which: str) -> Callable[[Folder], Found]:
    def find(folder: Folder) -> Found:
        clones = ceilings(folder.groups("clone"))
        for shape, group in _norms(folder, which):
            if shape in clones:
                yield str(shape), share(group["ours_constrained"], clones[shape])

    return find


def _over(contender: str) -> Callable[[Folder], Found]:
    def find(folder: Folder) -> Found:
        for shape, group in _norms(folder, "both"):
            if contender in group:
                yield str(shape), group["ours_constrained"].over(contender)

    return find


def _step(folder: Folder) -> Found:
    for name, group in folder.groups("training_step_7b").items():
        if "fused" in group:
            yield name.removeprefix("training step "), group["fused"].over("plain")


GOALS = (
    *(
        Goal(f"norm with the constraint, {which}: share of a clone's bandwidth", bound, True, _share(which))
        for which, bound in LEAST_SHARE.items()
    ),
    *(
        Goal(f"norm with the constraint over Liger's norm ({form}), both passes", MOST_OF_LIGER, False, _over(name))
        for form, name in (("Triton", "liger"), ("CuTe DSL", "liger_cute"))
    ),
    Goal("LoRA step of the 7B shape, constraint inside the norms, over the plain step", MOST_OF_PLAIN, False, _step),
)
