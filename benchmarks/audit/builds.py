"""Ahead-of-time builds for real GPUs: registers, spills, width of loads and stores, shared memory, occupancy.

Each launch of the library is taken as it stands, tile and warps included, and compiled for the target in the launch's
place, with what Triton would know about the arguments: which pointers and integers are divisible by 16, which integers
are 1.

Widths are those of the instructions that touch ``[N, D]`` tensors: in PTX for NVIDIA, in the LLVM IR handed to the
backend for AMD; both are followed back from the address to the argument.
"""

import re
import subprocess
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton import JITFunction, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel, compile

from benchmarks.audit.calls import calls

ROWS = 37


class Processor(NamedTuple):
    """What limits how many warps reside on a multiprocessor (compute unit)."""

    target: GPUTarget
    parts: int  # each with its own registers and warps
    registers: int  # of one part, a lane
    warps: int  # of one part
    shared_bytes: int
    reserved_bytes: int  # shared memory that a block takes besides its own
    blocks: int


# NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability": 65536 registers and 2048
# threads a multiprocessor in four parts; 1 KiB of shared memory a block is reserved ("Compute Capability 8.x" and on).
# AMD: LLVM's "User Guide for AMDGPU Backend" and the CDNA3 instruction set reference: 512 vector registers a lane and 8
# waves for each of four SIMDs, 64 KiB of LDS. Both allocate registers in units of 8 a lane.
PROCESSORS = {
    "sm_80": Processor(GPUTarget("cuda", 80, 32), 4, 512, 16, 164 * 1024, 1024, 32),
    "sm_90": Processor(GPUTarget("cuda", 90, 32), 4, 512, 16, 228 * 1024, 1024, 32),
    "sm_100": Processor(GPUTarget("cuda", 100, 32), 4, 512, 16, 228 * 1024, 1024, 32),
    "gfx942": Processor(GPUTarget("hip", "gfx942", 64), 4, 512, 8, 64 * 1024, 0, 32),
}


class Shape(NamedTuple):
    size: int
    directions: int = 1
    dtype: torch.dtype = torch.bfloat16
    penalty: str = "squared"


SHAPES = (
    *(Shape(size) for size in (576, 1024, 2048, 3584, 4096, 5120, 8192, 16384)),
    *(Shape(size, dtype=torch.float32) for size in (576, 4096, 8192)),
    *(Shape(size, directions=4) for size in (576, 4096)),
    Shape(576, dtype=torch.float16, penalty="absolute"),
    Shape(576, penalty="huber"),
    Shape(4096, directions=8, dtype=torch.float32),
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
    tile: dict[str, int]
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    occupancy: float  # resident warps over the most that a multiprocessor holds
    accesses: list[Access]


class Launch(NamedTuple):
    function: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """The launches made inside, none of which runs."""
    launches = []

    def run(function, *positional, grid, warmup, **named):
        arguments = dict(zip(function.arg_names, positional, strict=False)) | named
        options = {name: arguments.pop(name) for name in named if name not in function.arg_names}
        launches.append(Launch(function, arguments, options))

    with patch.object(JITFunction, "run", run):
        yield launches


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
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if specialized and isinstance(number, int) and number % 16 == 0:
            attributes[position,] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.function, signature=signature, constexprs=constants, attrs=attributes)
    return compile(source, target=processor.target, options=launch.options)


def _kind(value: object) -> str:
    if isinstance(value, Tensor):
        names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}
        return "*" + names[value.dtype]
    return {int: "i32", float: "fp32"}[type(value)]


def run(targets: list[str]) -> list[dict]:
    return [asdict(record) for target in targets for shape in SHAPES for record in _records(target, shape)]


def _records(target: str, shape: Shape) -> Iterator[Record]:
    processor = PROCESSORS[target]
    for name, call in calls(ROWS, shape.size, shape.directions, shape.dtype, shape.penalty).items():
        with recorded() as launches:
            call.run()
        for launch in launches:
            compiled = build(launch, processor)
            registers, spilled = (_amd_registers if target.startswith("gfx") else _nvidia_registers)(compiled)
            warps = compiled.metadata.num_warps
            yield Record(
                target=target,
                call=name,
                size=shape.size,
                directions=shape.directions,
                dtype=str(shape.dtype).removeprefix("torch."),
                penalty=shape.penalty,
                tile={key.lower(): launch.arguments[key] for key in ("ROWS", "COLUMNS")},
                warps=warps,
                registers=registers,
                spilled_bytes=spilled,
                shared_bytes=compiled.metadata.shared,
                occupancy=occupancy(processor, registers, warps, compiled.metadata.shared),
                accesses=_state_accesses(launch, compiled, shape.size),
            )


