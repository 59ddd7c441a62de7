"""Models and tokenizers from disk or the hub: on which device, in which dtype, with which attention."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available, is_flash_attn_4_available

from procon.errors import ProConError
from procon.models.decoder import find_decoder, token_embedding, transformers_model
from procon.settings import check_name


def default_device() -> torch.device:
    """This process's GPU, of whatever kind PyTorch finds, else the CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(found.type, int(os.environ.get("LOCAL_RANK", "0"))) if found else torch.device("cpu")


def spread(model: nn.Module) -> list[str]:
    """The devices that a device map spreads ``model`` over, in its order; none if it lies on one alone."""
    devices: Mapping[str, Any] = getattr(model, "hf_device_map", None) or {}
    found = list(dict.fromkeys(str(device) for device in devices.values()))
    return found if len(found) > 1 or "disk" in found else []


def default_dtype() -> torch.dtype:
    """bfloat16 where a step takes less in it than in float32: on GPUs but MPS, CPUs with AMX or AMD's AVX512-BF16."""
    kind = default_device().type
    if kind != "cpu":
        return torch.float32 if kind == "mps" else torch.bfloat16
    found = torch.cpu.get_capabilities()
    # By Intel's AVX512-BF16 a step took 1.6 times that in float32.
    fast = found.get("amx_bf16") or (found.get("avx512_bf16") and "Intel" not in found.get("cpu_name", ""))
    return torch.bfloat16 if fast else torch.float32


def best_attention(dtype: torch.dtype, *, device: torch.device | str = "cuda", head_dim: int = 128) -> str:
    """The ``attn_implementation`` for packed training in ``dtype``: the newest FlashAttention that runs on ``device``
    with heads of width ``head_dim``, else ``"sdpa"``.

    FlashAttention takes the bounds of the sequences as they are, in bfloat16 and float16 alone; ``sdpa`` gets a mask of
    ``T x T``, which costs memory and time that grow with the square of the packed length.

    ============================  ===========================================  ==================
    ``attn_implementation``       GPUs (compute capability)                    largest head
    ============================  ===========================================  ==================
    ``flash_attention_4``         Hopper, data-centre Blackwell (9.x, 10.x)    128
    ``flash_attention_3``         Hopper (9.x)                                 256
    ``flash_attention_2``         Ampere and later (8.x and above), ROCm       256
    ============================  ===========================================  ==================
    """
    on_gpu = torch.device(device).type == "cuda" and torch.cuda.is_available()
    if not on_gpu or dtype not in (torch.bfloat16, torch.float16):
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
    decoder, base = find_decoder(model), transformers_model(model)
    weight = token_embedding(base).weight
    heads = [
        getattr(module, name, 0) or 0 for module in decoder.blocks.modules() for name in ("head_dim", "qk_head_dim")
    ]
    best = best_attention(weight.dtype, device=weight.device, head_dim=max(heads) or 128)
    takes = getattr(base, "_compatible_flash_implementations", None)
    if best != "sdpa" and base._supports_flash_attn and (takes is None or best in takes):
        base.set_attn_implementation(best)
    return decoder.attn_implementation


def load_model(
    name: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device_map: Mapping[str, Any] | str | int | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal LM and its tokenizer; a LoRA folder loads with its base.

    Args:
        dtype: also by its name; :func:`default_dtype` if not given, or ``"auto"``. Under 4 bits it is what they are
            computed in.
        attn_implementation: by transformers' name, or ``"auto"`` for the best for training on packed sequences
            (:func:`procon.models.best_attention`); what transformers chooses if not given.
        trust_remote_code: run code that comes with the model, with all your rights. Read it first.
        device_map: a device; or ``"auto"``, ``"balanced"`` or ``"sequential"``, to spread the model over those that
            there are, and over memory and disk if it fits on none; or a device for each module, as transformers takes
            it. :func:`default_device` if not given.
        load_in_4bit: quantise to 4 bits with bitsandbytes: NF4 with double quantisation, as QLoRA does.
        load_in_8bit: quantise to 8 bits with bitsandbytes.

    Raises:
        ProConError: if there is no such model, it cannot be loaded as asked, or it has code of its own that is not
            trusted.
    """
    check_name(name)
    chosen: dict[str, Any] = {"dtype": default_dtype() if dtype in (None, "auto") else dtype}
    if attn_implementation not in (None, "auto"):
        chosen["attn_implementation"] = attn_implementation
    if load_in_4bit or load_in_8bit:
        # Quantised as they are read: transformers puts them on a GPU, and nothing moves them afterwards.
        device_map = {"": str(default_device())} if device_map is None else device_map
    if device_map is not None:
        chosen["device_map"] = dict(device_map) if isinstance(device_map, Mapping) else device_map
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    # Said in so many words: if it is left open, transformers asks in the terminal, and takes a `y` from a pipe.
    trust = {"trust_remote_code": trust_remote_code}
    try:
        if load_in_4bit or load_in_8bit:
            chosen["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=load_in_4bit,
                load_in_8bit=load_in_8bit,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=chosen["dtype"],
            )
        own = not is_adapter or (Path(name) / "tokenizer_config.json").is_file()  # PEFT alone saves none
        base = name if own else PeftConfig.from_pretrained(str(name)).base_model_name_or_path
        tokenizer = AutoTokenizer.from_pretrained(str(base), **trust)
        model = cast(Any, loader).from_pretrained(str(name), **chosen, **trust)
    except Exception as error:  # a wrong name shows in a dozen exception types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        remedy = "give a folder or a hub name"
        if "trust_remote_code" in str(error):
            remedy = "read its code and, if you trust it, set trust_remote_code=True (--trust_remote_code)"
        raise ProConError(f"model {str(name)!r} cannot be loaded ({reason}): {remedy}") from error
    device = default_device()
    if device_map is None and device.type != "cpu":
        model = model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' decorator hides its self
    if attn_implementation == "auto":
        use_best_attention(model)
    return model, tokenizer
