"""Times of contenders as pytest-benchmark wrote them, their ratios, and their share of a clone's bandwidth."""

from __future__ import annotations

from typing import Any, NamedTuple

from benchmarks.draw import read_groups
from benchmarks.harness.interleaved import Ratio

#: By contender.
Group = dict[str, "Timing"]


class Timing(NamedTuple):
    """Seconds per call of one contender, and what its suite says of it."""

    median: float
    q1: float
    q3: float
    info: dict[str, Any]

    @property
    def rate(self) -> float:
        """Bytes per second that have to be read and written, whatever the contender moves."""
        return self.info["bytes"] / self.median

    def over(self, contender: str) -> Ratio:
        """This time over that of another contender of its group."""
        return Ratio(**self.info["ratios"][contender])


class Shape(NamedTuple):
    """Of ``[N, D]`` hidden states, as suites write it in the names of their groups."""

    rows: int
    size: int
    dtype: str
    cache: str

    def __str__(self) -> str:
        short = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
        return f"{self.rows} x {self.size} {short[self.dtype]}{', cached' if self.cache == 'hot' else ''}"


def shape_of(text: str) -> Shape:
    """Of a case such as ``8192x4096-bfloat16-cold``; what follows is another matter."""
    lengths, dtype, cache = text.split("-")[:3]
    rows, size = lengths.split("x")
    return Shape(int(rows), int(size), dtype, cache)


def timings(results: dict[str, Any]) -> dict[str, Group]:
    """The groups of a result file, in the order that they ran in."""
    return {
        name: {
            benchmark["extra_info"]["contender"]: _timing(benchmark["stats"], benchmark["extra_info"])
            for benchmark in group
        }
        for name, group in (read_groups(results) if results else {}).items()
    }


def _timing(stats: dict[str, float], info: dict[str, Any]) -> Timing:
    return Timing(stats["median"], stats["q1"], stats["q3"], info)


def ceilings(clones: dict[str, Group], contender: str = "clone") -> dict[Shape, Timing]:
    """The clone, or the addition, of each shape."""
    return {shape_of(name.split()[1]): group[contender] for name, group in clones.items() if contender in group}


def by_shape(groups: dict[str, Group], directions: int | None = None) -> dict[Shape, dict[str, Group]]:
    """The groups of a kernels' suite by shape and pass; of the op, those with so many directions."""
    found: dict[Shape, dict[str, Group]] = {}
    for name, group in groups.items():
        _, case, which = name.split()
        if directions is None or case.endswith(f"-k{directions}"):
            found.setdefault(shape_of(case), {})[which] = group
    return found


def share(timing: Timing, ceiling: Timing) -> Ratio:
    """Of the clone's bandwidth; quartiles in place of an interval, as both were timed in runs of their own."""
    return Ratio(*(timing.info["bytes"] / seconds / ceiling.rate for seconds in (timing.median, timing.q3, timing.q1)))
