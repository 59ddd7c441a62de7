"""In which precision a model runs: the same weights give other projections under autocast."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from procon.models import (
    block_input,
    decoder_forward,
    evaluating,
    find_decoder,
    model_device,
    token_embedding,
)
from procon.sequences import decoder_inputs

#: What a model runs to show something of itself, or while other ranks need its part of the parameters.
ONE_TOKEN = {"input_ids": torch.zeros(1, 1, dtype=torch.int64)}

#: Autocast's dtypes by Accelerate's names.
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def running_precision(model: nn.Module) -> str:
    """``"no"`` if ``model`` runs in the dtype of its weights; else that of autocast, and that of the hidden states.

    As a forward of one token has them at the last block: autocast around the call and within the model, and what FSDP2
    casts to, show alike. If parameters are sharded, all ranks must call.
    """
    found: list[str] = []

    def observe(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = block_input(args, kwargs)
        if torch.is_autocast_enabled(hidden.device.type):
            dtype = torch.get_autocast_dtype(hidden.device.type)
            found.append(_NAMES.get(dtype, str(dtype)))
        if hidden.dtype != token_embedding(model).weight.dtype:
            found.append(f"hidden states {hidden.dtype}")

    hook = find_decoder(model).blocks[-1].register_forward_pre_hook(observe, with_kwargs=True)
    try:
        with evaluating(model):
            decoder_forward(model)(**decoder_inputs(ONE_TOKEN, model_device(model)))
    finally:
        hook.remove()
    return ", ".join(found) or "no"
