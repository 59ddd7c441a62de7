"""How a model runs while it is measured: in eval mode, without gradients, and without waiting for its LM head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from procon.models.decoder import transformers_model, unwrapped


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients; every module's own training flag is restored afterwards.

    The LM head gets contiguous hidden states. transformers gives it the last position as a slice, which is not
    contiguous for two prompts or more. If the head is frozen, as under an adapter, PyTorch then multiplies prompt by
    prompt; in bfloat16 on a CPU it also copies the head's weight for each of them, and takes a hundred times as long.
    The product is the same.
    """
    flags = [(module, module.training) for module in model.modules()]
    for module, _ in flags:
        module.training = False
    keep_quantised(model)
    head = getattr(transformers_model(unwrapped(model)), "get_output_embeddings", lambda: None)()
    try:
        with torch.no_grad(), nullcontext() if head is None else head.register_forward_pre_hook(_contiguous):
            yield
    finally:
        for module, training in flags:
            module.training = training


def _contiguous(_head: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args)


def keep_quantised(model: nn.Module) -> None:
    """Put layers whose weights bitsandbytes has quantised in training mode, in which they compute as training does.

    In eval mode on a CPU, it repacks 4-bit weights for good: coarser, and without a gradient. And it rounds what 8-bit
    weights multiply.
    """
    for module in model.modules():
        weight = module._parameters.get("weight")
        if hasattr(weight, "quant_state") or hasattr(weight, "SCB"):
            module.training = True
