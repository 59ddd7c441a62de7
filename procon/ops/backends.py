"""The two backends: which one runs an op, and their functions as operators that a compiled graph can hold.

Both offer the same functions on two-dimensional tensors, in files of the same names: :mod:`procon.eager` and
:mod:`procon.kernels`. Eager code calls them at once; under ``torch.compile`` the call goes through operators registered
with ``torch.library``, because the dispatcher would cost an eager call as much again as the op's own launch.
"""

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from procon.eager import projection_penalty, rms_norm_penalty
from procon.errors import ProConError
from procon.settings import CHOICES, backend_variable, check_choice


def choose_backend(backend: str, device: str) -> str:
    """``"triton"`` or ``"eager"`` for tensors on this type of device."""
    check_choice("backend", backend, CHOICES["backend"])
    if backend == "auto":
        backend = backend_variable()
    if backend == "auto":
        if device != "cuda":
            return "eager"
        if not _triton_installed():
            _warn_that_triton_is_missing()
            return "eager"
        return "triton"
    if backend == "triton":
        _require_triton(device)
    return backend


# The mark that torch.compiler.assume_constant_result sets. That function first imports torch._dynamo, and so Triton,
# which would take most of a second from everyone who imports the op.
choose_backend._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]  # a mark that torch reads


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _warn_that_triton_is_missing() -> None:
    warnings.warn("Triton is not installed: a slower PyTorch path is used (pip install triton)", stacklevel=2)


def _require_triton(device: str) -> None:
    if not _triton_installed():
        raise ProConError("backend is 'triton' but Triton is not installed: pip install triton, or backend='eager'")
    if device != "cuda":
        from triton import knobs

        if not knobs.runtime.interpret:
            raise ProConError(
                f"backend is 'triton' but hidden is on {device}: move it to a GPU, use backend='eager',"
                " or set TRITON_INTERPRET=1 before Triton is imported"
            )


#: ``procon``, or what the package for the hub of kernels is called (``python -m benchmarks.hub``).
_PACKAGE = __name__.partition(".")[0]

_library = torch.library.Library(_PACKAGE, "DEF")


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register an operator of this name; the result calls the operator only while compiling."""
    _library.define(name + schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{_PACKAGE}::{name}", fake, lib=_library)
    operator = getattr(getattr(torch.ops, _PACKAGE), name).default

    def call(*arguments: Any) -> Any:
        return operator(*arguments) if torch.compiler.is_compiling() else implementation(*arguments)

    return call


def _of_both(function: Callable[..., Any], rows: tuple[int, ...], fake: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the PyTorch backend and its twin among the kernels, which a first argument chooses from.

    Args:
        rows: places of the arguments that may be ``[..., D]``; the backends get them as ``[N, D]``.
    """
    name, file = function.__name__, function.__module__.rpartition(".")[2]

    def implementation(backend: str, *arguments: Any) -> Any:
        operands = [*arguments]
        for place in rows:
            operands[place] = _rows(operands[place])
        return getattr(_file(backend, file), name)(*operands)

    schema = torch.library.infer_schema(function, mutates_args=()).removeprefix("(")
    return _define(name, f"(str backend, {schema}", implementation, fake)


@cache
def _file(backend: str, name: str) -> ModuleType:
    """Imported on first use: the kernels bring Triton along, which may be missing if they are never called."""
    return import_module(f"{_PACKAGE}.{'kernels' if backend == 'triton' else 'eager'}.{name}")


def _rows(tensor: Tensor | None) -> Tensor | None:
    """``[..., D]`` as ``[N, D]`` with unit stride along ``D``; a view if the strides allow one."""
    if tensor is None:
        return None
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _count(hidden: Tensor) -> int:
    return hidden.numel() // hidden.shape[-1]


def _fake_project(_: str, hidden: Tensor, direction: Tensor) -> Tensor:
    return direction.new_empty((_count(hidden), len(direction)))


def _fake_penalize(_: str, hidden: Tensor, direction: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    rows = _count(hidden)
    return direction.new_empty((rows,)), direction.new_empty((rows, len(direction)))


def _fake_gradient(_: str, *arguments: Any) -> Tensor:
    coefficient, direction, dtype = arguments[2:]
    return direction.new_empty((coefficient.shape[0], direction.shape[1]), dtype=dtype)


def _fake_norm(_: str, hidden: Tensor, norm_weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    casting, direction = rest[1], rest[3]
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = hidden.dtype if casting == "gemma" else torch.promote_types(hidden.dtype, norm_weight.dtype)
    rows = _count(hidden)
    return (
        hidden.new_empty((rows, hidden.shape[-1]), dtype=dtype),
        hidden.new_empty((rows,), dtype=computed),
        hidden.new_empty((0 if direction is None else rows,), dtype=computed),
        hidden.new_empty((rows, 0 if direction is None else len(direction)), dtype=computed),
    )


def _fake_norm_gradient(
    _: str, incoming: Tensor, upstream: Tensor | None, hidden: Tensor, norm_weight: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    for_weight = norm_weight.new_empty((len(norm_weight) if rest[-1] else 0,))
    return hidden.new_empty((_count(hidden), hidden.shape[-1])), for_weight


project = _of_both(projection_penalty.project, (0,), _fake_project)
penalize = _of_both(projection_penalty.penalize, (0,), _fake_penalize)
accumulate_gradient = _of_both(projection_penalty.accumulate_gradient, (0,), _fake_gradient)
rms_norm_penalize = _of_both(rms_norm_penalty.rms_norm_penalize, (0,), _fake_norm)
rms_norm_gradient = _of_both(rms_norm_penalty.rms_norm_gradient, (0, 2), _fake_norm_gradient)


def _outside_backward(tensor: Tensor) -> Tensor:
    if torch._C._current_graph_task_id() != -1:
        raise ProConError(
            "a compiled block runs again within backward, where its target may be another's: compile what has the "
            "gradient checkpointing in it, and not what it holds"
        )
    return tensor.clone()


#: A copy of a tensor, for compiled graphs that must not run within backward: a ProConError where one does, because a
#: checkpoint around it runs it again.
outside_backward = _define("outside_backward", "(Tensor tensor) -> Tensor", _outside_backward, torch.empty_like)
