"""The arguments of the ops: what is refused, and the shapes and dtypes that the backends take."""

from typing import NoReturn

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.settings import CHOICES, MAX_DIRECTIONS, Penalty, Sides, check_choice

CASTINGS = ("llama", "gemma")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def penalty_arguments(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: Penalty,
    sides: Sides,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Directions ``[K, D]``, anchors ``[N, K]`` and weights ``[N]`` in the dtype of the computation, found good."""
    directions = directions_of(hidden, direction)
    check_choice("penalty", penalty, CHOICES["penalty"])
    check_choice("sides", sides, CHOICES["sides"])
    tokens = hidden.shape[:-1]
    if anchor is not None:
        _check_companion("anchor", anchor, hidden)
        if anchor.shape != tokens + direction.shape[:-1]:
            wanted = list(tokens + direction.shape[:-1])
            raise ProConError(f"anchor has shape {list(anchor.shape)}: give {wanted}, the shape of the projections")
        anchor = _as(anchor, directions.dtype)
        if anchor.dim() != 2 or direction.dim() == 1:
            anchor = anchor.reshape(-1, directions.shape[0])
    if weight is not None:
        _check_companion("weight", weight, hidden)
        if weight.shape != tokens:
            raise ProConError(f"weight has shape {list(weight.shape)}: give {list(tokens)}, one number for each token")
        weight = _as(weight, directions.dtype)
        if weight.dim() != 1:
            weight = weight.reshape(-1)
    return directions, anchor, weight


def directions_of(hidden: Tensor, direction: Tensor) -> Tensor:
    """The directions as a contiguous ``[K, D]`` in the dtype of the computation, once both arguments are found good."""
    check_hidden(hidden)
    _check_companion("direction", direction, hidden)
    dimensions = direction.dim()
    if dimensions not in (1, 2):
        _refuse_size(hidden, direction)
    check_size(hidden, direction)
    if dimensions == 2 and not 1 <= direction.shape[0] <= MAX_DIRECTIONS:
        raise ProConError(
            f"direction holds {direction.shape[0]} directions: give 1 to {MAX_DIRECTIONS}, call again for more"
        )
    direction = _as(direction, torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return (direction if dimensions == 2 else direction.unsqueeze(0)).contiguous()


def check_hidden(hidden: Tensor) -> None:
    """Raise ProConError for what no op takes as hidden states."""
    _check_tensor("hidden", hidden)
    if hidden.dtype not in _DTYPES:
        raise ProConError(f"hidden is {hidden.dtype}: convert it to float16, bfloat16, float32 or float64")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ProConError(f"hidden has shape {list(hidden.shape)}: give [..., D] with D at least 1")


def check_size(hidden: Tensor, direction: Tensor) -> None:
    """Raise ProConError unless directions are as long as hidden states."""
    if direction.shape[-1] != hidden.shape[-1]:
        _refuse_size(hidden, direction)


def check_norm_weight(hidden: Tensor, norm_weight: Tensor) -> None:
    """Raise ProConError for a norm's weight that does not fit ``hidden``."""
    _check_tensor("norm_weight", norm_weight)
    if norm_weight.dtype not in _DTYPES:
        raise ProConError(f"norm_weight is {norm_weight.dtype}: give float16, bfloat16, float32 or float64")
    if norm_weight.shape != hidden.shape[-1:]:
        raise ProConError(f"norm_weight has shape {list(norm_weight.shape)}: give [{hidden.shape[-1]}] to match hidden")
    if norm_weight.device != hidden.device:
        raise ProConError(
            f"norm_weight is on {norm_weight.device} but hidden is on {hidden.device}: move norm_weight there"
        )


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise ProConError for what no op takes beside the hidden states, whatever these are."""
    _check_tensor(name, tensor)
    if tensor.is_complex():
        raise ProConError(f"{name} is {tensor.dtype}: give real numbers")
    if tensor.requires_grad:
        raise ProConError(f"{name} requires a gradient, but only hidden gets one: pass {name}.detach()")


def rounding(hidden: Tensor, penalty: str) -> float:
    """The share of ``|h| |r|`` by which a projection may be off because the hidden states are rounded.

    A projection recorded with another batch, kernel or order of summation differs from its anchor by about that: four
    units in the last place, but at most 1/256, because in bfloat16 true departures are hardly larger than four. Only
    "absolute" asks for it; it is 0 for the others.
    """
    if penalty != "absolute":
        return 0.0
    dtype = hidden.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)  # of the blocks that they come out of
    return min(4 * torch.finfo(dtype).eps, 1 / 256)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first costs a tenth of a conversion that does nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _refuse_size(hidden: Tensor, direction: Tensor) -> NoReturn:
    size = hidden.shape[-1]
    raise ProConError(f"direction has shape {list(direction.shape)}: give [{size}] or [K, {size}] to match hidden")


def _check_companion(name: str, tensor: Tensor, hidden: Tensor) -> None:
    check_constant(name, tensor)
    if tensor.device != hidden.device:
        raise ProConError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move {name} there")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ProConError(f"{name} is a {type(value).__name__}: give a torch.Tensor")
    # By name, because importing torch.distributed.tensor takes longer than everything else in this file.
    if type(value).__name__ == "DTensor":
        raise ProConError(
            f"{name} is a DTensor, not supported yet: pass {name}.to_local() of a tensor sharded on tokens"
        )
