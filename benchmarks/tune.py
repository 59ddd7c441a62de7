"""Times tiles for the kernels on a GPU and prints entries for ``kernels/launch.py``: ``python -m benchmarks.tune``.

For each power of two that a row is padded to, an entry is the tile with the least time summed over the listed hidden
sizes that it serves. Hidden states are bfloat16, cold in cache.
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from itertools import cycle
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.harness.interleaved import interleave
from benchmarks.harness.machine import DEVICE, last_level_cache
from benchmarks.harness.timers import gpu_time

SIZES = (576, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
ROWS = 8192


class Choice(NamedTuple):
    """An entry of the table."""

    rows: int
    threads: int


def candidates(columns: int) -> Iterator[Choice]:
    """Tiles of 2048 to 8192 elements, or one row; 8 to 32 elements per thread."""
    for rows in (1, 2, 4, 8, 16):
        elements = rows * columns
        if rows > 1 and not 2048 <= elements <= 8192:
            continue
        for threads in (128, 256, 512, 1024):
            if 8 <= elements / threads <= 32:
                yield Choice(rows, threads)


def _calls(size: int) -> dict[str, Callable[[], object]]:
    """One call per kernel of the table: all launches that its entry decides, with the constraint."""
    from procon.kernels.projection_penalty import penalize
    from procon.kernels.rms_norm_penalty import rms_norm_gradient, rms_norm_penalize

    count = max(2, math.ceil(last_level_cache() / (2 * ROWS * size)))
    rotation = cycle([torch.randn(ROWS, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(count)])
    arriving = torch.randn(ROWS, size, device=DEVICE, dtype=torch.bfloat16)
    direction = torch.nn.functional.normalize(torch.randn(1, size, device=DEVICE), dim=1)
    anchor, weight = torch.randn(ROWS, 1, device=DEVICE), torch.ones(ROWS, device=DEVICE)
    norm_weight, one = torch.ones(size, device=DEVICE, dtype=torch.bfloat16), torch.ones((), device=DEVICE)
    norm, constraint = ("llama", 0.0), (direction, anchor, weight, "squared")
    _, inverse_rms, _, coefficient = rms_norm_penalize(next(rotation), norm_weight, 1e-5, *norm, *constraint)

    def forward() -> None:
        penalize(next(rotation), *constraint)
        rms_norm_penalize(next(rotation), norm_weight, 1e-5, *norm, *constraint)

    def norm_backward() -> None:
        hidden = next(rotation)
        rms_norm_gradient(arriving, one, hidden, norm_weight, inverse_rms, coefficient, direction, 0.0, True)

    return {"forward": forward, "norm_backward": norm_backward}


def measure(kernel: str, size: int) -> dict[Choice, float]:
    """Median seconds of every candidate that the GPU has resources for."""
    import triton

    from procon.kernels import launch

    call = _calls(size)[kernel]
    columns = triton.next_power_of_2(size)
    architecture = launch.target_of(torch.empty(0, device=DEVICE)).architecture
    listed = launch.TABLE[kernel].get(architecture)

    def with_choice(choice: Choice) -> Callable[[], None]:
        def run() -> None:
            launch.TABLE[kernel][architecture] = {columns: choice}
            launch.row_tile.cache_clear()
            call()

        return run

    choices = {f"{choice.rows} rows, {choice.threads} threads": choice for choice in candidates(columns)}
    runs = {}
    try:
        for name, choice in choices.items():
            run = with_choice(choice)
            try:
                run()
            except triton.runtime.errors.OutOfResources:
                continue
            runs[name] = run
        samples = interleave(runs, gpu_time, rounds=9, sample_seconds=2e-3, most_calls=16)
    finally:
        if listed is None:
            launch.TABLE[kernel].pop(architecture, None)
        else:
            launch.TABLE[kernel][architecture] = listed
        launch.row_tile.cache_clear()
    return {choices[name]: median(seconds) for name, seconds in samples.seconds.items()}


def best(times: dict[int, dict[Choice, float]]) -> Choice:
    """The tile with the least time summed over hidden sizes; only those that every size can run count."""
    common = set.intersection(*(set(by_choice) for by_choice in times.values()))
    return min(common, key=lambda choice: sum(by_choice[choice] for by_choice in times.values()))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.partition(":")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="hidden sizes D")
    options = parser.parse_args(arguments)
    if DEVICE != "cuda":
        print("tuning needs a CUDA or ROCm GPU, and PyTorch finds none here", file=sys.stderr)
        sys.exit(2)
    import triton

    from procon.kernels import launch

    architecture = launch.target_of(torch.empty(0, device=DEVICE)).architecture
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    for kernel in launch.TABLE:
        by_columns: dict[int, dict[int, dict[Choice, float]]] = {}
        for size in sorted(options.sizes):
            times = by_columns.setdefault(triton.next_power_of_2(size), {})[size] = measure(kernel, size)
            ranked = sorted(times.items(), key=lambda item: item[1])
            print(f"{kernel} D={size}: " + ", ".join(f"{tuple(c)} {1e6 * t:.1f} us" for c, t in ranked), flush=True)
        entries = ", ".join(f"{columns}: {tuple(best(times))}" for columns, times in by_columns.items())
        print(f'"{kernel}": {{"{architecture}": {{{entries}}}}},', flush=True)


if __name__ == "__main__":
    main()
