"""Times tiles for the kernels on a GPU and prints entries for ``kernels/launch.py``: ``python -m benchmarks.tune``.

For each power of two, an entry is the tile with the least time summed over the listed hidden
sizes from half of it on. Hidden states are bfloat16, cold in cache. The table's own choice is among the candidates.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import cycle
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from benchmarks.harness import machine
from benchmarks.harness.interleaved import Ratio, Samples, interleave
from benchmarks.harness.machine import DEVICE, last_level_cache
from benchmarks.harness.timers import gpu_time

SIZES = (576, 1024, 2048, 3584, 4096, 5120, 8192, 16384)
ROWS = 8192


class Choice(NamedTuple):
    """An entry of the table."""

    rows: int
    threads: int


def candidates(kernel: str, columns: int) -> Iterator[Choice]:
    """Tiles of up to 8192 elements, or one row, which is what RMSNorm backward takes; 8 to 32 elements per thread."""
    for rows in (1, 2, 4, 8, 16):
        elements = rows * columns
        if rows > 1 and (elements > 8192 or kernel == "norm_backward"):
            continue
        for threads in (32, 64, 128, 256, 512, 1024):
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
    norm, constraint = ("llama", 0.0), (direction, anchor, weight, "absolute", direction.norm(dim=1) / 256)
    _, inverse_rms, _, coefficient = rms_norm_penalize(next(rotation), norm_weight, 1e-5, *norm, *constraint)

    def forward() -> None:
        penalize(next(rotation), *constraint)
        rms_norm_penalize(next(rotation), norm_weight, 1e-5, *norm, *constraint)

    def norm_backward() -> None:
        hidden = next(rotation)
        rms_norm_gradient(arriving, one, hidden, norm_weight, inverse_rms, coefficient, direction, 0.0, True)

    return {"forward": forward, "norm_backward": norm_backward}


class Found(NamedTuple):
    """What was measured of one kernel at one hidden size."""

    kernel: str
    size: int
    columns: int  # of the table's entry that serves it
    listed: Choice  # by the table
    seconds: dict[Choice, float]  # medians
    listed_over_best: Ratio | None  # none if the GPU has too few resources for the listed one

    @property
    def best(self) -> Choice:
        return min(self.seconds, key=self.seconds.__getitem__)

    def record(self) -> dict[str, object]:
        """For a result file."""
        ranked = sorted(self.seconds.items(), key=lambda item: item[1])
        return self._asdict() | {
            "best": self.best,
            "seconds": [[*choice, seconds] for choice, seconds in ranked],
            "listed_over_best": self.listed_over_best and self.listed_over_best._asdict(),
        }


def measure(kernel: str, size: int) -> Found:
    """Time every candidate that the GPU has resources for."""
    import triton

    from procon.kernels import launch

    call = _calls(size)[kernel]
    columns = triton.next_power_of_2(size)
    target = launch.target_of(torch.empty(0, device=DEVICE))
    entries = launch.TABLE[kernel].get(target.architecture)
    rows = launch.whole_rows(kernel, size, torch.bfloat16.itemsize, target)
    listed = Choice(rows.rows, rows.threads)

    def with_choice(choice: Choice) -> Callable[[], None]:
        def run() -> None:
            launch.TABLE[kernel][target.architecture] = {columns: choice}
            _forget()
            call()

        return run

    choices = {
        f"{choice.rows} rows, {choice.threads} threads": choice
        for choice in dict.fromkeys([listed, *candidates(kernel, columns)])
    }
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
        if entries is None:
            launch.TABLE[kernel].pop(target.architecture, None)
        else:
            launch.TABLE[kernel][target.architecture] = entries
        _forget()
    return found(kernel, size, columns, choices, samples)


def _forget() -> None:
    """The choices made so far, which a change of the table does not reach by itself."""
    from procon.kernels import launch

    for choice in (launch.whole_rows, launch.forward_rows, launch.row_stream):
        choice.cache_clear()


def found(kernel: str, size: int, columns: int, choices: Mapping[str, Choice], samples: Samples) -> Found:
    """The result of ``samples``, which have names of ``choices``; the first of those is the listed one."""
    medians = {name: median(seconds) for name, seconds in samples.seconds.items()}
    listed = next(iter(choices))
    ratio = samples.ratio(listed, min(medians, key=medians.__getitem__)) if listed in medians else None
    by_choice = {choices[name]: seconds for name, seconds in medians.items()}
    return Found(kernel, size, columns, choices[listed], by_choice, ratio)


def best(times: Iterable[dict[Choice, float]]) -> Choice:
    """The tile with the least time summed over hidden sizes; only those that every size can run count."""
    times = list(times)
    common = set.intersection(*map(set, times))
    return min(common, key=lambda choice: sum(by_choice[choice] for by_choice in times))


def entries(results: Iterable[Found]) -> dict[str, dict[int, Choice]]:
    """Lines of the table, by kernel and longest row."""
    times: dict[str, dict[int, list[dict[Choice, float]]]] = {}
    for result in results:
        times.setdefault(result.kernel, {}).setdefault(result.columns, []).append(result.seconds)
    return {kernel: {columns: best(found[columns]) for columns in sorted(found)} for kernel, found in times.items()}


def write(results: list[Found], architecture: str, file: Path) -> None:
    """All that is measured so far."""
    content = {
        "machine": machine.describe(),
        "architecture": architecture,
        "rows": ROWS,
        "measured": [result.record() for result in results],
        "entries": entries(results),
    }
    file.write_text(json.dumps(content, indent=1))


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=str(__doc__).partition(":")[0])
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="hidden sizes D, the most important first")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured to this file, size by size")
    options = parser.parse_args(arguments)
    if DEVICE != "cuda":
        print("tuning needs a CUDA or ROCm GPU, and PyTorch finds none here", file=sys.stderr)
        sys.exit(2)
    import triton

    from procon.kernels import launch

    architecture = launch.target_of(torch.empty(0, device=DEVICE)).architecture
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    results = []
    for size in options.sizes:
        for kernel in launch.TABLE:
            result = measure(kernel, size)
            results.append(result)
            ranked = sorted(result.seconds.items(), key=lambda item: item[1])
            print(f"{kernel} D={size}: " + ", ".join(f"{tuple(c)} {1e6 * t:.1f} us" for c, t in ranked), flush=True)
            if options.json:
                write(results, architecture, options.json)
    for kernel, lines in entries(results).items():
        lines = ", ".join(f"{columns}: {tuple(choice)}" for columns, choice in lines.items())
        print(f'"{kernel}": {{"{architecture}": {{{lines}}}}},', flush=True)


if __name__ == "__main__":
    main()
