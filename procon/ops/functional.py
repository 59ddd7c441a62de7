"""The fused op of the projection constraint: projection, penalty, and the penalty with pass-through.

Source: "Anchoring Refusal Direction" (arXiv 2509.06795), section III-C: the projection of a block's input on the
block's refusal direction, and the penalty on its distance from the projection that the same token had before training.
With hidden states ``h_t``, directions ``r_k``, anchors ``a_tk`` and token weights ``w_t``::

    z_tk = <h_t, r_k>        penalty = sum_t w_t sum_k phi(z_tk - a_tk)

``phi`` is ``"squared"`` (``e^2``), ``"absolute"`` (``|e|``, the paper's norm of a scalar) or ``"huber"`` (``e^2 / 2``
up to 1, ``|e| - 1/2`` beyond). Up to ``d = rounding |h_t| |r_k|`` "absolute" is ``e^2 / 2d``, and ``|e| - d/2`` beyond:
the sign of a departure that may be rounding is noise, and would push at full strength. ``rounding`` is 4 units in the
last place of the dtype of ``hidden``, or of autocast's if that is on, and at most 1/256.

``sides`` is ``"both"``, or ``"fall"``: ``phi(min(e, 0))``, so a projection above its anchor costs nothing and gets no
gradient, direction by direction. Refusal directions point from the benign to the malicious mean, so a fall is a step
towards what the model does not refuse. This is ours; the paper penalises both sides.

Shapes: ``hidden [..., D]``; ``direction [D]`` or ``[K, D]`` with K at most 8; ``anchor [...]``, or ``[..., K]`` when
the directions are ``[K, D]``; ``weight [...]``, numbers at least 0 or booleans (values are not checked: that would wait
for the device). No anchor means 0, no weight means 1. The hidden states of a token of weight 0 count for nothing,
whatever they hold: NaN and infinity too.

Dtypes: ``hidden`` is float16, bfloat16, float32 or float64. Everything is computed and returned in float32 (float64 for
float64 hidden states), under autocast too.

Gradients flow to ``hidden`` alone, once (no double backward). A direction, anchor or weight that requires a gradient is
refused. All bad input raises :class:`procon.errors.ProConError`.

Backends: ``"auto"`` is Triton for tensors on a CUDA or ROCm device and plain PyTorch elsewhere; ``"triton"`` and
``"eager"`` insist. The environment variable ``PROCON_BACKEND`` says what ``"auto"`` means.
"""

import torch
from torch import Tensor

from procon.errors import ProConError
from procon.ops.autograd import HAS_INPUT_GRAD_BUFFERS, Constrain, Project, RmsNormConstrain
from procon.ops.backends import choose_backend
from procon.settings import CHOICES, MAX_DIRECTIONS, Backend, Penalty, Sides, check_choice

__all__ = ["constrain", "project", "projection_penalty", "rms_norm", "rms_norm_constrain"]

_REDUCTIONS = ("sum", "mean", "none")
_CASTINGS = ("llama", "gemma")
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
    directions = _directions(hidden, direction)
    projection = Project.apply(hidden, directions, choose_backend(backend, hidden.device.type))
    return projection.view(hidden.shape[:-1] + direction.shape[:-1])


