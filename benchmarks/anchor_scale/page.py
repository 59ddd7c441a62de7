"""``docs/scale.md``: the text of ``page.md`` with its tables and figures filled in."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from benchmarks.anchor_scale import tables
from benchmarks.anchor_scale.arithmetic import (
    INDEX_BYTES_IN_MEMORY,
    MODELS,
    PROBE_BATCH,
    PROBE_EVERY,
    PROBE_TOKENS,
    PROBES,
    probe_bytes,
    recorded_bytes,
)
from benchmarks.anchor_scale.drawing import BYTES
from benchmarks.anchor_scale.records import HERE, SIMULATION, Measured, load_ratios, naive_ratios
from benchmarks.anchor_scale.simulation import LOOKED_UP, REPEATS
from benchmarks.anchor_scale.wording import digits, in_bytes, in_seconds
from benchmarks.study.table import Table
from procon.files import write_text

#: Tokens per second over all ranks, in the example of what look-ups ask of a file system.
EXAMPLE_SPEED = 10**6


def write_page(folder: Path) -> list[Path]:
    """Write the page and its plot into the folder of pages; returns the files."""
    simulation = json.loads(SIMULATION.read_text(encoding="utf-8"))
    cost_page = (folder / "cost.md").read_text(encoding="utf-8")
    plot = write_text(BYTES.file(), folder / "assets" / f"{BYTES.name}.svg")
    return [write_text(compose(simulation, cost_page), folder / "scale.md"), plot]


def compose(simulation: dict[str, Any], cost_page: str) -> str:
    """The page as Markdown.

    Args:
        cost_page: the text of ``docs/cost.md``, whose ratios stand beside the arithmetic.
    """
    measured = Measured.of(simulation)
    middle_bytes = recorded_bytes(tables.TOKENS_PER_SEQUENCE, tables.MIDDLE.blocks)
    filled = {
        "size": tables.size_table(),
        "time": tables.time_table(),
        "check": tables.check_table(load_ratios(), naive_ratios(cost_page)),
        "disk": tables.disk_table(),
        "copies": tables.copies_table(),
        "network": tables.network_table(measured),
        "writing": tables.writing_table(measured),
        "opening": tables.opening_table(measured),
        "lookup": tables.lookup_table(measured),
        "copy": tables.copy_table(),
        "probe": tables.probe_table(),
        "crossing": tables.crossing_table(),
        "measured": _measured_table(simulation),
        "made": _made(simulation["made"]),
        "alt": BYTES.alt,
        "caption": BYTES.caption,
        "sequences": f"{simulation['sequences']:,}",
        "tokens": simulation["tokens"],
        "sites": simulation["sites"],
        "looked_up": f"{LOOKED_UP:,}",
        "repeats": REPEATS,
        "probes": PROBES,
        "probe_batch": PROBE_BATCH,
        "probe_tokens": PROBE_TOKENS,
        "probe_every": PROBE_EVERY,
        "step_tokens": f"{tables.STEP_TOKENS:,}",
        "per_sequence": tables.TOKENS_PER_SEQUENCE,
        "middle": tables.MIDDLE.name,
        "middle_sites": tables.MIDDLE.blocks,
        "exchange_rate": in_bytes(measured.exchange_bytes_per_second),
        "probe_bytes": " / ".join(in_bytes(probe_bytes(PROBES, PROBE_TOKENS, model)) for model in MODELS),
        "models": " / ".join(model.name for model in MODELS),
        "write_at": in_seconds(measured.write.at(middle_bytes)),
        "index_bytes": INDEX_BYTES_IN_MEMORY,
        "seen_bytes": f"{measured.seen_bytes:.0f}",
        "measured_lengths": f"{simulation['tokens']} and {simulation['long']['tokens']}",
        "opens": digits(EXAMPLE_SPEED / tables.TOKENS_PER_SEQUENCE),
        "read_rate": in_bytes(EXAMPLE_SPEED / tables.TOKENS_PER_SEQUENCE * middle_bytes),
    }
    text = (HERE / "page.md").read_text(encoding="utf-8")
    names = set(re.findall(r"{{(\w+)}}", text))
    if names != set(filled):
        raise ValueError(f"page.md and page.py differ in {sorted(names ^ set(filled))}")
    return re.sub(r"{{(\w+)}}", lambda name: _written(filled[name[1]]), text)


def _written(value: Table | str | int) -> str:
    return value.markdown() if isinstance(value, Table) else str(value)


def _measured_table(simulation: dict[str, Any]) -> Table:
    count, written = simulation["sequences"], simulation["write"]
    long = simulation["long"]["tokens"]

    def per_sequence(name: str, kind: str) -> str:
        return f"{simulation[name][kind] / count:.1f}"

    def lookup(name: str, kind: str) -> str:
        found = simulation[name][kind]
        return f"{in_seconds(found['median_seconds'])}, {in_seconds(found['p99_seconds'])}"

    def took(name: str) -> str:
        return f"{in_seconds(simulation[name]['cpu_seconds'])}, {in_seconds(simulation[name]['seconds'])}"

    rows = [
        ["bytes on the disk", f"{in_bytes(written['bytes'])} in {written['files']} files"],
        ["per sequence: projections; index and headers", _split(simulation)],
        [f"writing {written['sequences']:,} sequences: processor, clock", took("write")],
        ["memory while writing, at the peak", in_bytes(written["peak_bytes"])],
        ["opening, pages not cached: processor, clock", took("open_cold")],
        ["opening, pages cached: processor, clock", took("open_warm")],
        ["memory of the opened store, bytes per sequence", per_sequence("open_warm", "resident_bytes")],
        ["the same while it is opened, at the peak", per_sequence("open_warm", "peak_bytes")],
        ["look-up of a sequence, cached: median, 99th percentile", lookup("look_up", "warm")],
        ["the same from the disk", lookup("look_up", "cold")],
        [f"look-up of {long} tokens, cached: median, 99th percentile", lookup("look_up_long", "warm")],
        ["the same from the disk", lookup("look_up_long", "cold")],
        [
            "batches of 32 annotated, cached: clock per sequence",
            in_seconds(simulation["look_up"]["batch_seconds_per_sequence"]),
        ],
        *(
            [
                f"batches of 32, {_workers(workers)}: processor per sequence",
                in_seconds(simulation[f"load_{workers}"]["cpu_seconds_per_sequence"]),
            ]
            for workers in range(3)
        ),
        ["verifying all: processor, clock", took("verify")],
        ["verifying all: memory at the peak", in_bytes(simulation["verify"]["peak_bytes"])],
        ["keys that a recording keeps, bytes per sequence", f"{Measured.of(simulation).seen_bytes:.0f}"],
        [f"sending {in_bytes(simulation['exchange']['bytes'])} to another process: processor, clock", took("exchange")],
    ]
    return Table([f"{count:,} sequences", "measured"], rows)


def _split(simulation: dict[str, Any]) -> str:
    projections = simulation["write"]["projection_bytes"]
    rest = simulation["write"]["bytes"] - projections
    count = simulation["sequences"]
    return f"{projections / count:.0f} B; {rest / count:.2f} B"


def _workers(count: int) -> str:
    return "no worker" if not count else "one worker" if count == 1 else f"{count} forked workers"


def _made(made: dict[str, Any]) -> str:
    packages = ("python", "torch", "numpy", "safetensors", "xxhash")
    versions = ", ".join(f"{name} {made[name]}" for name in packages)
    return (
        f"{made['date'][:10]}, {made['machine']}, {in_bytes(made['memory_bytes'])} of memory; {versions}; "
        f"commit {made['commit']}."
    )
