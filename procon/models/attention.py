"""Attention that keeps packed sequences apart: the best implementation for a GPU, a dtype and a head width."""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from procon.models.decoder import find_decoder, token_embedding, transformers_model


def best_attention(dtype: torch.dtype, *, device: torch.device | str = "cuda", head_dim: int = 128) -> str:
    """The ``attn_implementation`` for packed training: the newest FlashAttention that runs, else ``"sdpa"``.

    FlashAttention takes the bounds of the sequences as they are; ``sdpa`` gets a mask of ``T x T``, which costs memory
    and time that grow with the square of the packed length.

    ============================  ===========================================  ==================
    ``attn_implementation``       GPUs (compute capability)                    largest head
    ============================  ===========================================  ==================
    ``flash_attention_4``         Hopper, data-centre Blackwell (9.x, 10.x)    128
    ``flash_attention_3``         Hopper (9.x)                                 256
    ``flash_attention_2``         Ampere and later (8.x and above), ROCm       256
    ============================  ===========================================  ==================

    Args:
        dtype: of the hidden states; FlashAttention computes in bfloat16 and float16 alone.
        device: that the model trains on.
        head_dim: width of its attention heads.
    """
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or dtype not in (torch.bfloat16, torch.float16):
        return "sdpa"
    rocm = torch.version.hip is not None
    generation = 0 if rocm else torch.cuda.get_device_capability(device)[0]
    if is_flash_attn_4_available() and generation in (9, 10) and head_dim <= 128:
        return "flash_attention_4"
    if is_flash_attn_3_available() and generation == 9 and head_dim <= 256:
        return "flash_attention_3"
    if is_flash_attn_2_available() and (rocm or generation >= 8) and head_dim <= 256:
        return "flash_attention_2"
    return "sdpa"


def use_best_attention(model: nn.Module) -> str | None:
    """Switch ``model``, loaded to where it trains, to :func:`best_attention`; returns its implementation after that.

    It keeps what it has if FlashAttention does not run, or its class does not take it.
    """
    decoder = find_decoder(model)
    base = transformers_model(model)
    weight = token_embedding(base).weight
    widths = [
        getattr(module, name, None) for module in decoder.blocks.modules() for name in ("head_dim", "qk_head_dim")
    ]
    head_dim = max((width for width in widths if isinstance(width, int)), default=128)
    best = best_attention(weight.dtype, device=weight.device, head_dim=head_dim)
    takes = getattr(base, "_compatible_flash_implementations", None)
    if best != "sdpa" and base._supports_flash_attn and (takes is None or best in takes):
        base.set_attn_implementation(best)
    return decoder.attn_implementation
