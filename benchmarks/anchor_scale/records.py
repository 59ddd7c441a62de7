"""What was measured, on what, and by which command: the figures that the arithmetic starts from."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.study.record import provenance

HERE = Path(__file__).parent

#: What ``simulate`` writes, and what ``costs`` does.
SIMULATION, COSTS = HERE / "simulation.json", HERE / "costs.json"

#: The ratios that are taken from result files of pytest-benchmark: beginning of the group, and contender.
RATIOS = {
    "record": ("anchors of an epoch", "record"),
    "recorded": ("training step", "recorded"),
    "live": ("training step", "live"),
    "probes": ("training step", "probes"),
    "default": ("training step", "default"),
    "dpo_live": ("DPO step", "dpo_live"),
}


def made() -> dict[str, Any]:
    """Date, machine, versions and commit."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    packages = {name: version(name) for name in ("numpy", "safetensors", "xxhash")}
    return {**provenance(), "memory_bytes": memory, **packages}


class Line(NamedTuple):
    """Seconds per sequence: a part of them for each sequence, and a part for each byte of its anchors."""

    fixed: float
    per_byte: float

    @classmethod
    def through(cls, first: tuple[float, float], second: tuple[float, float]) -> Line:
        """From two lengths: (bytes, seconds) of each, the shorter first. Neither part is below 0."""
        slope = max((second[1] - first[1]) / (second[0] - first[0]), 0.0)
        return cls(max(first[1] - slope * first[0], 0.0), slope)

    def at(self, size: float) -> float:
        """Seconds for a sequence whose anchors have so many bytes."""
        return self.fixed + self.per_byte * size


@dataclass(frozen=True)
class Measured:
    """Of the simulation.

    Attributes:
        warm: a look-up of pages that are cached: median.
        cold: of pages that are not.
        write: processor's time to hash, check and write.
        verify: processor's time to read and verify.
        open_per_sequence: processor's seconds to open the store, over its sequences.
        exchange_bytes_per_second: from one process to another and onto its disk, by the processor's time of the busier
            one: a network is at best as fast.
        seen_bytes: memory that a recording takes for each sequence that it has recorded.
    """

    warm: Line
    cold: Line
    write: Line
    verify: Line
    open_per_sequence: float
    exchange_bytes_per_second: float
    seen_bytes: float

    @classmethod
    def of(cls, simulation: dict[str, Any]) -> Measured:
        short = 4 * simulation["tokens"] * simulation["sites"]
        long = 4 * simulation["long"]["tokens"] * simulation["sites"]
        counts = simulation["sequences"], simulation["long"]["sequences"]

        def lookup(kind: str) -> Line:
            return Line.through(
                (short, simulation["look_up"][kind]["median_seconds"]),
                (long, simulation["look_up_long"][kind]["median_seconds"]),
            )

        def processor(stage: str) -> Line:
            return Line.through(
                (short, simulation[stage]["cpu_seconds"] / counts[0]),
                (long, simulation[f"{stage}_long"]["cpu_seconds"] / counts[1]),
            )

        return cls(
            warm=lookup("warm"),
            cold=lookup("cold"),
            write=processor("write"),
            verify=processor("verify"),
            open_per_sequence=simulation["open_cold"]["cpu_seconds"] / counts[0],
            exchange_bytes_per_second=simulation["exchange"]["bytes"] / simulation["exchange"]["cpu_seconds"],
            seen_bytes=simulation["remember"]["resident_bytes"] / simulation["remember"]["sequences"],
        )


class Ratio(NamedTuple):
    """A time over that of plain training: median of paired ratios, its 95% interval, and where it is from."""

    median: float
    low: float
    high: float
    source: str

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


def read_ratios(results: Iterable[dict[str, Any]]) -> dict[str, Ratio]:
    """Those of :data:`RATIOS` that result files of pytest-benchmark have."""
    found = {}
    for result in results:
        machine = result["machine_info"]["procon"]
        suite = Path(result["benchmarks"][0]["fullname"].partition("::")[0]).name
        for benchmark in result["benchmarks"]:
            info = benchmark["extra_info"]
            for name, (group, contender) in RATIOS.items():
                if benchmark["group"].startswith(group) and info["contender"] == contender:
                    case, pairs = benchmark["group"].removeprefix(group).strip(), benchmark["stats"]["rounds"]
                    source = (
                        f"`{suite}`, {case.removeprefix('of ')}, {pairs} pairs, {result['datetime'][:10]}, "
                        f"{machine['device']}, threads: {machine['threads']}"
                    )
                    found[name] = Ratio(**info["ratios"][info["baseline"]], source=source)
    return found


def load_ratios(file: Path = COSTS) -> dict[str, Ratio]:
    """What :func:`read_ratios` found, as it was kept."""
    return {name: Ratio(**ratio) for name, ratio in json.loads(file.read_text()).items()}


def naive_ratios(page: str) -> dict[str, Ratio]:
    """Training steps with a second forward in eager code, from the text of ``docs/cost.md``; by the row's name.

    Raises:
        ValueError: if its table is not there.
    """
    rows = re.findall(r"^\| ((?:LoRA|full), \w+) \| ([\d.]+) \[([\d.]+), ([\d.]+)\]", page, re.MULTILINE)
    if not rows:
        raise ValueError("docs/cost.md has no table of training steps whose first column of ratios is the naive way's")
    return {name: Ratio(*map(float, numbers), source="[Cost](cost.md#timed)") for name, *numbers in rows}
