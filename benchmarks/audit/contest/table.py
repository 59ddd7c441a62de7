"""The columns of the contest's tables."""

from collections.abc import Callable

from benchmarks.audit.contest.roofline import estimate


def shape_of(record: dict) -> tuple[str, int, int]:
    """Architecture, hidden size and rows."""
    return record["target"], record["size"], record["rows"]


def main_launch(record: dict) -> dict:
    """The launch that most bytes are loaded in."""
    return max(record["launches"], key=lambda launch: sum(launch["loaded_bytes_per_row"].values()))


def microseconds(record: dict) -> float:
    """At best, by :mod:`.roofline`, all launches."""
    return 1e6 * sum(estimate(launch, record["target"], record["rows"]).total for launch in record["launches"])


def _bound(record: dict) -> str:
    longest = max(record["launches"], key=lambda launch: estimate(launch, record["target"], record["rows"]).total)
    return estimate(longest, record["target"], record["rows"]).bound


def _idle(record: dict) -> str:
    """Of the launch that has most; not known of all kernels."""
    shares = [launch["idle"] for launch in record["launches"]]
    return "" if None in shares else f"{max(shares):.0%}"


def _loaded(record: dict) -> float:
    return sum(number for launch in record["launches"] for number in launch["loaded_bytes_per_row"].values())


#: Of a call, all launches together: "a row", launches, "spilled" and "at best". Of its main launch: the rest.
COLUMNS: dict[str, Callable[[dict], object]] = {
    "launches": lambda record: len(record["launches"]) + len(record["others"]),
    "instructions a row": lambda record: round(sum(each["instructions_per_row"] for each in record["launches"])),
    "idle lanes": _idle,
    "rows in a turn": lambda record: main_launch(record)["rows_per_turn"],
    "barriers in a turn": lambda record: main_launch(record)["barriers_in_loop"],
    "shuffles in a turn": lambda record: main_launch(record)["shuffles_in_loop"],
    "async copies in a turn": lambda record: main_launch(record)["asynchronous_copies_in_loop"],
    "relayouts in a turn": lambda record: "{wide_relayouts_in_loop} + {narrow_relayouts_in_loop}".format(
        **main_launch(record)
    ),
    "loads of r, v in a turn": lambda record: sum(main_launch(record)["loads_in_loop"].values()),
    "bytes loaded a row": lambda record: round(_loaded(record)),
    "registers": lambda record: main_launch(record)["registers"],
    "spilled": lambda record: max(launch["spilled_bytes"] for launch in record["launches"]),
    "shared bytes": lambda record: main_launch(record)["shared_bytes"],
    "blocks": lambda record: main_launch(record)["blocks_per_multiprocessor"],
    "occupancy": lambda record: f"{main_launch(record)['occupancy']:.0%}",
    "at best, us": lambda record: round(microseconds(record)),
    "bound by": _bound,
}


def cells(record: dict) -> dict[str, str]:
    values = {heading: value(record) for heading, value in COLUMNS.items()}
    return {heading: f"{value:.3g}" if isinstance(value, float) else str(value) for heading, value in values.items()}
