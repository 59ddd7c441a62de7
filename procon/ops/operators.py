"""The ops of both backends, registered with ``torch.library``.

Both backends offer the same functions on two-dimensional tensors, in files of the same names: :mod:`procon.eager` and
:mod:`procon.kernels`. Eager code calls them at once; under ``torch.compile`` the call goes through the registered
operators, which a graph can hold, because the dispatcher would cost an eager call as much again as the op's own launch.

Of one direction, the eager backend also takes ``[D]`` for ``[K, D]`` and ``[N]`` for ``[N, K]`` (:func:`folded`).
"""

from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import TypeVar, TypeVarTuple

import torch
from torch import Tensor

from procon.errors import ProConError

_library = torch.library.Library("procon", "DEF")

Arguments = TypeVarTuple("Arguments")
Result = TypeVar("Result")


# Imported on first use: the kernels bring Triton along, which may be missing if they are never called.


@cache
def _projection_penalty(backend: str) -> ModuleType:
    if backend == "triton":
        from procon.kernels import projection_penalty
    else:
        from procon.eager import projection_penalty
    return projection_penalty


@cache
def _rms_norm_penalty(backend: str) -> ModuleType:
    if backend == "triton":
        from procon.kernels import rms_norm_penalty
    else:
        from procon.eager import rms_norm_penalty
    return rms_norm_penalty


def folded(tensor: Tensor, axis: int, backend: str) -> Tensor:
    """``tensor`` without its ``axis`` of directions, if there is one direction and the backend needs no such axis."""
    return tensor.squeeze(axis) if backend == "eager" else tensor


def version_of(tensor: Tensor) -> int:
    """Counts the changes in place; 0 if nothing counts them."""
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


def _rows(tensor: Tensor) -> Tensor:
    """``[..., D]`` as ``[N, D]`` with unit stride along ``D``; a view if the strides allow one."""
    rows = tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _operator(
    schema: str, fake: Callable[[*Arguments], Result]
) -> Callable[[Callable[[*Arguments], Result]], Callable[[*Arguments], Result]]:
    """Register an implementation as ``procon::<name>``; the result calls the operator only while compiling."""
    name = schema.partition("(")[0]

    def register(implementation: Callable[[*Arguments], Result]) -> Callable[[*Arguments], Result]:
        _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
        _library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"procon::{name}", fake, lib=_library)
        operator = getattr(torch.ops.procon, name).default

        def call(*arguments: *Arguments) -> Result:
            return operator(*arguments) if torch.compiler.is_compiling() else implementation(*arguments)

        return call

    return register


@_operator("outside_backward(Tensor tensor) -> Tensor", torch.empty_like)
def outside_backward(tensor: Tensor) -> Tensor:
    """A copy of ``tensor``, for compiled graphs that must not run within backward.

    Raises:
        ProConError: from the graph, where a checkpoint around it runs it again.
    """
    if torch._C._current_graph_task_id() != -1:
        raise ProConError(
            "a compiled block runs again within backward, where its target may be another's: compile what has the "
            "gradient checkpointing in it, and not what it holds"
        )
    return tensor.clone()


