"""The LoRA adapter that a model trains: its layers and their factors."""

from __future__ import annotations

from collections.abc import Iterator

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from procon.errors import ProConError


def check_lora_alone(model: nn.Module, does: str) -> None:
    """Raise ProConError if anything but a LoRA adapter trains; ``does``: what is done to it, as "SafeLoRA projects"."""
    beside = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not any(part in name for part in (".lora_A.", ".lora_B."))
    ]
    if beside or not isinstance(model, PeftModel):
        what = beside[0] if beside else "no adapter"
        raise ProConError(f"{does} a LoRA adapter, but {what} trains: train LoRA alone")


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """Name and layer of each layer with an adapter.

    Raises:
        ProConError: if there is none, or one of another kind than LoRA on a linear layer.
    """
    layers = {name: m for name, m in without_peft(model).named_modules() if isinstance(m, BaseTunerLayer)}
    if not layers:
        raise ProConError(f"a LoRA adapter is expected, and {type(model).__name__} has none: add one")
    for name, layer in layers.items():
        adapters = layer.active_adapters
        plain = isinstance(layer.get_base_layer(), (nn.Linear, Conv1D)) and len(adapters) == 1
        if not isinstance(layer, LoraLayer) or not plain or adapters[0] not in layer.lora_A or layer.lora_variant:
            raise ProConError(f"layer {name} has another adapter than one LoRA on a linear layer: train LoRA alone")
        yield name, layer


def lora_factors(layer: LoraLayer) -> tuple[nn.Parameter, nn.Parameter]:
    """``A [r, in]`` and ``B [out, r]`` of the layer's active adapter."""
    adapter = layer.active_adapters[0]
    a, b = (factors[adapter].get_parameter("weight") for factors in (layer.lora_A, layer.lora_B))
    return a, b


def without_peft(model: nn.Module) -> nn.Module:
    """The transformers model in a PEFT one, adapters in place."""
    return model.get_base_model() if isinstance(model, PeftModel) else model
