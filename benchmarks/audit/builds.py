"""Ahead-of-time builds for real GPUs: registers, spills, width of loads and stores, shared memory, occupancy.

Each launch of the library is taken as it stands, tile and warps included, and compiled for the target in the launch's
place, with what Triton would know about the arguments: which pointers and integers are divisible by 16, which integers
are 1.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import JITFunction, knobs
from triton.compiler import ASTSource, CompiledKernel, compile

from benchmarks.audit.calls import calls
from benchmarks.audit.processors import PROCESSORS, Processor, occupancy
from benchmarks.audit.widths import widths
from procon.kernels import launch as table
from procon.settings import MAX_DIRECTIONS

ROWS = 37


class Shape(NamedTuple):
    size: int
    directions: int = 1
    dtype: torch.dtype = torch.bfloat16
    penalty: str = "squared"
    casting: str = "llama"


SHAPES = (
    *(Shape(size) for size in (576, 1024, 2048, 3584, 4096, 5120, 8192, 16384)),
    *(Shape(size, dtype=torch.float32) for size in (8192, 16384)),
    Shape(576, directions=4),
    Shape(5120, directions=2),
    Shape(8192, directions=3),
    Shape(8192, directions=2, dtype=torch.float32),
    Shape(4096, directions=8, dtype=torch.float32),
    *(Shape(size, directions=8, penalty="absolute") for size in (8192, 16384)),
    Shape(20480, penalty="absolute"),
    Shape(576, dtype=torch.float16, penalty="absolute"),
    Shape(3584, penalty="squared", casting="gemma"),
)

#: Widths that models have, up to twice that of the widest.
_WIDTHS = (64, 128, 256, 576, 896, 1024, 1536, 2048, 2560, 3584, 4096, 5120, 7168, 8192, 12288, 16384, 20480, 32768)
EVERY = tuple(
    Shape(size, directions, dtype, "absolute")
    for size in _WIDTHS
    for dtype in (torch.bfloat16, torch.float32)
    for directions in range(1, MAX_DIRECTIONS + 1)
)


@dataclass(frozen=True)
class Access:
    """All loads, or all stores, of one ``[N, D]`` tensor in a kernel."""

    tensor: str
    way: str
    narrowest_bytes: int
    instructions: int


@dataclass(frozen=True)
class Record:
    target: str
    call: str
    size: int
    directions: int
    dtype: str
    penalty: str
    casting: str
    tile: dict[str, int]
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float  # resident warps over the most that a multiprocessor has room for
    accesses: list[Access]


class Launch(NamedTuple):
    function: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]
    grid: tuple[int, ...]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, none of which runs."""
    launches = []

    def run(function, *positional, grid, warmup, **named):
        arguments = dict(zip(function.arg_names, positional, strict=False)) | named
        options = {name: arguments.pop(name) for name in named if name not in function.arg_names}
        launches.append(Launch(function, arguments, options, grid))

    with patch.object(JITFunction, "run", run):
        yield launches


def launched_for(target: str) -> AbstractContextManager:
    """Makes the library choose tiles for ``target``, from the table's entry for machines without a GPU."""
    warp_size = PROCESSORS[target].target.warp_size
    return patch.object(table, "INTERPRETER", table.INTERPRETER._replace(architecture=target, warp_size=warp_size))


def build(launch: Launch, processor: Processor) -> CompiledKernel:
    signature, constants, attributes = {}, {}, {}
    for position, parameter in enumerate(launch.function.params):
        value = launch.arguments[parameter.name]
        specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[position,] = value
            continue
        signature[parameter.name] = _kind(value)
        number = _address(value) if isinstance(value, Tensor) else value
        if specialized and isinstance(number, int) and number % 16 == 0:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=processor.target, options=launch.options)


