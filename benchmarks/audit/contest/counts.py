"""What a launch costs, counted from its build: per row, per turn of its loop, and per multiprocessor."""

import math
from collections import Counter
from dataclasses import dataclass

from triton import next_power_of_2

from benchmarks.audit.builds import Launch, build, resources
from benchmarks.audit.contest import assembly, ttgir
from benchmarks.audit.processors import PROCESSORS, occupancy

#: Tensors with no more rows than this are what all rows of the states share.
MOST_DIRECTIONS = 8


@dataclass(frozen=True)
class Counted:
    """One launch.

    Numbers "per row" are of all programs, loops and what is around them together, by the rows of the launch. Those
    "in loop" are of one turn of the loop over rows, or of a whole program if it has none.
    """

    kernel: str
    programs: int
    warps: int
    idle: float  # lanes of the tensor of rows that has most, in loads and stores
    rows_per_turn: float
    turns: float  # of the loop, per program
    instructions_per_row: float  # of warps
    barriers_per_row: float  # of a program
    shuffles_per_row: float  # of warps
    barriers_in_loop: float
    shuffles_in_loop: float
    asynchronous_copies_in_loop: float  # instructions of a thread
    asynchronous_bytes_in_loop: int
    loads_in_loop: dict[str, int]  # of what all rows share, by argument
    wide_relayouts_in_loop: int  # of more elements than the program has threads
    narrow_relayouts_in_loop: int
    relayouts_outside: int
    loaded_bytes_per_row: dict[str, float]
    stored_bytes_per_row: dict[str, float]
    memory_bytes: int  # each tensor once, as often as it is loaded and stored
    shared_bytes: int
    registers: int
    spilled_bytes: int
    occupancy: float
    blocks_per_multiprocessor: int


def counted(launch: Launch, target: str, rows: int, size: int) -> Counted:
    """``rows`` of ``size`` elements: what the launch is given."""
    processor = PROCESSORS[target]
    compiled = build(launch, processor)
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    program = ttgir.read(compiled.asm["ttgir"], launch, names)
    programs, warps = math.prod(launch.grid), compiled.metadata.num_warps
    ptx = assembly.by_turn(assembly.in_ptx(compiled.asm["ptx"]), program, 32 * warps)
    sass = assembly.per_turn(ptx, assembly.in_sass(assembly.disassembled(compiled.asm["cubin"])), program)
    turns = [programs, *(loop.turns for loop in program.loops)]
    registers, spilled = resources(compiled)
    filled = occupancy(processor, registers, warps, compiled.metadata.shared)

    loaded, stored = (_bytes_per_row(program, way, names, launch, turns, rows, size) for way in ("load", "store"))

    def per_row(counts: list[Counter], what: str) -> float:
        return sum(number[what] * times for number, times in zip(counts, turns, strict=True)) / rows

    loop = _row_loop(program)
    within = _within(program, loop)
    times = turns[0 if loop is None else loop + 1]

    def per_turn(what: str) -> float:
        return sum(ptx[number][what] * turns[number] for number in within) / times

    copies = [move for move in program.moves if move.asynchronous and move.way == "load" and _place(move) in within]
    relayouts = [each.elements > 32 * warps for each in program.relayouts if _place(each) in within]
    return Counted(
        kernel=launch.function.__name__,
        programs=programs,
        warps=warps,
        idle=_idle(program, names, launch, turns, rows, size),
        rows_per_turn=rows / times,
        turns=times / programs,
        instructions_per_row=per_row(sass, "instructions") * warps,
        barriers_per_row=per_row(ptx, "barriers"),
        shuffles_per_row=per_row(ptx, "shuffles") * warps,
        barriers_in_loop=per_turn("barriers"),
        shuffles_in_loop=per_turn("shuffles"),
        asynchronous_copies_in_loop=per_turn("asynchronous copies"),
        asynchronous_bytes_in_loop=sum(math.prod(move.shape) * move.itemsize for move in copies),
        loads_in_loop={} if loop is None else _shared_loads(program, launch, names, within, size),
        wide_relayouts_in_loop=sum(relayouts),
        narrow_relayouts_in_loop=len(relayouts) - sum(relayouts),
        relayouts_outside=len(program.relayouts) - len(relayouts),
        loaded_bytes_per_row=loaded,
        stored_bytes_per_row=stored,
        memory_bytes=_memory_bytes(loaded, launch, rows) + _memory_bytes(stored, launch, rows),
        shared_bytes=compiled.metadata.shared,
        registers=registers,
        spilled_bytes=spilled,
        occupancy=filled,
        blocks_per_multiprocessor=round(filled * processor.warps * processor.parts / warps),
    )


