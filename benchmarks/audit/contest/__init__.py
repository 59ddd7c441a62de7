"""The static contest: our kernels and the peers' that do the same, compiled for the same GPUs, and counted.

Nothing runs. What is counted is in :mod:`.counts`; what a GPU would take for it is estimated in :mod:`.roofline`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from benchmarks.audit.contest import contestants
from benchmarks.audit.contest.counts import counted
from benchmarks.audit.contest.roofline import estimate

SIZES = (576, 2048, 4096, 8192)
TARGETS = ("sm_80", "sm_90", "sm_100")
WHO: dict[str, Callable[[str, int], Iterator[contestants.Contestant]]] = {
    "ours": contestants.ours,
    "liger": contestants.liger,
    "compiled": contestants.compiled,
}


def run(
    targets: Iterable[str] = TARGETS,
    sizes: Iterable[int] = SIZES,
    who: Iterable[str] = tuple(WHO),
    call: str = "",
) -> list[dict]:
    """``call``: what the names of calls begin with."""
    return [
        _record(contestant, target, size)
        for target in targets
        for size in sizes
        for name in who
        for contestant in WHO[name](target, size)
        if contestant.call.startswith(call)
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


def main_launch(record: dict) -> dict:
    """The launch that most bytes are loaded in."""
    return max(record["launches"], key=lambda launch: sum(launch["loaded_bytes_per_row"].values()))


def microseconds(record: dict) -> float:
    """At best, by :mod:`.roofline`."""
    return 1e6 * sum(estimate(launch, record["target"], contestants.ROWS).total for launch in record["launches"])


#: Heading, and what stands below it.
COLUMNS: dict[str, Callable[[dict], object]] = {
    "call": lambda record: record["call"],
    "K": lambda record: record["directions"] or "-",
    "by": lambda record: record["who"],
    "launches": lambda record: len(record["launches"]) + len(record["others"]),
    "instructions per row": lambda record: round(sum(each["instructions_per_row"] for each in record["launches"])),
    "barriers per turn": lambda record: main_launch(record)["barriers_in_loop"],
    "rows per turn": lambda record: f"{main_launch(record)['rows_per_turn']:.3g}",
    "shuffles": lambda record: main_launch(record)["shuffles_in_loop"],
    "async copies": lambda record: main_launch(record)["asynchronous_copies_in_loop"],
    "relayouts": lambda record: "{wide_relayouts_in_loop} + {narrow_relayouts_in_loop}".format(**main_launch(record)),
    "loads of r, v in loop": lambda record: sum(main_launch(record)["loads_in_loop"].values()),
    "bytes from L2 per row": lambda record: round(
        sum(number for launch in record["launches"] for number in launch["loaded_bytes_per_row"].values())
    ),
    "registers": lambda record: main_launch(record)["registers"],
    "spilled": lambda record: max(launch["spilled_bytes"] for launch in record["launches"]),
    "shared": lambda record: main_launch(record)["shared_bytes"],
    "blocks": lambda record: main_launch(record)["blocks_per_multiprocessor"],
    "us": lambda record: f"{microseconds(record):.0f}",
    "occupancy": lambda record: f"{main_launch(record)['occupancy']:.0%}",
}


def show(records: list[dict]) -> None:
    for target, size in dict.fromkeys((record["target"], record["size"]) for record in records):
        table = Table(title=f"Builds for {target}, bfloat16, {contestants.ROWS} rows of {size}")
        for heading in COLUMNS:
            table.add_column(heading, justify="left" if heading in ("call", "by") else "right")
        for record in records:
            if (record["target"], record["size"]) == (target, size):
                table.add_row(*(str(value(record)) for value in COLUMNS.values()))
        Console().print(table)