def _address(tensor: Tensor) -> int:
    """Of a fake tensor, which has none, the one that its memory would begin at is taken for 0."""
    if isinstance(tensor, FakeTensor):
        return tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr()


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
        return "*" + names[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


def run(targets: list[str], sizes: list[int] | None = None, every: bool = False) -> list[dict]:
    """``sizes``: of the hidden states; all of them if not given. ``every``: all that the op takes, by two processes.

    Triton keeps what it has built: what was interrupted goes on where it stopped.
    """
    shapes = [shape for shape in (EVERY if every else SHAPES) if not sizes or shape.size in sizes]
    cases = [(target, shape, every) for target in targets for shape in shapes]
    if not every:
        return [record for case in cases for record in _records(case)]
    with ProcessPoolExecutor(2, get_context("spawn")) as processes:
        return [record for records in processes.map(_records, cases) for record in records]


def _records(case: tuple[str, Shape, bool]) -> list[dict]:
    return [asdict(record) for record in _built(*case)]


def _built(target: str, shape: Shape, every: bool) -> Iterator[Record]:
    processor = PROCESSORS[target]
    for name, call in calls(ROWS, *shape).items():
        if every and shape.directions > 1 and name.startswith("norm"):
            continue  # as with one direction
        if every and shape.size > 1024 and name.startswith("pass-through backward"):
            continue  # patches of 256 columns, as of shorter rows
        with launched_for(target), recorded() as launches:
            call.run()
        for launch in launches:
            compiled = build(launch, processor)
            registers, spilled = resources(compiled)
            warps = compiled.metadata.num_warps
            yield Record(
                target=target,
                call=name,
                size=shape.size,
                directions=shape.directions,
                dtype=str(shape.dtype).removeprefix("torch."),
                penalty=shape.penalty,
                casting=shape.casting,
                tile={"rows": launch.arguments["ROWS"], "columns": _columns(launch)},
                warps=warps,
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=compiled.metadata.shared,
                occupancy=occupancy(processor, registers, warps, compiled.metadata.shared),
                accesses=_state_accesses(launch, compiled, shape.size),
            )


def _columns(launch: Launch) -> int:
    """Of a program: of whole rows, the padding included."""
    if "PIECES" not in launch.arguments:
        return launch.arguments["COLUMNS"]
    first, width = launch.arguments["PIECES"][-1]
    return first + launch.arguments["THREADS"] * width


def resources(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers per thread, and bytes of its memory that registers are spilled to."""
    return (_nvidia_registers if "cubin" in compiled.asm else _amd_registers)(compiled)


def _nvidia_registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers per thread, and bytes of local memory, as the disassembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return int(registers), int(stack) + int(local)


def _amd_registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Vector registers per lane (of both kinds, which share one file), and bytes of scratch memory."""
    assembly = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])


def _state_accesses(launch: Launch, compiled: CompiledKernel, size: int) -> list[Access]:
    names = [name for name, kind in compiled.src.signature.items() if kind != "constexpr"]
    found = defaultdict(list)
    for argument, way, width in widths(compiled):
        tensor = launch.arguments[names[argument]]
        if tensor.shape == (ROWS, size):
            found[names[argument], way].append(width)
    return [Access(name, way, min(bytes), len(bytes)) for (name, way), bytes in found.items()]


def show(records: list[dict], every: bool = False) -> None:
    """``every``: of so many, those that spill."""
    if every:
        _show_spills(records)
        return
    for target in dict.fromkeys(record["target"] for record in records):
        table = Table(title=f"Builds for {target}")
        for heading in ("call", "D", "K", "dtype", "tile", "warps", "registers", "spilled", "shared", "occupancy", "H"):
            table.add_column(heading, justify="left" if heading in ("call", "dtype") else "right")
        for r in records:
            if r["target"] == target:
                table.add_row(
                    r["call"],
                    str(r["size"]),
                    str(r["directions"]),
                    r["dtype"],
                    "{rows} x {columns}".format(**r["tile"]),
                    str(r["warps"]),
                    str(r["registers"]),
                    str(r["spilled_bytes"]),
                    str(r["shared_bytes"]),
                    f"{r['occupancy']:.0%}",
                    f"{min(access['narrowest_bytes'] for access in r['accesses'])} B" if r["accesses"] else "",
                )
        Console().print(table)


def _show_spills(records: list[dict]) -> None:
    found = defaultdict(dict)
    for r in records:
        if r["spilled_bytes"]:
            bytes = found[r["target"], r["dtype"], r["size"], r["call"]]
            bytes[r["directions"]] = max(r["spilled_bytes"], bytes.get(r["directions"], 0))
    table = Table(title=f"{len(records)} builds, and bytes per thread of those that spill")
    for heading in ("GPU", "dtype", "D", "call", "bytes by K"):
        table.add_column(heading)
    for (target, dtype, size, call), bytes in found.items():
        table.add_row(target, dtype, str(size), call, ", ".join(f"{k}: {bytes[k]}" for k in sorted(bytes)))
    Console().print(table)
