"""The static contest: our kernels and the peers' that do the same, compiled for the same GPUs, and counted.

Nothing runs. What is counted is in :mod:`.counts`; what a GPU would take for it is estimated in :mod:`.roofline`.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import product

from rich.console import Console
from rich.table import Table

from benchmarks.audit.contest import contestants
from benchmarks.audit.contest.counts import counted
from benchmarks.audit.contest.roofline import estimate
from benchmarks.audit.contest.table import COLUMNS, cells, shape_of

#: Architecture, hidden size and rows: many as in training, and few as probes have.
SHAPES = (
    *product(("sm_90",), (4096, 576, 2560, 5120, 8192), (16384, 320)),
    *product(("sm_80", "sm_100"), (4096,), (16384,)),
)
#: Of others.
PEERS = (
    *((target, 4096, 16384) for target in ("sm_90", "sm_80", "sm_100")),
    *product(("sm_90",), (576, 8192), (16384,)),
)
WHO: dict[str, Callable[[str, int, int, str], Iterator[contestants.Contestant]]] = {
    "ours": contestants.ours,
    "liger": contestants.liger,
    "compiled": contestants.compiled,
}


def run(shapes: Iterable[tuple[str, int, int]] = SHAPES, who: Iterable[str] = tuple(WHO), call: str = "") -> list[dict]:
    """``call``: what the names of calls begin with."""
    return [
        _record(contestant, *shape)
        for shape in shapes
        for name in who
        if name == "ours" or shape in PEERS
        for contestant in WHO[name](*shape, call)
    ]


def _record(contestant: contestants.Contestant, target: str, size: int, rows: int) -> dict:
    launches = []
    for choices in contestant.launches:
        found = [asdict(counted(launch, target, rows, size)) for launch in choices]
        launches.append(min(found, key=lambda launch: estimate(launch, target, rows).total))
    return {
        "who": contestant.who,
        "call": contestant.call,
        "directions": contestant.directions,
        "target": target,
        "size": size,
        "rows": rows,
        "launches": launches,
        "others": contestant.others,
    }


def show(records: list[dict]) -> None:
    """One table for each architecture and size; whole rows in a file or a pipe."""
    console = Console(width=None if sys.stdout.isatty() else 240)
    for shape in dict.fromkeys(shape_of(record) for record in records):
        target, size, rows = shape
        table = Table(title=f"Builds for {target}, bfloat16, {rows} rows of {size}")
        for heading in ("call", "K", "by", *COLUMNS):
            table.add_column(heading, justify="left" if heading in ("call", "by", "bound by") else "right")
        for record in records:
            if shape_of(record) == shape:
                call = (record["call"], str(record["directions"] or "-"), record["who"])
                table.add_row(*call, *cells(record).values())
        console.print(table)