def occupancy(processor: Processor, registers: int, warps: int, shared_bytes: int) -> float:
    """Share of the warps that a multiprocessor can hold which blocks of ``warps`` warps fill."""
    allocated = -(-registers // 8) * 8
    by_registers = min(processor.warps, processor.registers // allocated) * processor.parts // warps
    by_shared = processor.shared_bytes // max(1, shared_bytes + processor.reserved_bytes)
    return min(by_registers, by_shared, processor.blocks) * warps / (processor.warps * processor.parts)


def _nvidia_registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Registers a thread, and bytes of local memory, as the disassembler reports them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage).groups()
    return int(registers), int(stack) + int(local)


def _amd_registers(compiled: CompiledKernel) -> tuple[int, int]:
    """Vector registers a lane (of both kinds, which share one file), and bytes of scratch memory."""
    assembly = compiled.asm["amdgcn"]
    registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
    return registers, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly)[1])


def _state_accesses(launch: Launch, compiled: CompiledKernel, size: int) -> list[Access]:
    pointers = [n for n, v in launch.arguments.items() if v is not None and n in compiled.src.signature]
    pointers = [n for n in pointers if compiled.src.signature[n] != "constexpr"]
    widths = defaultdict(list)
    read = _amd_widths if "amdgcn" in compiled.asm else _nvidia_widths
    for argument, way, width in read(compiled):
        tensor = launch.arguments[pointers[argument]]
        if tensor.shape == (ROWS, size):
            widths[pointers[argument], way].append(width)
    return [Access(tensor, way, min(found), len(found)) for (tensor, way), found in widths.items()]


def _nvidia_widths(compiled: CompiledKernel) -> Iterator[tuple[int, str, int]]:
    """(number of the argument, "load" or "store", bytes a thread) of each access, by following addresses back to it."""
    origin: dict[str, int] = {}
    for line in compiled.asm["ptx"].splitlines():
        if found := re.search(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]", line):
            origin[found[1]] = int(found[2])
        elif found := re.search(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bufs](\d+)\s", line):
            address = re.search(r"\[\s*(%rd\d+)", line)[1]
            yield origin[address], "load" if found[1] == "ld" else "store", int(found[2] or 1) * int(found[3]) // 8
        elif found := re.match(r"\s*(?:@\S+\s+)?\S+\s+(%rd\d+), (.*);", line):
            sources = [origin[register] for register in re.findall(r"%rd\d+", found[2]) if register in origin]
            if sources:
                (origin[found[1]],) = set(sources)


def _amd_widths(compiled: CompiledKernel) -> Iterator[tuple[int, str, int]]:
    origin: dict[str, int] = {}
    pointer = re.compile(r"ptr addrspace\([18]\)(?: \w+)* (%\w+)")
    made = re.compile(r"(%\w+) = (?:getelementptr|(?:tail )?call ptr addrspace\(8\) @llvm\.amdgcn\.make\.buffer)")
    loaded = re.compile(r"%\w+ = (?:load|(?:tail )?call) (<\d+ x \w+>|\w+)(?:,| @llvm\.amdgcn\.raw\.ptr\.buffer\.load)")
    stored = re.compile(r"(?:store|call void @llvm\.amdgcn\.raw\.ptr\.buffer\.store\.\w+\() ?(<\d+ x \w+>|\w+) ")
    for line in compiled.asm["llir"].splitlines():
        bases = pointer.findall(line)
        if line.startswith("define"):
            arguments = re.search(r"\((.*)\)", line)[1]
            origin = {name: int(name[1:]) for name in re.findall(r"%\d+", arguments)}
        elif not bases:
            continue
        elif found := made.search(line):
            origin[found[1]] = origin[bases[0]]
        elif found := loaded.search(line):
            yield origin[bases[0]], "load", _llvm_bytes(found[1])
        elif found := stored.search(line):
            yield origin[bases[0]], "store", _llvm_bytes(found[1])
        else:
            raise RuntimeError(f"an access that this audit cannot read: {line.strip()}")


def _llvm_bytes(kind: str) -> int:
    count, element = re.fullmatch(r"(?:<(\d+) x )?(\w+)>?", kind).groups()
    bits = {"half": 16, "bfloat": 16, "float": 32, "double": 64}.get(element) or int(element.removeprefix("i"))
    return int(count or 1) * bits // 8


def show(records: list[dict]) -> None:
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
                    f"{min(access['narrowest_bytes'] for access in r['accesses'])} B",
                )
        Console().print(table)
