"""Models and tokenizers from disk or the hub, in a dtype that suits the machine."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM, PeftConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from procon.errors import ProConError
from procon.models.attention import use_best_attention
from procon.models.devices import check_devices, default_device
from procon.models.hub import check_model_name

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def default_dtype() -> torch.dtype:
    """bfloat16 if the machine multiplies it natively (CUDA, ROCm, XPU, AMX or AVX512-BF16), else float32; so on MPS."""
    kind = default_device().type
    if kind != "cpu":
        return torch.float32 if kind == "mps" else torch.bfloat16
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.bfloat16 if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16") else torch.float32


def parse_dtype(name: str) -> torch.dtype:
    """A dtype from ``auto``, ``bfloat16``, ``float16`` or ``float32``."""
    if name == "auto":
        return default_dtype()
    if name not in _DTYPES:
        raise ProConError(f"dtype is {name!r}: choose one of auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_loading(
    *,
    device_map: Mapping[str, Any] | str | int | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
    **others: Any,
) -> None:
    """Raise ProConError for arguments of :func:`load_model` that this machine has not what they need for."""
    check_devices(device_map)
    if load_in_4bit and load_in_8bit:
        raise ProConError("load_in_4bit and load_in_8bit are both set: choose one")
    if (load_in_4bit or load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        name = "load_in_4bit" if load_in_4bit else "load_in_8bit"
        raise ProConError(f"{name} needs bitsandbytes, which is not installed: pip install bitsandbytes")


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
        dtype: also by its name; :func:`default_dtype` if not given. Under 4 bits it is what they are computed in.
        attn_implementation: by transformers' name, or ``"auto"`` for the best for training on packed sequences
            (:func:`procon.models.best_attention`); what transformers chooses if not given.
        trust_remote_code: run code that comes with the model, with all your rights. Read it first.
        device_map: a device; or ``"auto"``, ``"balanced"`` or ``"sequential"``, to spread the model over those that
            there are, and over memory and disk if it fits on none; or a device for each module, as transformers takes
            it. :func:`default_device` if not given.
        load_in_4bit: quantise to 4 bits with bitsandbytes: NF4 with double quantisation, as QLoRA does.
        load_in_8bit: quantise to 8 bits with bitsandbytes.

    Raises:
        ProConError: if there is no such model, it cannot be loaded, or it has code of its own that is not trusted; for
            a device that is not there, and bits without bitsandbytes.
    """
    check_loading(device_map=device_map, load_in_4bit=load_in_4bit, load_in_8bit=load_in_8bit)
    check_model_name(name)
    dtype = parse_dtype(dtype) if isinstance(dtype, str) else dtype or default_dtype()
    chosen: dict[str, Any] = (
        {} if attn_implementation in (None, "auto") else {"attn_implementation": attn_implementation}
    )
    if load_in_4bit or load_in_8bit:
        chosen["quantization_config"] = _bits(load_in_4bit, dtype)
        # Quantised as they are read: transformers puts them on a GPU, and nothing moves them afterwards.
        device_map = {"": str(default_device())} if device_map is None else device_map
    if device_map is not None:
        chosen["device_map"] = dict(device_map) if isinstance(device_map, Mapping) else device_map
    is_adapter = (Path(name) / "adapter_config.json").is_file()
    loader = AutoPeftModelForCausalLM if is_adapter else AutoModelForCausalLM
    # Said in so many words: if it is left open, transformers asks in the terminal, and takes a `y` from a pipe.
    chosen["trust_remote_code"] = trust_remote_code
    try:
        base = str(PeftConfig.from_pretrained(str(name)).base_model_name_or_path if is_adapter else name)
        if is_adapter:
            check_model_name(base)
        if not trust_remote_code:
            _refuse_kernels(name, PreTrainedConfig.get_config_dict(base)[0])
        own = not is_adapter or (Path(name) / "tokenizer_config.json").is_file()  # PEFT alone saves none
        tokenizer = AutoTokenizer.from_pretrained(str(name) if own else base, trust_remote_code=trust_remote_code)
        model = loader.from_pretrained(str(name), dtype=dtype, **chosen)
    except ProConError:
        raise
    except Exception as error:  # a wrong name shows in a dozen exception types
        if "trust_remote_code" in str(error):
            raise _untrusted(name, "code of its own") from error
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ProConError(f"model {str(name)!r} cannot be loaded ({reason}): give a folder or a hub name") from error
    device = default_device()
    if device_map is None and device.type != "cpu":
        model = model.to(device)  # pyright: ignore[reportArgumentType]  # transformers' decorator hides its self
    if attn_implementation == "auto":
        use_best_attention(model)
    return model, tokenizer


def _bits(four: bool, dtype: torch.dtype) -> BitsAndBytesConfig:
    """As QLoRA has it (arXiv 2305.14314), or LLM.int8."""
    if not four:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _refuse_kernels(name: str | Path, config: dict[str, Any]) -> None:
    """Raise ProConError if a configuration asks for attention or experts by a hub's name: transformers would fetch
    them from there and run them."""
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_kernels(name, value)
        if ("attn_implementation" in key or "experts_implementation" in key) and "/" in str(value):
            raise _untrusted(name, f"{key} {value!r:.60}, which is code from a hub")


def _untrusted(name: str | Path, what: str) -> ProConError:
    return ProConError(
        f"model {str(name)!r} comes with {what}, which is not run: read it and, if you trust it, set "
        "trust_remote_code=True (--trust_remote_code)"
    )
