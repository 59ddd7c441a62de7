"""What a kernel does to its tensors, by loop, read from Triton's GPU dialect: loads, stores, copies, changes of layout.

Bounds of loops are computed from the launch: the arguments, the grid and the number of each program.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.audit.builds import Launch

#: What no loop stands around.
OUTSIDE = None

_BYTES = {"i1": 1, "i8": 1, "i16": 2, "i32": 4, "i64": 8, "f16": 2, "bf16": 2, "f32": 4, "f64": 8}
_OPERATIONS = {
    "addi": np.add,
    "subi": np.subtract,
    "muli": np.multiply,
    "minsi": np.minimum,
    "maxsi": np.maximum,
    "divsi": lambda a, b: np.trunc(a / b).astype(np.int64),
    "divui": np.floor_divide,
    "ceildivsi": lambda a, b: -(-a // b),
    "remsi": np.fmod,
}
_CAST = re.compile(r"arith\.(?:extsi|extui|trunci|index_cast) (%[\w.#]+)")
_ARITHMETIC = re.compile(rf"arith\.({'|'.join(_OPERATIONS)}) (%[\w.#]+), (%[\w.#]+)")
_COMPARED = re.compile(r"arith\.cmpi (\w+), (%[\w.#]+), (%[\w.#]+)")
_SELECTED = re.compile(r"arith\.select (%[\w.#]+), (%[\w.#]+), (%[\w.#]+)")
_COMPARISONS = {"slt": np.less, "sle": np.less_equal, "sgt": np.greater, "sge": np.greater_equal, "eq": np.equal}
_LOOP = re.compile(r"scf\.for (?:unsigned )?%[\w.]+ = (%[\w.#]+) to (%[\w.#]+) step (%[\w.#]+)")
_MOVES = re.compile(
    r"(tt\.load|tt\.store|ttg\.async_copy_global_to_local|ttng\.async_tma_copy_\w+|tt\.descriptor_\w+) (%[\w.#]+)"
)


@dataclass(frozen=True)
class Move:
    """One instruction of the dialect that reads or writes global memory, for a whole program."""

    argument: int
    way: str  # "load" or "store"
    asynchronous: bool
    shape: tuple[int, ...]  # of the tile; () of one number
    itemsize: int
    loop: int | None


@dataclass(frozen=True)
class Relayout:
    """A ``ttg.convert_layout``."""

    elements: int
    loop: int | None


@dataclass(frozen=True)
class Loop:
    """``turns``: of all programs together. ``outer``: the loop around it. ``fixed``: the compiler knows the turns."""

    turns: int
    outer: int | None
    fixed: bool


@dataclass(frozen=True)
class Program:
    loops: list[Loop]
    moves: list[Move]
    relayouts: list[Relayout]


def read(code: str, launch: Launch, arguments: list[str]) -> Program:
    """``arguments``: those that the compiled function still has, in order.

    Raises:
        RuntimeError: for a loop whose bounds depend on what only a GPU would know.
    """
    lines = iter(_cleaned(code))
    header = next(line for line in lines if line.startswith("tt.func"))
    names = re.findall(r"(%[\w.]+): ", header)
    grid = (*launch.grid, 1, 1)[:3]
    programs = math.prod(grid)
    numbers = dict(zip("zyx", np.unravel_index(np.arange(programs), grid[::-1]), strict=True))
    values: dict[str, np.ndarray] = {}
    origin = {name: position for position, name in enumerate(names)}
    for name, argument in zip(names, arguments, strict=True):
        if isinstance(value := launch.arguments[argument], int):
            values[name] = np.asarray(value)

    constants: set[str] = set()
    found = Program([], [], [])
    around: list[int | None] = []  # of each open region, the loop that it belongs to
    for line in lines:
        inside = around[-1] if around else OUTSIDE
        if line.startswith("}"):
            if not around:
                break
            around.pop()
        if match := _LOOP.search(line):
            try:
                first, end, step = (values[name] for name in match.groups())
            except KeyError as unknown:
                raise RuntimeError(f"a loop whose bounds are not known before it runs: {line}") from unknown
            turns = np.broadcast_to(np.maximum(0, -(-(end - first) // step)), programs)
            outer_turns = 1 if inside is None else found.loops[inside].turns / programs
            fixed = all(name in constants for name in match.groups())
            found.loops.append(Loop(int(turns.sum() * outer_turns), inside, fixed))
            for carried, initial in re.findall(r"(%[\w.]+) = (%[\w.#]+)[,)]", line):
                if initial in origin:
                    origin[carried] = origin[initial]
            around.append(len(found.loops) - 1)
        elif "scf.while" in line:
            raise RuntimeError(f"a loop whose turns are not known before it runs: {line}")
        elif line.endswith("{"):
            around.append(inside)
        elif match := _MOVES.search(line):
            found.moves.append(_move(match[1], origin[match[2]], line, inside))
        elif "ttg.convert_layout" in line:
            found.relayouts.append(Relayout(math.prod(_tile(line)[0]), inside))
        if match := re.match(r"(%[\w.]+)(?::\d+)? = (.*)", line):
            _follow(match[1], match[2], values, origin, numbers, grid)
            if match[2].startswith("arith.constant"):
                constants.add(match[1])
    return found


def _cleaned(code: str) -> Iterator[str]:
    """Lines without where they come from."""
    for line in code.splitlines():
        yield re.sub(r' loc\((?:[^()"]|"[^"]*"|\((?:[^()]|\([^()]*\))*\))*\)', "", line).strip()


def _follow(
    name: str,
    made: str,
    values: dict[str, np.ndarray],
    origin: dict[str, int],
    numbers: Mapping[str, np.ndarray],
    grid: tuple[int, ...],
) -> None:
    """Notes the value of a whole number, and the argument that a pointer starts from."""
    if ("tt.ptr" in made or "tensordesc" in made) and not made.startswith("tt.load"):
        sources = {origin[operand] for operand in re.findall(r"%[\w.#]+", made) if operand in origin}
        if len(sources) == 1:
            (origin[name],) = sources
    elif found := re.match(r"arith\.constant (-?\d+) : (?:i32|i64|index)$", made):
        values[name] = np.asarray(int(found[1]))
    elif found := re.match(r"tt\.get_program_id ([xyz])", made):
        values[name] = numbers[found[1]]
    elif found := re.match(r"tt\.get_num_programs ([xyz])", made):
        values[name] = np.asarray(grid["xyz".index(found[1])])
    elif found := _CAST.match(made):
        if found[1] in values:
            values[name] = values[found[1]]
    elif found := _ARITHMETIC.match(made):
        if found[2] in values and found[3] in values:
            values[name] = _OPERATIONS[found[1]](values[found[2]], values[found[3]])
    elif found := _COMPARED.match(made):
        if found[1] in _COMPARISONS and found[2] in values and found[3] in values:
            values[name] = _COMPARISONS[found[1]](values[found[2]], values[found[3]])
    elif (found := _SELECTED.match(made)) and all(operand in values for operand in found.groups()):
        values[name] = np.where(*(values[operand] for operand in found.groups()))


def _move(operation: str, argument: int, line: str, loop: int | None) -> Move:
    shape, element = _tile(line)
    stores = "store" in operation or "local_to_global" in operation
    return Move(argument, "store" if stores else "load", "async" in operation, shape, _BYTES[element], loop)


def _tile(line: str) -> tuple[tuple[int, ...], str]:
    """Shape and element type that a line ends with."""
    types = line[line.rindex(" : ") :]
    if found := re.search(r"<((?:\d+x)+)(?:!tt\.ptr<)?(\w+)", types):
        return tuple(int(length) for length in found[1].split("x")[:-1]), found[2]
    return (), re.search(r"!tt\.ptr<(\w+)", types)[1]
