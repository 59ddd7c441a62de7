"""The static contest: our kernels and the peers' that do the same, compiled for the same GPUs, and counted.

Nothing runs. What is counted is in :mod:`.counts`; what a GPU would take for it is estimated in :mod:`.roofline`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.audit.contest import contestants
from benchmarks.audit.contest.counts import counted
from benchmarks.audit.contest.roofline import estimate
from benchmarks.audit.contest.table import COLUMNS, cells

#: Architecture and hidden size: all sizes for one, and all architectures at one.
SHAPES = (
    ("sm_90", 4096),
    ("sm_80", 4096),
    ("sm_100", 4096),
    ("sm_90", 2048),
    ("sm_90", 8192),
    ("sm_90", 576),
)
WHO: dict[str, Callable[[str, int, str], Iterator[contestants.Contestant]]] = {
    "ours": contestants.ours,
    "liger": contestants.liger,
    "compiled": contestants.compiled,
}


def run(shapes: Iterable[tuple[str, int]] = SHAPES, who: Iterable[str] = tuple(WHO), call: str = "") -> list[dict]:
    """``call``: what the names of calls begin with."""
    return [
        _record(contestant, target, size)
        for target, size in shapes
        for name in who
        for contestant in WHO[name](target, size, call)
    ]


def _record(contestant: contestants.Contestant, target: str, size: int) -> dict:
    launches = []
    for choices in contestant.launches:
        found = [asdict(counted(launch, target, contestants.ROWS, size)) for launch in choices]
        launches.append(min(found, key=lambda launch: estimate(launch, target, contestants.ROWS).total))
    return {
        "who": contestant.who,
        "call": contestant.call,
        "directions": contestant.directions,
        "target": target,
        "size": size,
        "launches": launches,
        "others": contestant.others,
    }


def show(records: list[dict]) -> None:
    """One table for each architecture and size; whole rows in a file or a pipe."""
    console = Console(width=None if sys.stdout.isatty() else 240)
    for target, size in dict.fromkeys((record["target"], record["size"]) for record in records):
        table = Table(title=f"Builds for {target}, bfloat16, {contestants.ROWS} rows of {size}")
        for heading in ("call", "K", "by", *COLUMNS):
            table.add_column(heading, justify="left" if heading in ("call", "by", "bound by") else "right")
        for record in records:
            if (record["target"], record["size"]) == (target, size):
                call = (record["call"], str(record["directions"] or "-"), record["who"])
                table.add_row(*call, *cells(record).values())
        console.print(table)