def _fake_project(hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
    return direction.new_empty((hidden.numel() // hidden.shape[-1], *direction.shape[:-1]))


@_operator("project(Tensor hidden, Tensor direction, str backend) -> Tensor", _fake_project)
def project(hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
    return _projection_penalty(backend).project(_rows(hidden), direction)


def _fake_penalize(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float,
    sides: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = hidden.numel() // hidden.shape[-1]
    return direction.new_empty((rows,)), direction.new_empty((rows, *direction.shape[:-1]))


@_operator(
    "penalize(Tensor hidden, Tensor direction, Tensor? anchor, Tensor? weight, str penalty, float rounding,"
    " str sides, str backend) -> (Tensor, Tensor)",
    _fake_penalize,
)
def penalize(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float,
    sides: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _projection_penalty(backend).penalize(_rows(hidden), direction, anchor, weight, penalty, rounding, sides)


def _fake_accumulate_gradient(
    incoming: Tensor | None,
    upstream: Tensor | None,
    coefficient: Tensor,
    direction: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return direction.new_empty(shape, dtype=dtype)


@_operator(
    "accumulate_gradient(Tensor? incoming, Tensor? upstream, Tensor coefficient, Tensor direction, SymInt[] shape,"
    " ScalarType dtype, str backend) -> Tensor",
    _fake_accumulate_gradient,
)
def accumulate_gradient(
    incoming: Tensor | None,
    upstream: Tensor | None,
    coefficient: Tensor,
    direction: Tensor,
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    incoming = None if incoming is None else _rows(incoming)
    gradient = _projection_penalty(backend).accumulate_gradient(incoming, upstream, coefficient, direction, dtype)
    return gradient if len(shape) == 2 else gradient.view(shape)


def add_gradient(buffer: Tensor, upstream: Tensor, coefficient: Tensor, direction: Tensor, backend: str) -> None:
    """Add ``upstream * coefficient @ direction`` to the contiguous ``buffer [..., D]`` in place; never compiled."""
    _projection_penalty(backend).add_gradient(_rows(buffer), upstream, coefficient, direction)


def _fake_rms_norm(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    casting: str,
    offset: float,
    direction: Tensor | None,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float,
    sides: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = hidden.numel() // hidden.shape[-1]
    computed = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    dtype = hidden.dtype if casting == "gemma" else torch.promote_types(hidden.dtype, norm_weight.dtype)
    directions = (0,) if direction is None else direction.shape[:-1]
    return (
        hidden.new_empty(hidden.shape, dtype=dtype),
        hidden.new_empty((rows,), dtype=computed),
        hidden.new_empty((0 if direction is None else rows,), dtype=computed),
        hidden.new_empty((rows, *directions), dtype=computed),
    )


@_operator(
    "rms_norm_penalize(Tensor hidden, Tensor norm_weight, float eps, str casting, float offset, Tensor? direction,"
    " Tensor? anchor, Tensor? weight, str penalty, float rounding, str sides, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_rms_norm,
)
def rms_norm_penalize(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    casting: str,
    offset: float,
    direction: Tensor | None,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: str,
    rounding: float,
    sides: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    normed, inverse_rms, tokens, coefficient = _rms_norm_penalty(backend).rms_norm_penalize(
        _rows(hidden),
        norm_weight.contiguous(),
        eps,
        casting,
        offset,
        direction,
        anchor,
        weight,
        penalty,
        rounding,
        sides,
    )
    return normed if hidden.dim() == 2 else normed.view(hidden.shape), inverse_rms, tokens, coefficient


def _fake_rms_norm_gradient(
    incoming: Tensor,
    upstream: Tensor | None,
    hidden: Tensor,
    norm_weight: Tensor,
    inverse_rms: Tensor,
    coefficient: Tensor,
    direction: Tensor | None,
    offset: float,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return hidden.new_empty(hidden.shape), norm_weight.new_empty((norm_weight.shape[0] if needs_weight else 0,))


@_operator(
    "rms_norm_gradient(Tensor incoming, Tensor? upstream, Tensor hidden, Tensor norm_weight, Tensor inverse_rms,"
    " Tensor coefficient, Tensor? direction, float offset, bool needs_weight, str backend)"
    " -> (Tensor, Tensor)",
    _fake_rms_norm_gradient,
)
def rms_norm_gradient(
    incoming: Tensor,
    upstream: Tensor | None,
    hidden: Tensor,
    norm_weight: Tensor,
    inverse_rms: Tensor,
    coefficient: Tensor,
    direction: Tensor | None,
    offset: float,
    needs_weight: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gradient, for_weight = _rms_norm_penalty(backend).rms_norm_gradient(
        _rows(incoming),
        upstream,
        _rows(hidden),
        norm_weight.contiguous(),
        inverse_rms,
        coefficient,
        direction,
        offset,
        needs_weight,
    )
    return gradient if hidden.dim() == 2 else gradient.view(hidden.shape), for_weight
