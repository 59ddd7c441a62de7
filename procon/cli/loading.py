"""The flags about how a model is loaded, as they are in every command that loads one; free of heavy imports."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from procon.cli.options import option
from procon.errors import ProConError
from procon.settings import check_choice

#: The title that they stand under.
LOADING = "loading the model"

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

#: Names of attention that transformers knows without code from a hub, and ours for the best of them.
_ATTENTION = ("auto", "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

#: How a model is spread over the devices that there are, by Accelerate's names.
_SPREAD = ("auto", "balanced", "balanced_low_0", "sequential")

_DEVICE = re.compile(r"cpu|mps|(cuda|xpu|npu|hpu)(:\d+)?|\d+")

ATTENTION = (
    "FlashAttention if it runs (auto), or one by transformers' name, such as sdpa or flash_attention_2; what "
    "transformers chooses if not given."
)

BATCH_SIZE = "Prompts at once, or auto; fewer whenever memory runs out."


@dataclass(kw_only=True)
class LoadingArguments:
    """How a command loads its models."""

    dtype: Dtype = option(
        "auto",
        "Of the weights; auto: bfloat16 if the machine multiplies it natively, else float32, as to train all weights.",
        LOADING,
    )
    device_map: dict | str | None = option(
        None,
        "Devices: auto, balanced or sequential spread a model over all there are; or one, such as cuda:1 or cpu; or a "
        "JSON object of devices by module. This process's GPU, XPU or MPS, else the CPU, if not given.",
        LOADING,
    )
    load_in_4bit: bool = option(False, "Quantise to 4 bits (NF4, as QLoRA does), by bitsandbytes.", LOADING)
    load_in_8bit: bool = option(False, "Quantise to 8 bits (LLM.int8), by bitsandbytes.", LOADING)
    attn_implementation: str | None = option(None, ATTENTION, LOADING)
    trust_remote_code: bool = option(
        False, "Run code that comes with the model, with your rights; read it first.", LOADING
    )

    def __post_init__(self) -> None:
        check_choice("dtype", self.dtype, get_args(Dtype))
        if self.load_in_4bit and self.load_in_8bit:
            raise ProConError("load_in_4bit and load_in_8bit are both set: choose one")
        attention = self.attn_implementation
        if attention is not None and "/" in attention and not self.trust_remote_code:
            raise ProConError(
                f"attn_implementation is {attention!r:.60}, which is code from a hub, which is not run: read it and, "
                "if you trust it, set --trust_remote_code"
            )
        if attention is not None and "/" not in attention:
            check_choice("attn_implementation", attention, _ATTENTION)
        self._devices()

    def loading(self) -> dict[str, Any]:
        """Arguments of :func:`procon.models.load_model`."""
        return {
            "dtype": self.dtype,
            "device_map": self._devices(),
            "load_in_4bit": self.load_in_4bit,
            "load_in_8bit": self.load_in_8bit,
            "attn_implementation": self.attn_implementation,
            "trust_remote_code": self.trust_remote_code,
        }

    def _devices(self) -> dict[str, Any] | str | None:
        """The device map, read and checked."""
        found: Any = self.device_map
        if isinstance(found, str) and found.lstrip().startswith("{"):
            try:
                found = json.loads(found)
            except (ValueError, RecursionError):
                found = None
        if isinstance(found, dict):
            if found and all(device == "disk" or _is_device(device) for device in found.values()):
                return found
        elif self.device_map is None or (isinstance(found, str) and (found in _SPREAD or _is_device(found))):
            return found
        raise ProConError(
            f"device_map is {str(self.device_map)!r:.80}: give {', '.join(_SPREAD)}, a device such as cuda:1 or cpu, "
            """or a JSON object such as '{"": "cuda:1"}'"""
        )


def _is_device(device: object) -> bool:
    return not isinstance(device, bool) and _DEVICE.fullmatch(str(device)) is not None


def check_batch_size(given: str) -> None:
    """Raise ProConError unless it is ``"auto"`` or a number."""
    if given != "auto" and not re.fullmatch("0*[1-9][0-9]{0,8}", str(given)):
        raise ProConError(f"batch_size is {given!s:.40}: give 1 or more, or auto")
