"""Attention that keeps packed sequences apart: the best implementation for it, and whether a model really does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from procon.decoder import Decoder, find_decoder, observe_block_inputs
from procon.errors import ProConError
from procon.sequences import Sequence as TokenSequence

#: Relative change of a hidden state that counts as rounding, at least, and in units of the dtype's resolution: where
#: tokens are routed to experts, the other tokens of a row change the shapes, and with them the order, of sums.
_ROUNDING = 1e-4
_ROUNDING_UNITS = 4

#: Tokens of a sequence that are watched for a trace of the one before it. Not the first alone: some models give that
#: one a state so large that nothing else shows in it.
_WATCHED = 8


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


def use_best_attention(model: nn.Module) -> str:
    """Switch ``model``, loaded to where it trains, to :func:`best_attention`; returns its implementation after that.

    It keeps what it has where FlashAttention does not run, or its class does not take it.
    """
    decoder = find_decoder(model)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    weight = base.get_input_embeddings().weight
    widths = [
        getattr(module, name, None) for module in decoder.blocks.modules() for name in ("head_dim", "qk_head_dim")
    ]
    head_dim = max((width for width in widths if isinstance(width, int)), default=128)
    best = best_attention(weight.dtype, device=weight.device, head_dim=head_dim)
    takes = getattr(base, "_compatible_flash_implementations", None)
    if best != "sdpa" and base._supports_flash_attn and (takes is None or best in takes):
        base.set_attn_implementation(best)
    return decoder.module.config._attn_implementation


def check_packing(
    forward: Callable[..., Any], decoder: Decoder, inputs: Mapping[str, Any], sequences: Sequence[TokenSequence]
) -> None:
    """Raise ProConError if, in a packed row, what comes before a sequence changes its hidden states.

    Then neither are its anchors its own, nor is what it is trained on. Many a decoder mixes the sequences of a row
    without a word: recurrent and convolutional blocks that are not told the bounds, attention whose mask is made
    without ``position_ids``. So the batch runs twice, the second time with other tokens before the last sequence of
    each row, which that sequence must not notice.

    Args:
        forward: runs ``decoder`` on ``inputs``; under sharded parameters all ranks must call.
        sequences: of the batch, by row and start.
    """
    first = {sequence.row: sequence.start for sequence in reversed(sequences)}
    last = {sequence.row: sequence for sequence in sequences}
    watched = [
        (row, slice(sequence.start, sequence.start + min(_WATCHED, len(sequence.input_ids))))
        for row, sequence in last.items()
        if sequence.start > first[row]
    ]
    changed = inputs["input_ids"].clone()
    for row, span in watched:
        changed[row, first[row] : span.start] = changed[row, span.start]
    states = []

    def observe(block: int, hidden: Tensor) -> None:
        if block == len(decoder.blocks) - 1:
            states.append(torch.cat([hidden[:0, 0], *(hidden[row, span] for row, span in watched)]))

    with observe_block_inputs(decoder, observe):
        forward(**inputs)
        forward(**{**inputs, "input_ids": changed})
    before, after = (state.float() for state in states)
    device_type = before.device.type
    autocast = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocast else states[0].dtype
    tolerance = max(_ROUNDING, _ROUNDING_UNITS * torch.finfo(dtype).eps)
    if ((after - before).norm(dim=-1) > tolerance * before.norm(dim=-1)).any():
        raise ProConError(
            f"{type(decoder.module).__name__} with attn_implementation {decoder.module.config._attn_implementation!r} "
            "lets the sequences of a packed row see each other: pad them instead of packing or flattening"
        )
