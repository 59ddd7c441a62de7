"""Bytes and operations of a kernel per second, and what a copy reaches on the same machine."""

from collections.abc import Sequence
from statistics import median

from benchmarks.harness.machine import copy_bandwidth


def throughput(seconds: Sequence[float], *, formula: str, moved: int, flops: int) -> dict[str, object]:
    """Fields for a result file.

    Args:
        seconds: samples.
        formula: how ``moved`` was counted.
        moved: bytes that the computation has to read and write.
        flops: floating-point operations.
    """
    rate = moved / median(seconds)
    return {
        "bytes_formula": formula,
        "bytes": moved,
        "flops": flops,
        "gigabytes_per_second": rate / 1e9,
        "percent_of_copy": 100 * rate / copy_bandwidth(),
    }
