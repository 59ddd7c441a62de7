"""How far tokens are from their anchors before anything has trained: rounding apart, or something is wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from procon.ops import project
from procon.ops.arguments import rounding
from procon.settings import Backend


@torch.no_grad()
def typical_departure(hidden: Tensor, vectors: Tensor, anchors: Tensor, mask: Tensor, backend: Backend) -> Tensor:
    """Median over a block's constrained tokens of how far they are from their anchors: 1 is as far as rounding takes.

    A scalar, NaN without tokens; waits for the device. Of several directions, the farthest counts. A median, as tokens
    a hundred times as long as others, such as a sequence's first, hand down the rounding of that length.

    Args:
        hidden: ``[..., D]``.
        vectors, anchors, mask: ``[K, D]``, ``[N, K]`` and ``[N]``; of one direction also ``[D]`` and ``[N]``.
    """
    constrained = mask > 0
    states = hidden.flatten(0, -2)[constrained]
    vectors = vectors.view(-1, vectors.shape[-1])
    departures = project(states, vectors, backend=backend) - anchors.view(len(mask), -1)[constrained]
    states = states.float()  # anchors are fp32, whatever the states are
    share = max(rounding(hidden, "absolute"), rounding(states, "absolute"), _TF32 if _uses_tf32() else 0)
    reach = share * torch.outer(*(torch.linalg.vector_norm(each, dim=1) for each in (states, vectors)))
    return (departures.abs() / reach).amax(1).median()


#: Four units in the last place of TF32, in which GPUs may multiply float32.
_TF32 = 2.0**-8


def _uses_tf32() -> bool:
    # The older question is an error once the newer setting was made.
    return getattr(torch.backends.cuda.matmul, "fp32_precision", None) == "tf32" or (
        torch.get_float32_matmul_precision() != "highest"
    )