def projection_penalty(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    penalty: Penalty = "squared",
    sides: Sides = "both",
    reduction: str = "sum",
    backend: Backend = "auto",
) -> Tensor:
    """Penalty on the distance of the projections from their anchors, as a loss of its own.

    Inside a model :func:`constrain` costs less: here the backward writes a gradient as large as ``hidden``, which
    autograd then has to add to the one of the model.

    Args:
        hidden: ``[..., D]``.
        direction: ``[D]`` or ``[K, D]``.
        anchor: ``[...]``, or ``[..., K]`` for ``[K, D]``.
        weight: ``[...]``, at least 0.
        penalty: ``"squared"``, ``"absolute"`` or ``"huber"``.
        sides: ``"both"``, or ``"fall"``: projections below their anchors alone.
        reduction: ``"sum"``; ``"mean"``, the sum divided by the sum of the weights (by the number of tokens without
            weights), which is 0 when there is no token or every weight is 0; ``"none"``, the penalty of each token.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        A scalar, or ``[...]`` for ``"none"``.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    check_choice("reduction", reduction, _REDUCTIONS)
    _, loss = _constrain(hidden, direction, anchor, weight, penalty, sides, reduction == "none", backend)
    if reduction == "none":
        return loss.view(hidden.shape[:-1])
    if reduction == "mean":
        if weight is None:
            return loss / max(hidden.shape[:-1].numel(), 1)
        total = weight.sum(dtype=loss.dtype)
        return loss / torch.where(total == 0, 1, total)
    return loss


def constrain(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    penalty: Penalty = "squared",
    sides: Sides = "both",
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
        penalty: ``"squared"``, ``"absolute"`` or ``"huber"``.
        sides: ``"both"``, or ``"fall"``: projections below their anchors alone.
        backend: ``"auto"``, ``"triton"`` or ``"eager"``.

    Returns:
        ``hidden``, sharing its memory (not to be changed in place), and the scalar sum of the penalties.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    passed, loss = _constrain(hidden, direction, anchor, weight, penalty, sides, False, backend)
    if HAS_INPUT_GRAD_BUFFERS and not torch.compiler.is_compiling():
        # The engine's own buffer takes the gradient in place, so nothing has to pass through.
        return hidden, loss
    return passed, loss


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
    sides: Sides = "both",
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """RMSNorm of the hidden states, and the penalty that :func:`constrain` gives, from the same reads and writes.

    A block's first norm reads the block's input and writes its gradient anyway; done there, the constraint moves no
    ``[N, D]`` tensor of its own. Gradients flow to ``hidden`` and to ``norm_weight``. Unlike in :func:`constrain`, a
    token of weight 0 is normalised all the same.

    Args:
        hidden: ``[..., D]``.
        norm_weight: ``[D]``, of any floating dtype.
        eps: added to the mean square.
        direction, anchor, weight, penalty, sides, backend: as for :func:`constrain`.
        casting: ``"llama"`` rounds to the dtype of ``hidden`` before it multiplies by the weight, and returns what that
            product promotes to (Llama, Mistral, Qwen); ``"gemma"`` rounds the product to the dtype of ``hidden``.
        offset: added to ``norm_weight``; Gemma's norms use ``1.0``.

    Returns:
        The normed states ``[..., D]`` and the scalar sum of the penalties.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    directions, anchor, weight = _penalty_arguments(hidden, direction, anchor, weight, penalty, sides)
    chosen = choose_backend(backend, hidden.device.type)
    _check_norm(hidden, norm_weight, casting)
    return RmsNormConstrain.apply(
        hidden, norm_weight, eps, casting, offset, directions, anchor, weight, penalty, _rounding(hidden), sides, chosen
    )


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
    chosen = choose_backend(backend, hidden.device.type)
    normed, _ = RmsNormConstrain.apply(
        hidden, norm_weight, eps, casting, offset, None, None, None, "squared", 0.0, "both", chosen
    )
    return normed


def _constrain(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: Penalty,
    sides: Sides,
    per_token: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    directions, anchor, weight = _penalty_arguments(hidden, direction, anchor, weight, penalty, sides)
    chosen = choose_backend(backend, hidden.device.type)
    return Constrain.apply(hidden, directions, anchor, weight, penalty, _rounding(hidden), sides, per_token, chosen)


def _rounding(hidden: Tensor) -> float:
    """The share of ``|h| |r|`` by which a projection may be off because the hidden states are rounded.

    A projection recorded with another batch, kernel or order of summation differs from its anchor by about that: four
    units in the last place, but at most 1/256, because in bfloat16 true departures are hardly larger than four.
    """
    dtype = hidden.dtype
    if dtype == torch.float32 and torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)  # of the blocks that they come out of
    return min(4 * torch.finfo(dtype).eps, 1 / 256)


