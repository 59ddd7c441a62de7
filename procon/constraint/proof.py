"""Does the constraint act? Where its gradient goes, and what would break it or leave it without effect."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.distributed.tensor import DTensor

from procon.errors import ProConError

#: Nodes of :mod:`procon.ops.autograd`, whose penalties have a gradient for the first input alone, the hidden states.
_OURS = ("ConstrainBackward", "RmsNormConstrainBackward")

#: Those that hand a tensor and its gradient on as they are: of this package, DeepSpeed's ZeRO-3, and FSDP2.
_IDENTITIES = ("ConstrainBackward", "PostBackwardFunctionModuleBackward", "RegisterPostBackwardFunctionBackward")


def is_the_same(one: Tensor, other: Tensor) -> bool:
    """Whether ``one`` is ``other``, or comes of it by nothing but nodes known to be the identity."""
    if one is other:
        return True
    if torch.compiler.is_compiling() or isinstance(one, DTensor) or isinstance(other, DTensor):
        return False
    if any(ask(one) != ask(other) for ask in (Tensor.data_ptr, Tensor.size, Tensor.stride, lambda t: t.dtype)):
        return False
    node, end = one.grad_fn, other.grad_fn
    while node is not None and node is not end:
        if node.name() not in _IDENTITIES:
            return getattr(node, "variable", None) is other  # a leaf
        node = node.next_functions[0][0]
    return node is end


def reaches_a_parameter(penalties: Iterable[Tensor]) -> bool:
    """Whether backward from one of ``penalties`` may arrive at a parameter.

    Which parameters train does not show it: the final norm follows all blocks, and a hidden state may require a
    gradient without any. So the graph is asked. Another library's node may hide parameters, as reentrant checkpoints
    do, and counts as one.
    """
    return any(
        isinstance(getattr(node, "variable", None), nn.Parameter)
        or (node.name() not in _OURS and isinstance(node, BackwardCFunction))
        for node in nodes_before(_before(penalty.grad_fn) for penalty in penalties)
    )


def nodes_before(nodes: Iterable[Any]) -> Iterator[Any]:
    """Each node of the graph that a gradient gets to from one of ``nodes``, once; a node may be None."""
    waiting, seen = list(nodes), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting.extend(before for before, _ in node.next_functions)


def _before(node: Any) -> Any:
    """What a penalty's gradient goes to, of ``node`` that made it; the norm's weight, another input, gets none."""
    return node.next_functions[0][0] if node is not None and node.name() in _OURS else node


def refuse_data_parallel(n_gpu: int) -> None:
    """Raise ProConError if a Trainer would wrap the model in ``nn.DataParallel``: one process sees several GPUs."""
    if n_gpu > 1:
        raise ProConError("nn.DataParallel copies the model without its hooks: start one process per GPU with torchrun")


def refuse_noise(neftune_noise_alpha: float | None) -> None:
    """Raise ProConError if embeddings get noise in training, in the probes' forwards too: anchors are without."""
    if neftune_noise_alpha:
        raise ProConError(
            f"neftune_noise_alpha is {neftune_noise_alpha:g}, and noise on the embeddings moves every token further "
            "from its anchor than training does, so the constraint would act against the noise: leave it out"
        )


def check_finite(penalty: float, step: int) -> None:
    """Raise ProConError if the penalty up to optimiser step ``step`` says that hidden states went bad."""
    if not math.isfinite(penalty):
        raise ProConError(
            f"the penalty became {penalty} by step {step}, so hidden states are NaN or infinite: resume from the last "
            "checkpoint with a lower learning rate, or train in bfloat16 or float32"
        )
