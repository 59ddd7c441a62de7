"""The fused op of the projection constraint: projection, penalty, and the penalty with pass-through.

Source: "Anchoring Refusal Direction" (arXiv 2509.06795), section III-C: the projection of a block's input on the
block's refusal direction, and the penalty on its distance from the projection that the same token had before training.
With hidden states ``h_t``, directions ``r_k``, anchors ``a_tk`` and token weights ``w_t``::

    z_tk = <h_t, r_k>        penalty = sum_t w_t sum_k phi(z_tk - a_tk)

``phi`` is ``"squared"`` (``e^2``) or ``"absolute"`` (``|e|``, the paper's norm of a scalar). Up to
``d = rounding |h_t| |r_k|`` "absolute" is ``e^2 / 2d``, and ``|e| - d/2`` beyond: the sign of a departure that may be
rounding is noise, and would push at full strength. ``rounding`` is 16 units in the last place of the dtype of
``hidden``, or of autocast's if that is on, and at most 1/256.

Shapes: ``hidden [..., D]``; ``direction [D]`` or ``[K, D]`` with K at most 8; ``anchor [...]``, or ``[..., K]`` when
the directions are ``[K, D]``; ``weight [...]``, numbers at least 0 or booleans (values are not checked: that would wait
for the device). No anchor means 0, no weight means 1. The hidden states of a token of weight 0 count for nothing,
whatever they hold: NaN and infinity too.

Dtypes: ``hidden`` is float16, bfloat16, float32 or float64. Everything is computed and returned in float32 (float64 for
float64 hidden states), under autocast too.

Gradients flow to ``hidden`` alone, once: a second derivative through the op raises ProConError. In a compiled graph the
refusal is torch's own, which ``torch.autograd.grad`` does not always meet. A direction, anchor or weight that requires
a gradient is refused. All bad input raises :class:`procon.errors.ProConError`.

Backends: ``"auto"`` is Triton for tensors on a CUDA or ROCm device and plain PyTorch elsewhere; ``"triton"`` and
``"eager"`` insist. The environment variable ``PROCON_BACKEND`` says what ``"auto"`` means.
"""

from typing import Any

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops.autograd import Constrain, Project, RmsNormConstrain
from procon.ops.backends import choose_backend
from procon.settings import CHOICES, MAX_DIRECTIONS, Backend, Penalty, check_choice

