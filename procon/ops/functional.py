"""The fused op of the projection constraint: projection, penalty, and the penalty with pass-through.

Source: "Anchoring Refusal Direction" (arXiv 2509.06795), section III-C: the projection of a block's input on the
block's refusal direction, and the penalty on its distance from the projection that the same token had before training.
With hidden states ``h_t``, directions ``r_k``, anchors ``a_tk`` and token weights ``w_t``::

    z_tk = <h_t, r_k>        penalty = sum_t w_t sum_k phi(z_tk - a_tk)

``phi`` is ``"squared"`` (``e^2``), ``"absolute"`` (``|e|``, the paper's norm of a scalar) or ``"huber"`` (``e^2 / 2``
up to 1, ``|e| - 1/2`` beyond). Up to ``d = rounding |h_t| |r_k|`` "absolute" is ``e^2 / 2d``, and ``|e| - d/2`` beyond:
the sign of a departure that may be rounding is noise, and would push at full strength. ``rounding`` is 16 units in the
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

Gradients flow to ``hidden`` alone, once: a second derivative through the op raises ProConError. In a compiled graph the
refusal is torch's own, which ``torch.autograd.grad`` does not always meet. A direction, anchor or weight that requires
a gradient is refused. All bad input raises :class:`procon.errors.ProConError`.

Backends: ``"auto"`` is Triton for tensors on a CUDA or ROCm device and plain PyTorch elsewhere; ``"triton"`` and
``"eager"`` insist. The environment variable ``PROCON_BACKEND`` says what ``"auto"`` means.
"""

from torch import Tensor

from procon.ops.arguments import (
    CASTINGS,
    check_hidden,
    check_norm_weight,
    directions_of,
    penalty_arguments,
    rounding,
)
from procon.ops.autograd import Constrain, Project, RmsNormConstrain, pass_through
from procon.ops.backends import choose_backend
from procon.settings import Backend, Penalty, Sides, check_choice

__all__ = ["constrain", "project", "projection_penalty", "rms_norm", "rms_norm_constrain"]

_REDUCTIONS = ("sum", "mean", "none")


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
    check_hidden(hidden)
    chosen = choose_backend(backend, hidden.device.type)
    projection = Project.apply(hidden, directions_of(hidden, direction, chosen), chosen)
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
    check_hidden(hidden)
    chosen = choose_backend(backend, hidden.device.type)
    operands = penalty_arguments(hidden, direction, anchor, weight, penalty, sides, chosen)
    options = (penalty, rounding(hidden, penalty), sides, reduction == "none", chosen)
    _, loss = Constrain.apply(hidden, *operands, *options)
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
    check_hidden(hidden)
    chosen = choose_backend(backend, hidden.device.type)
    operands = penalty_arguments(hidden, direction, anchor, weight, penalty, sides, chosen)
    return pass_through(hidden, *operands, penalty, rounding(hidden, penalty), sides, False, chosen)


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
        eps: added to the mean square; not checked, and a negative one may give NaN.
        direction, anchor, weight, penalty, sides, backend: as for :func:`constrain`.
        casting: ``"llama"`` rounds to the dtype of ``hidden`` before it multiplies by the weight, and returns what that
            product promotes to (Llama, Mistral, Qwen); ``"gemma"`` rounds the product to the dtype of ``hidden``.
        offset: added to ``norm_weight``; Gemma's norms use ``1.0``.

    Returns:
        The normed states ``[..., D]`` and the scalar sum of the penalties.

    Raises:
        ProConError: for a wrong shape, dtype, device, option or backend.
    """
    check_hidden(hidden)
    chosen = choose_backend(backend, hidden.device.type)
    operands = penalty_arguments(hidden, direction, anchor, weight, penalty, sides, chosen)
    check_norm_weight(hidden, norm_weight)
    check_choice("casting", casting, CASTINGS)
    norm = (hidden, norm_weight, eps, casting, offset)
    options = (penalty, rounding(hidden, penalty), sides, False, chosen)
    return RmsNormConstrain.apply(*norm, *operands, *options)


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
    check_hidden(hidden)
    check_norm_weight(hidden, norm_weight)
    check_choice("casting", casting, CASTINGS)
    options = ("squared", 0.0, "both", False, choose_backend(backend, hidden.device.type))
    normed, _ = RmsNormConstrain.apply(hidden, norm_weight, eps, casting, offset, None, None, None, *options)
    return normed
