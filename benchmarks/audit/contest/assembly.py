"""What a compiled kernel executes, read from its PTX and its machine code (SASS), by loop.

A loop is what lies between a label and the last branch back to it. Of a branch, both ways count.
"""

import math
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

from triton import knobs

from benchmarks.audit.contest.ttgir import Program

#: Of the PTX ISA's instructions.
PTX = {
    "barriers": re.compile(r"\b(?:bar|barrier)(?:\.cta)?\.(?:sync|red)\b"),
    "shuffles": re.compile(r"\bshfl\.sync\b"),
    "asynchronous copies": re.compile(r"\bcp\.async(?:\.ca|\.cg|\.bulk(?!\.\w+_group)|\.bulk\.tensor)\b"),
    "loads": re.compile(r"\bld\.global\b|\bcp\.async(?:\.ca|\.cg|\.bulk(?!\.\w+_group))\b"),
    "stores": re.compile(r"\b(?:st|red|atom)\.global\b"),
}
#: Of the machine's.
SASS = {
    "instructions": re.compile(r"^(?!NOP\b)"),
    "loads": re.compile(r"^(?:LDG|LDGSTS|UBLKCP|UTMALDG)\b"),
    "stores": re.compile(r"^(?:STG|REDG?|ATOMG?|UTMASTG)\b"),
    "barriers": re.compile(r"^BAR\b"),
    "shuffles": re.compile(r"^SHFL\b"),
    "spills": re.compile(r"^(?:STL|LDL)\b"),
}

WAYS = ("load", "store")

#: What is counted outside of all loops (first), and in each loop without those inside it, in the order of their labels.
Counts = list[Counter]


def in_ptx(code: str) -> Counts:
    """Beside :data:`PTX`, ``load`` and ``store``: bytes that a thread moves from and to global memory."""
    label, branch = re.compile(r"(\$L__BB\w+):"), re.compile(r"\bbra\S*\s+(\$L__BB\w+);")
    moved = re.compile(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s")
    copied = re.compile(r"\bcp\.async\.c[ag]\.\S+ \[[^]]*\], \[[^]]*\], (0x\w+|\d+)")

    def count(line: str) -> Counter:
        found = _counted(PTX, line)
        if match := moved.search(line):
            found["load" if match[1] == "ld" else "store"] = int(match[2] or 1) * int(match[3]) // 8
        elif match := copied.search(line):
            found["load"] = int(match[1], 0)
        return found

    return _by_loop(code.splitlines(), label, branch, count)


def by_turn(ptx: Counts, program: Program, threads: int) -> Counts:
    """The counts for each loop of the dialect, per turn: the compiler unrolls loops whose turns it knows."""
    moved = [Counter()]
    for number in range(len(program.loops)):
        # Of a thread, at least: lanes may hold the same.
        found = Counter()
        for move in program.moves:
            if move.loop == number:
                found[move.way] += max(1, math.prod(move.shape) / threads) * move.itemsize
        moved.append(found)
    return _matched(moved, ptx, program)


def in_sass(code: str) -> Counts:
    """What :func:`disassembled` gives, up to the last ``EXIT``: behind it are the slow ways of a division."""
    statement = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?)\s*;")
    lines = code.splitlines()
    last = max(place for place, line in enumerate(lines) if re.search(r"\bEXIT\b", line))

    def count(line: str) -> Counter:
        found = statement.search(line)
        return _counted(SASS, found[1]) if found else Counter()

    label, branch = re.compile(r"^(\.L_x_\d+):"), re.compile(r"\bBRA\S*\s.*`\((\.L_x_\d+)\)")
    return _by_loop(lines[: last + 1], label, branch, count)


def per_turn(ptx: Counts, sass: Counts, program: Program) -> Counts:
    """Machine code for each loop of :func:`by_turn`: the assembler unrolls too, and adds a loop for what is left."""
    outside, *loops = sass
    for loop in loops:
        if not _moves(loop):  # waits for a copy: one turn
            outside = outside + loop
    moving = [loop for loop in loops if _moves(loop)]
    if sum(map(_moves, ptx[1:])) == 1:
        moving = sorted(moving, key=lambda loop: loop["loads"] + loop["stores"])[-1:]
    # Instructions have no bytes here: what is compared is how many there are.
    expected = [Counter({way: counts[f"{way}s"] for way in ("load", "store")}) for counts in ptx]
    seen = [Counter(counts, **{way: counts[f"{way}s"] for way in ("load", "store")}) for counts in [outside, *moving]]
    return _matched(expected, seen, program)


def disassembled(cubin: bytes) -> str:
    tool = Path(knobs.nvidia.cuobjdump.path).with_name("nvdisasm")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        return subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True).stdout


def _moves(counts: Counter) -> bool:
    return counts["loads"] + counts["stores"] > 0


def _matched(expected: list[Counter], seen: Counts, program: Program) -> Counts:
    """What is ``seen`` in loops, for each of those ``expected``, per turn. A loop of known turns may be unrolled.

    Loops are recognized by what they ``load`` and ``store``, whose ratio is also the number of turns in one.

    Raises:
        RuntimeError: if there is no such assignment.
    """
    outside, *left = seen
    moving = [number for number, counts in enumerate(expected) if number and counts["load"] + counts["store"]]
    fixed = [number for number in moving if program.loops[number - 1].fixed]
    left = [loop for loop in left if loop["load"] + loop["store"]]
    kept = [
        [number for number in moving if number not in unrolled]
        for unrolled in combinations(fixed, max(0, len(moving) - len(left)))
    ]
    kept = [numbers for numbers in kept if len(numbers) == len(left)]
    if not kept:
        raise RuntimeError(f"{len(moving)} loops became {len(left)}")

    def times(number: int, loop: Counter) -> float:
        return max(1, sum(loop[way] for way in WAYS) / sum(expected[number][way] for way in WAYS))

    def mismatch(numbers: list[int]) -> float:
        return sum(
            abs(loop[way] - round(times(number, loop)) * expected[number][way])
            for number, loop in zip(numbers, left, strict=True)
            for way in WAYS
        )

    found = [outside, *(Counter() for _ in expected[1:])]
    for number, loop in zip(min(kept, key=mismatch), left, strict=True):
        found[number] = _divided(loop, round(times(number, loop)))
    return found


def _divided(counts: Counter, times: float) -> Counter:
    return Counter({name: number / times for name, number in counts.items()})


def _counted(patterns: dict[str, re.Pattern], line: str) -> Counter:
    return Counter({name: 1 for name, pattern in patterns.items() if pattern.search(line)})


def _by_loop(lines: list[str], label: re.Pattern, branch: re.Pattern, count: Callable[[str], Counter]) -> Counts:
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    for place, line in enumerate(lines):
        if found := label.match(line):
            starts[found[1]] = place
        elif (found := branch.search(line)) and found[1] in starts:
            ends[found[1]] = place
    spans = [(starts[name], ends[name]) for name in starts if name in ends]
    counts = [Counter() for _ in range(len(spans) + 1)]
    for place, line in enumerate(lines):
        around = [number for number, (start, end) in enumerate(spans, 1) if start <= place <= end]
        innermost = max(around, key=lambda number: spans[number - 1][0], default=0)
        counts[innermost] += count(line)
    return counts
