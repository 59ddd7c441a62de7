"""Kernels of which is known what they do, and what the contest counts of them, printed as JSON.

A process of its own, because Triton chooses between compiler and interpreter when a kernel is declared.
"""

import json
from dataclasses import asdict

import torch
import triton
import triton.language as tl

from benchmarks.audit.builds import recorded
from benchmarks.audit.contest.counts import counted
from benchmarks.audit.contest.pretended import pretended

ROWS, PROGRAMS = 1000, 8


@triton.jit
def by_rows(
    x,
    norm_weight,
    y,
    N,
    D: tl.constexpr,
    TILE: tl.constexpr,
    STAGES: tl.constexpr,
    HOISTED: tl.constexpr,
    SUMS: tl.constexpr,
):
    """A row a turn, and a sum for each of ``SUMS``, one after the other. The weight is loaded once if ``HOISTED``."""
    column = tl.arange(0, TILE)
    v = tl.load(norm_weight + column, mask=column < D, other=0).to(tl.float32)
    for row in tl.range(tl.program_id(0), N, tl.num_programs(0), num_stages=STAGES):
        at = row.to(tl.int64) * D + column
        h = tl.load(x + at, mask=column < D, other=0).to(tl.float32)
        if not HOISTED:
            v = tl.load(norm_weight + column, mask=column < D, other=0, cache_modifier=".ca").to(tl.float32)
        for _ in tl.static_range(SUMS):
            h = h * tl.sum(h * v, axis=0)
        tl.store(y + at, h.to(tl.bfloat16), mask=column < D)


@triton.jit
def by_pairs(x, norm_weight, y, N, D: tl.constexpr):
    """Two rows a turn, for whose columns a vector has to be laid again in each."""
    column = tl.arange(0, D)
    for pair in range(tl.program_id(0), N // 2, tl.num_programs(0)):
        v = tl.load(norm_weight + column).to(tl.float32)
        at = (pair * 2 + tl.arange(0, 2))[:, None] * D + column[None, :]
        h = tl.load(x + at).to(tl.float32)
        tl.store(y + at, (h * v[None, :]).to(tl.bfloat16))


@triton.jit
def by_pieces(x, norm_weight, y, N, D: tl.constexpr, TILE: tl.constexpr):
    """A row a program, read twice in pieces: loops of which the compiler knows the turns."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    for start in tl.range(0, D, TILE):
        total += tl.load(x + row * D + start + column).to(tl.float32)
    s = tl.sum(total, axis=0)
    for start in tl.range(0, D, TILE):
        h = tl.load(x + row * D + start + column, eviction_policy="evict_first").to(tl.float32)
        tl.store(y + row * D + start + column, (h * s).to(tl.bfloat16))


PLAIN = {"D": 1024, "TILE": 1024, "STAGES": 1, "HOISTED": True, "SUMS": 1}
LAUNCHES = {
    "plain": (by_rows, PROGRAMS, PLAIN),
    "two sums": (by_rows, PROGRAMS, PLAIN | {"SUMS": 2}),
    "prefetched": (by_rows, PROGRAMS, PLAIN | {"STAGES": 2}),
    "weight in the loop": (by_rows, PROGRAMS, PLAIN | {"HOISTED": False}),
    "too few registers": (by_rows, PROGRAMS, PLAIN | {"D": 8192, "TILE": 8192, "maxnreg": 32}),
    "padded": (by_rows, PROGRAMS, PLAIN | {"D": 576}),
    "laid again": (by_pairs, PROGRAMS, {"D": 1024}),
    "in pieces": (by_pieces, ROWS, {"D": 4096, "TILE": 128}),
}


def main() -> None:
    found = {}
    for name, (kernel, programs, options) in LAUNCHES.items():
        with pretended("sm_90"), recorded() as launches:
            x = torch.empty(ROWS, options["D"], dtype=torch.bfloat16)
            weight = torch.empty(options["D"], dtype=torch.bfloat16)
            kernel[(programs,)](x, weight, torch.empty_like(x), ROWS, num_warps=4, **options)
        found[name] = asdict(counted(launches[0], "sm_90", ROWS, options["D"]))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
