"""Bytes that each kernel loads and stores, counted in Triton's interpreter, which has two methods for all accesses.

A lane whose mask is true moves one element of the tensor whose memory its pointer lies in. Counted separately are

- hidden states and gradients ``[N, D]``, in units ``U = rows * D * itemsize`` over the rows that have to move;
- numbers per token (anchors, weights, penalties, coefficients), in bytes per row;
- what all rows share (directions, the norm's weight, the upstream gradient), loaded again for each tile of rows and
  resident in cache, in bytes per row;
- other results, such as a program's partial sum of the norm's weight gradient, in bytes per launch.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import product
from unittest.mock import patch

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from benchmarks.audit.calls import calls
from procon.kernels import launch as table

DTYPES = (torch.bfloat16, torch.float32)
#: D, K and dtype. The longest rows are those that the norm's backward does not keep in registers.
SHAPES = (*product((576, 1024, 3584, 4096), (1, 4), DTYPES), *product((16384,), (1,), DTYPES))
ROWS = 11


@dataclass(frozen=True)
class Access:
    """Bytes moved between a kernel and one of its tensors."""

    tensor: str
    shape: tuple[int, ...]
    loaded: int
    stored: int


@dataclass(frozen=True)
class Record:
    call: str
    size: int
    directions: int
    dtype: str
    rows: int  # U is rows * size * itemsize
    units_loaded: float
    units_stored: float
    token_bytes_per_row: float  # per row of the N that are passed
    shared_bytes_per_row: float
    other_bytes: int
    accesses: list[Access]


@contextmanager
def counted() -> Iterator[list[Access]]:
    """The accesses of all kernels that are launched inside, complete on leaving.

    Raises:
        RuntimeError: for an access outside the kernel's tensors, and for an atomic one, which has no bytes of its own.
    """
    accesses: list[Access] = []
    memory: dict[str, tuple[int, int]] = {}
    moved: Counter[tuple[str, str]] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = InterpretedFunction.run

    def account(way: str, pointers, mask) -> None:
        addresses, live = np.broadcast_arrays(pointers.data, mask.data)
        addresses = addresses[live.astype(bool)]
        width = pointers.get_element_ty().primitive_bitwidth // 8
        for name, (start, end) in memory.items():
            inside = (addresses >= start) & (addresses < end)
            moved[name, way] += int(inside.sum()) * width
            addresses = addresses[~inside]
        if len(addresses):
            raise RuntimeError(f"{len(addresses)} elements are {way} outside all tensors of the kernel")

    def masked_load(builder, pointers, mask, *rest, **options):
        account("loaded", pointers, mask)
        return load(builder, pointers, mask, *rest, **options)

    def masked_store(builder, pointers, value, mask, *rest, **options):
        account("stored", pointers, mask)
        return store(builder, pointers, value, mask, *rest, **options)

    def atomic(*_arguments, **_options):
        raise RuntimeError("a kernel uses an atomic operation, which this audit does not count")

    def run(function, *arguments, **options):
        named = dict(zip(function.arg_names, arguments, strict=False)) | options
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        memory.update({name: _extent(tensor) for name, tensor in tensors.items()})
        launch(function, *arguments, **options)
        accesses.extend(
            Access(name, tuple(tensor.shape), moved[name, "loaded"], moved[name, "stored"])
            for name, tensor in tensors.items()
        )
        memory.clear()
        moved.clear()

    replacements = {"create_masked_load": masked_load, "create_masked_store": masked_store}
    replacements |= {name: atomic for name in dir(InterpreterBuilder) if name.startswith("create_atomic")}
    # As with many rows, whose weight's gradient is added up on the way.
    many_rows = patch.object(table, "_CACHED_BYTES", 0)
    with many_rows, patch.multiple(InterpreterBuilder, **replacements), patch.object(InterpretedFunction, "run", run):
        yield accesses


def _extent(tensor: Tensor) -> tuple[int, int]:
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def run(sizes: list[int] | None = None) -> list[dict]:
    """``sizes``: of the hidden states; all of them if not given."""
    return [asdict(record) for shape in SHAPES if not sizes or shape[0] in sizes for record in _records(*shape)]


def _records(size: int, directions: int, dtype: torch.dtype) -> Iterator[Record]:
    for name, call in calls(ROWS, size, directions, dtype).items():
        with counted() as accesses:
            call.run()
        unit = call.rows * size * dtype.itemsize
        states = [access for access in accesses if access.shape == (ROWS, size)]
        tokens = [access for access in accesses if access.shape in ((ROWS,), (ROWS, directions))]
        others = [access for access in accesses if access not in states + tokens]
        yield Record(
            call=name,
            size=size,
            directions=directions,
            dtype=str(dtype).removeprefix("torch."),
            rows=call.rows,
            units_loaded=sum(access.loaded for access in states) / unit,
            units_stored=sum(access.stored for access in states) / unit,
            token_bytes_per_row=sum(access.loaded + access.stored for access in tokens) / ROWS,
            shared_bytes_per_row=sum(access.loaded for access in others) / ROWS,
            other_bytes=sum(access.stored for access in others),
            accesses=accesses,
        )


def show(records: list[dict]) -> None:
    table = Table(title="Traffic of the kernels, the most over the sizes listed and both dtypes")
    table.add_column("call")
    table.add_column("D")
    for heading in ("K", "[N, D] loaded, U", "stored, U", "token bytes per row", "cached bytes per row", "other bytes"):
        table.add_column(heading, justify="right")
    groups = defaultdict(list)
    for record in records:
        groups[tuple(record[key] for key in ("call", "directions", "units_loaded", "units_stored"))].append(record)
    for (call, directions, loaded, stored), group in sorted(groups.items()):
        table.add_row(
            call,
            ", ".join(map(str, dict.fromkeys(record["size"] for record in group))),
            str(directions),
            f"{loaded:.3f}",
            f"{stored:.3f}",
            f"{max(record['token_bytes_per_row'] for record in group):.1f}",
            f"{max(record['shared_bytes_per_row'] for record in group):.0f}",
            str(max(record["other_bytes"] for record in group)),
        )
    Console().print(table)
