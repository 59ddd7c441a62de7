"""The ops beneath the checks of their arguments, for callers in this library that make those once for many calls.

Not for users: only what may differ from one forward to the next is checked here, the hidden states and the norm's
weight. Whoever calls has made sure of the rest: directions ``[K, D]``, contiguous, K at most 8, and anchors ``[N, K]``,
both :func:`procon.ops.operators.folded` for the backend; weights ``[N]``; all float32, on the device of the hidden
states and without gradients; options that are among their choices; a backend of
:func:`procon.ops.backends.choose_backend`.

The penalty comes by token, ``[N]``, so that one sum may do for many blocks. Its gradient has to be one number for all
tokens, as that of a sum is.
"""

import torch
from torch import Tensor

from procon.ops.arguments import check_hidden, check_norm_weight, check_size, rounding
from procon.ops.autograd import RmsNormConstrain, pass_through


def constrain_tokens(
    hidden: Tensor, direction: Tensor, anchor: Tensor, weight: Tensor, penalty: str, sides: str, backend: str
) -> tuple[Tensor, Tensor]:
    """:func:`procon.ops.constrain`: ``hidden`` and the penalty of each token ``[N]``."""
    check_hidden(hidden)
    check_size(hidden, direction)
    operands = _in_dtype(hidden, direction, anchor, weight)
    return pass_through(hidden, *operands, penalty, rounding(hidden, penalty), sides, True, backend)


def rms_norm_constrain_tokens(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    direction: Tensor,
    anchor: Tensor,
    weight: Tensor,
    penalty: str,
    sides: str,
    casting: str,
    offset: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """:func:`procon.ops.rms_norm_constrain`: the normed states and the penalty of each token ``[N]``."""
    check_hidden(hidden)
    check_size(hidden, direction)
    check_norm_weight(hidden, norm_weight)
    norm = (hidden, norm_weight, eps, casting, offset)
    operands = _in_dtype(hidden, direction, anchor, weight)
    return RmsNormConstrain.apply(*norm, *operands, penalty, rounding(hidden, penalty), sides, True, backend)


def _in_dtype(hidden: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """``operands`` in the dtype of the computation."""
    return tuple(tensor.double() for tensor in operands) if hidden.dtype == torch.float64 else operands