def _penalty_arguments(
    hidden: Tensor,
    direction: Tensor,
    anchor: Tensor | None,
    weight: Tensor | None,
    penalty: Penalty,
    sides: Sides,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Directions ``[K, D]``, anchors ``[N, K]`` and weights ``[N]`` in the dtype of the computation, found good."""
    directions = _directions(hidden, direction)
    check_choice("penalty", penalty, CHOICES["penalty"])
    check_choice("sides", sides, CHOICES["sides"])
    tokens = hidden.shape[:-1]
    if anchor is not None:
        _check_companion("anchor", anchor, hidden)
        if anchor.shape != tokens + direction.shape[:-1]:
            wanted = list(tokens + direction.shape[:-1])
            raise ProConError(f"anchor has shape {list(anchor.shape)}: give {wanted}, the shape of the projections")
        anchor = _as(anchor, directions.dtype).reshape(-1, len(directions))
    if weight is not None:
        _check_companion("weight", weight, hidden)
        if weight.shape != tokens:
            raise ProConError(f"weight has shape {list(weight.shape)}: give {list(tokens)}, one number for each token")
        weight = _as(weight, directions.dtype).reshape(-1)
    return directions, anchor, weight


def _directions(hidden: Tensor, direction: Tensor) -> Tensor:
    """The directions as a contiguous ``[K, D]`` in the dtype of the computation, once both arguments are found good."""
    _check_hidden(hidden)
    _check_companion("direction", direction, hidden)
    size = hidden.shape[-1]
    if direction.dim() not in (1, 2) or direction.shape[-1] != size:
        raise ProConError(f"direction has shape {list(direction.shape)}: give [{size}] or [K, {size}] to match hidden")
    if direction.dim() == 2 and not 1 <= direction.shape[0] <= MAX_DIRECTIONS:
        raise ProConError(
            f"direction holds {direction.shape[0]} directions: give 1 to {MAX_DIRECTIONS}, call again for more"
        )
    direction = _as(direction, torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    return (direction if direction.dim() == 2 else direction.unsqueeze(0)).contiguous()


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    # Asking first costs a tenth of a conversion that does nothing.
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _check_hidden(hidden: Tensor) -> None:
    _check_tensor("hidden", hidden)
    if hidden.dtype not in _DTYPES:
        raise ProConError(f"hidden is {hidden.dtype}: convert it to float16, bfloat16, float32 or float64")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ProConError(f"hidden has shape {list(hidden.shape)}: give [..., D] with D at least 1")


def _check_norm(hidden: Tensor, norm_weight: Tensor, casting: str) -> None:
    _check_tensor("norm_weight", norm_weight)
    if norm_weight.dtype not in _DTYPES:
        raise ProConError(f"norm_weight is {norm_weight.dtype}: give float16, bfloat16, float32 or float64")
    if norm_weight.shape != hidden.shape[-1:]:
        raise ProConError(f"norm_weight has shape {list(norm_weight.shape)}: give [{hidden.shape[-1]}] to match hidden")
    if norm_weight.device != hidden.device:
        raise ProConError(
            f"norm_weight is on {norm_weight.device} but hidden is on {hidden.device}: move norm_weight there"
        )
    check_choice("casting", casting, _CASTINGS)


def _check_companion(name: str, tensor: Tensor, hidden: Tensor) -> None:
    _check_tensor(name, tensor)
    if tensor.is_complex():
        raise ProConError(f"{name} is {tensor.dtype}: give real numbers")
    if tensor.device != hidden.device:
        raise ProConError(f"{name} is on {tensor.device} but hidden is on {hidden.device}: move {name} there")
    if tensor.requires_grad:
        raise ProConError(f"{name} requires a gradient, but only hidden gets one: pass {name}.detach()")


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ProConError(f"{name} is a {type(value).__name__}: give a torch.Tensor")
    # By name, because importing torch.distributed.tensor takes longer than everything else in this file.
    if type(value).__name__ == "DTensor":
        raise ProConError(
            f"{name} is a DTensor, not supported yet: pass {name}.to_local() of a tensor sharded on tokens"
        )