_CASTINGS = ("llama", "gemma")
_REDUCTIONS = ("sum", "mean", "none")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def project(hidden: Tensor, direction: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Projection of every hidden state on one or several directions, differentiable with respect to ``hidden``.

    Args:
        hidden: ``[..., D]``.
        direction: ``[D]`` or ``[K, D]``.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        ``[...]`` for one direction ``[D]``, ``[..., K]`` for ``[K, D]``.

    Raises:
        ProConError: for a wrong shape, dtype, device or backend.
    """
    _check_hidden(hidden)
    projection = Project.apply(hidden, _directions(hidden, direction), choose_backend(backend, hidden.device.type))
    return projection.view(hidden.shape[:-1] + direction.shape[:-1])


def projection_penalty(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    penalty: Penalty = "squared",
    reduction: str = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the distance of the projections from their anchors, as a loss of its own.

    Inside a model :func:`constrain` costs less: here the backward writes a gradient as large as ``hidden``, which
    autograd then has to add to the one of the model.

    Args:
        hidden, direction, anchor, weight, penalty, backend: as for :func:`constrain`.
        reduction: ``"sum"``; ``"mean"``, the sum divided by the sum of the weights (by the number of tokens without
            weights), which is 0 when there is no token or every weight is 0; ``"none"``, the penalty of each token.

    Returns:
        A scalar, or ``[...]`` for ``"none"``.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    _check_hidden(hidden)
    operands = _operands(hidden, direction, anchor, weight, penalty)
    chosen = choose_backend(backend, hidden.device.type)
    _, loss = Constrain.apply(hidden, *operands, reduction == "none", chosen)
    if reduction == "none":
        return loss.view(hidden.shape[:-1])
    if reduction == "mean":
        if weight is None:
            return loss / max(hidden.shape[:-1].numel(), 1)
        total = weight.sum(dtype=loss.dtype)
        return loss / (total + (total == 0))
    return loss


def constrain(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    penalty: Penalty = "squared",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Penalty on the distance of the projections from their anchors, with the hidden states passed through.

    Call it where the block reads its input, and give the block the hidden states that come back::

        hidden, penalty = constrain(hidden, direction, anchor, weight)

    The backward then adds the penalty's gradient to the one that arrives for ``hidden`` in a single write. Either
    result may be left unused; the gradients are exact all the same.

    Args:
        hidden: ``[..., D]``.
        direction: ``[D]`` or ``[K, D]``.
        anchor: ``[...]``, or ``[..., K]`` for ``[K, D]``.
        weight: ``[...]``, at least 0.
        penalty: ``"squared"`` or ``"absolute"``.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        ``hidden``, sharing its memory (not to be changed in place), and the scalar sum of the penalties.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    _check_hidden(hidden)
    operands = _operands(hidden, direction, anchor, weight, penalty)
    chosen = choose_backend(backend, hidden.device.type)
    return Constrain.apply(hidden, *operands, False, chosen)


def rms_norm_constrain(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    direction: Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    casting: str = "llama",
    offset: float = 0.0,
    penalty: Penalty = "squared",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the hidden states, and the penalty that :func:`constrain` gives, from the same reads and writes.

    A block's first norm reads the block's input and writes its gradient anyway; done there, the constraint moves no
    ``[N, D]`` tensor of its own. Gradients flow to ``hidden`` and to ``norm_weight``. Unlike in :func:`constrain`, a
    token of weight 0 is normalised all the same.

    Args:
        hidden: ``[..., D]``.
        norm_weight: ``[D]``, of any floating dtype.
        eps: added to the mean square; not checked, and a negative one may give NaN.
        direction, anchor, weight, penalty, backend: as for :func:`constrain`.
        casting: ``"llama"`` rounds to the dtype of ``hidden`` before it multiplies by the weight, and returns what that
            product promotes to (Llama, Mistral, Qwen); ``"gemma"`` rounds the product to the dtype of ``hidden``.
        offset: added to ``norm_weight``; Gemma's norms use ``1.0``.

    Returns:
        The normed states ``[..., D]`` and the scalar sum of the penalties.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    _check_hidden(hidden)
    operands = _operands(hidden, direction, anchor, weight, penalty)
    _check_norm(hidden, norm_weight, casting)
    norm = (hidden, norm_weight, eps, casting, offset)
    return RmsNormConstrain.apply(*norm, *operands, False, choose_backend(backend, hidden.device.type))


def rms_norm(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    *,
    casting: str = "llama",
    offset: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """The RMSNorm of :func:`rms_norm_constrain` without the penalty: what the constraint's cost is measured against.

    Arguments, errors and the returned ``[..., D]`` are as there.
    """
    _check_hidden(hidden)
    _check_norm(hidden, norm_weight, casting)
    options = ("squared", None, False, choose_backend(backend, hidden.device.type))
    normed, _ = RmsNormConstrain.apply(hidden, norm_weight, eps, casting, offset, None, None, None, *options)
    return normed


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


def reach(hidden: Tensor, directions: Tensor, penalty: str) -> Tensor | None:
    """How far a projection on ``directions [K, D]`` may be off by :func:`rounding`, as a share of ``|h|``: ``[K]``."""
    share = rounding(hidden, penalty)
    return torch.linalg.vector_norm(directions, dim=1).mul_(share) if share else None


def check_constant(name: str, tensor: Tensor) -> None:
    """Raise ProConError for what no op takes beside the hidden states, whatever these are."""
    _check_dense(name, tensor)
    if tensor.is_complex() or tensor.is_quantized:
        raise ProConError(f"{name} is {tensor.dtype}: give real numbers")
    if tensor.requires_grad:
        raise ProConError(f"{name} requires a gradient, but only hidden gets one: pass {name}.detach()")


def _check_hidden(hidden: Tensor) -> None:
    _check_dense("hidden", hidden)
    if hidden.dtype not in _DTYPES:
        raise ProConError(f"hidden is {hidden.dtype}: convert it to float16, bfloat16, float32 or float64")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ProConError(f"hidden has shape {list(hidden.shape)}: give [..., D] with D at least 1")


def _check_norm(hidden: Tensor, norm_weight: Tensor, casting: str) -> None:
    _check_dense("norm_weight", norm_weight)
    if norm_weight.dtype not in _DTYPES or norm_weight.shape != hidden.shape[-1:]:
        raise ProConError(
            f"norm_weight is {norm_weight.dtype} {list(norm_weight.shape)}: give floating [{hidden.shape[-1]}] to "
            "match hidden"
        )
    _check_device("norm_weight", norm_weight, hidden)
    check_choice("casting", casting, _CASTINGS)


def _operands(
    hidden: Tensor, direction: Tensor, anchor: Tensor | None, weight: Tensor | None, penalty: Penalty
) -> tuple[Tensor, Tensor | None, Tensor | None, str, Tensor | None]:
    """What the op takes beside the hidden states, found good, in the dtype of the computation.

    Directions ``[K, D]``, anchors ``[N, K]``, weights ``[N]``, the penalty, and its reach ``[K]``.
    """
    directions = _directions(hidden, direction)
    check_choice("penalty", penalty, CHOICES["penalty"])
    tokens, dtype = hidden.shape[:-1], directions.dtype
    if anchor is not None:
        anchor = _companion("anchor", anchor, hidden, dtype)
        wanted = tokens + direction.shape[:-1]
        if anchor.shape != wanted:
            raise ProConError(f"anchor has shape {list(anchor.shape)}: give {list(wanted)}, that of the projections")
        anchor = anchor.reshape(-1, len(directions))
    if weight is not None:
        weight = _companion("weight", weight, hidden, dtype)
        if weight.shape != tokens:
            raise ProConError(f"weight has shape {list(weight.shape)}: give {list(tokens)}, one number for each token")
        weight = weight.reshape(-1)
    return directions, anchor, weight, penalty, reach(hidden, directions, penalty)


def _directions(hidden: Tensor, direction: Tensor) -> Tensor:
    """The directions, found good: contiguous ``[K, D]`` in the dtype of the computation."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    direction = _companion("direction", direction, hidden, dtype)
    size = hidden.shape[-1]
    if direction.dim() not in (1, 2) or direction.shape[-1] != size:
        raise ProConError(f"direction has shape {list(direction.shape)}: give [{size}] or [K, {size}] to match hidden")
    directions = direction.reshape(-1, size)
    if not 1 <= len(directions) <= MAX_DIRECTIONS:
        raise ProConError(
            f"direction holds {len(directions)} directions: give 1 to {MAX_DIRECTIONS}, call again for more"
        )
    return directions.contiguous()


def _companion(name: str, tensor: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """``tensor`` in ``dtype``, found good."""
    check_constant(name, tensor)
    _check_device(name, tensor, hidden)
    return tensor.to(dtype)


def _check_device(name: str, tensor: Tensor, hidden: Tensor) -> None:
    if tensor.device != hidden.device:
        raise ProConError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move {name} there")


def _check_dense(name: str, value: Any) -> None:
    """Raise ProConError for anything but a dense tensor that this rank has whole."""
    # DTensor by name, because importing torch.distributed.tensor takes longer than everything else in this file.
    if (
        not isinstance(value, Tensor)
        or value.layout is not torch.strided
        or value.is_nested
        or type(value).__name__ == "DTensor"
    ):
        kind = f"{value.layout} tensor" if type(value) is Tensor else type(value).__name__
        raise ProConError(f"{name} is a {kind}: give a dense torch.Tensor, of a sharded one what this rank has")
