"""The arguments of the ops: what is refused, and the shapes and dtypes that the backends take."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from procon.errors import ProConError
from procon.ops.operators import folded
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
    backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Directions ``[K, D]``, anchors ``[N, K]`` and weights ``[N]``, found good for hidden states that are.

    In the dtype of the computation, and folded if ``backend`` can, which is one that ``choose_backend`` gave.
    """
    directions = directions_of(hidden, direction, backend)
    check_choice("penalty", penalty, CHOICES["penalty"])
    check_choice("sides", sides, CHOICES["sides"])
    tokens, dtype = hidden.shape[:-1], directions.dtype
    if anchor is not None:
        anchor = _companion("anchor", anchor, hidden, dtype)
        wanted = tokens if direction.dim() == 1 else (*tokens, direction.shape[0])
        if anchor.shape != wanted:
            wanted = list(wanted)
            raise ProConError(f"anchor has shape {list(anchor.shape)}: give {wanted}, the shape of the projections")
        # [B, T] of one direction has as many axes as [N, K].
        if len(tokens) != 1 or anchor.dim() != directions.dim():
            anchor = anchor.reshape(-1, *directions.shape[:-1])
    if weight is not None:
        weight = _companion("weight", weight, hidden, dtype)
        if weight.shape != tokens:
            raise ProConError(f"weight has shape {list(weight.shape)}: give {list(tokens)}, one number for each token")
        if len(tokens) != 1:
            weight = weight.reshape(-1)
    return directions, anchor, weight


def directions_of(hidden: Tensor, direction: Tensor, backend: str) -> Tensor:
    """The directions, found good: contiguous, in the dtype of the computation, and folded if ``backend`` can."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    direction = _companion("direction", direction, hidden, dtype)
    check_size(hidden, direction)
    if direction.dim() == 1:
        return (direction if backend == "eager" else direction.unsqueeze(0)).contiguous()
    if not 1 <= direction.shape[0] <= MAX_DIRECTIONS:
        raise ProConError(
            f"direction holds {direction.shape[0]} directions: give 1 to {MAX_DIRECTIONS}, call again for more"
        )
    return folded(direction, 0, backend).contiguous()


def check_hidden(hidden: Tensor) -> None:
    """Raise ProConError for what no op takes as hidden states, and where no op can run."""
    # torch's own words for these are about how to write an autograd.Function.
    if not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    ):
        raise ProConError(
            "torch.func and forward-mode differentiation do not go through the op: use .backward() or"
            " torch.autograd.grad, and a loop for vmap"
        )
    _check_tensor("hidden", hidden)
    if hidden.dtype not in _DTYPES:
        raise ProConError(f"hidden is {hidden.dtype}: convert it to float16, bfloat16, float32 or float64")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ProConError(f"hidden has shape {list(hidden.shape)}: give [..., D] with D at least 1")


def check_size(hidden: Tensor, direction: Tensor) -> None:
    """Raise ProConError unless directions, ``[D]`` or ``[K, D]``, are as long as hidden states."""
    size = hidden.shape[-1]
    if direction.dim() not in (1, 2) or direction.shape[-1] != size:
        raise ProConError(f"direction has shape {list(direction.shape)}: give [{size}] or [K, {size}] to match hidden")


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
    if tensor.is_complex() or tensor.is_quantized:
        raise ProConError(f"{name} is {tensor.dtype}: give real numbers")
    if tensor.requires_grad:
        raise ProConError(f"{name} requires a gradient, but only hidden gets one: pass {name}.detach()")


def rounding(hidden: Tensor, penalty: str) -> float:
    """The share of ``|h| |r|`` by which a projection may be off because the hidden states are rounded.

    A projection recorded with another batch, kernel or order of summation differs from its anchor by less than half a
    unit in the last place: 16 of them push at a few percent of full strength. At most 1/256, because in bfloat16 true
    departures are hardly larger than four units. Only "absolute" asks for it; it is 0 for the others.
    """
    if penalty != "absolute":
        return 0.0
    dtype = hidden.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)  # of the blocks that they come out of
    return min(16 * torch.finfo(dtype).eps, 1 / 256)


def _companion(name: str, tensor: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, found good."""
    # Most often nothing is wrong with it and nothing to be done: that is asked first, and costs a tenth of the rest.
    if not (type(tensor) is Tensor and tensor.dtype is dtype and _is_dense(tensor) and not tensor.requires_grad):
        check_constant(name, tensor)
        tensor = tensor.to(dtype)
    if tensor.device != hidden.device:
        raise ProConError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move {name} there")
    return tensor


def _check_tensor(name: str, value: object) -> None:
    if type(value) is Tensor and _is_dense(value):
        return
    if not isinstance(value, Tensor):
        raise ProConError(f"{name} is a {type(value).__name__}: give a torch.Tensor")
    # By name, because importing torch.distributed.tensor takes longer than everything else in this file.
    if type(value).__name__ == "DTensor":
        raise ProConError(
            f"{name} is a DTensor, not supported yet: pass {name}.to_local() of a tensor sharded on tokens"
        )
    if not _is_dense(value):
        raise ProConError(f"{name} is {'nested' if value.is_nested else value.layout}: give a dense tensor")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_nested