def _place(each: ttgir.Move | ttgir.Relayout) -> int:
    """Where it is in lists that begin with what is outside of all loops."""
    return 0 if each.loop is None else each.loop + 1


def _row_loop(program: ttgir.Program) -> int | None:
    """The loop over rows in which most bytes are loaded: not one over the columns, whose turns the compiler knows."""
    loaded = Counter()
    for move in program.moves:
        loop = move.loop
        while loop is not None and program.loops[loop].fixed:
            loop = program.loops[loop].outer
        if loop is not None and move.way == "load":
            loaded[loop] += math.prod(move.shape) * move.itemsize
    return max(loaded, key=loaded.__getitem__) if loaded else None


def _within(program: ttgir.Program, loop: int | None) -> list[int]:
    """The places of a loop and of those in it; of everything if there is none."""
    if loop is None:
        return list(range(len(program.loops) + 1))
    found = {loop}
    for number, each in enumerate(program.loops):
        if each.outer in found:
            found.add(number)
    return [number + 1 for number in sorted(found)]


def _shared_loads(
    program: ttgir.Program, launch: Launch, names: list[str], within: list[int], size: int
) -> dict[str, int]:
    found = Counter()
    for move in program.moves:
        tensor = launch.arguments[names[move.argument]]
        if move.way == "load" and _place(move) in within and _is_shared(tensor.shape, size):
            found[names[move.argument]] += 1
    return dict(found)


def _is_shared(shape: tuple[int, ...], size: int) -> bool:
    """A norm's weight or directions, and not one of the many rows."""
    return len(shape) > 0 and shape[-1] == size and math.prod(shape) <= MOST_DIRECTIONS * size


def _bytes_per_row(
    program: ttgir.Program, way: str, names: list[str], launch: Launch, turns: list[int], rows: int, size: int
) -> dict[str, float]:
    moves = [move for move in program.moves if move.way == way]
    again = {move.argument for move in moves if move.loop is not None}
    padded = _padded(program, names, launch, turns, rows, size)
    found = Counter()
    for move in moves:
        tensor = launch.arguments[names[move.argument]]
        each_row = tensor.shape[:1] == (rows,)
        # Before a loop, a tensor of all rows is prefetched: as much is left out in the last turns.
        if move.loop is None and move.argument in again and each_row:
            continue
        times = turns[_place(move)]
        number = math.prod(move.shape)
        if padded and move.shape[-1:] == (padded,):
            number = number // padded * size  # lanes beyond the row's end load nothing
        if each_row and tensor.numel() <= MOST_DIRECTIONS * rows:
            number = min(number, math.ceil(rows / times))  # all lanes of a row the same number
        found[names[move.argument]] += number * move.itemsize * times / rows
    return dict(found)


def _idle(program: ttgir.Program, names: list[str], launch: Launch, turns: list[int], rows: int, size: int) -> float:
    """The share of lanes beyond the end of a row, of the tensor ``[rows, size]`` that has most."""
    lanes = Counter()
    prefetched = {move.argument for move in program.moves if move.asynchronous}
    for move in program.moves:
        tensor = launch.arguments[names[move.argument]]
        if tensor.shape == (rows, size) and not (move.loop is None and move.argument in prefetched):
            lanes[move.argument, move.way] += math.prod(move.shape) * turns[_place(move)]
    whole = rows * size
    return max((1 - number // whole * whole / number for number in lanes.values()), default=0.0)


def _padded(
    program: ttgir.Program, names: list[str], launch: Launch, turns: list[int], rows: int, size: int
) -> int | None:
    """The length of rows in tiles, if it is more than ``size``."""
    length = next_power_of_2(size)
    for move in program.moves:
        tensor = launch.arguments[names[move.argument]]
        of_rows = tensor.numel() == rows * size and move.shape[-1:] == (length,)
        if length > size and of_rows and turns[_place(move)] * math.prod(move.shape) == rows * length:
            return length
    return None


def _memory_bytes(per_row: dict[str, float], launch: Launch, rows: int) -> int:
    """Of tensors that are moved more than once, one time."""
    sizes = {name: launch.arguments[name].numel() * launch.arguments[name].element_size() for name in per_row}
    return round(sum(min(sizes[name], number * rows) for name, number in per_row.items()))
