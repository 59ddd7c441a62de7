"""Where a LoRA adapter goes in a model whose attention has other names than the paper's models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from procon.errors import ProConError
from procon.models.decoder import find_decoder

#: transformers has a linear layer of its own for GPT-2; quantised ones extend torch's.
_LINEAR = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


def adapter_targets(model: nn.Module, names: Sequence[str]) -> list[str]:
    """``names`` if each of them is in the blocks of ``model``; else the linear layers of its attention.

    Those are the linear layers of the modules in a block that have ``attn`` or ``attention`` in their names, as names
    that PEFT finds in every block: ``attn.c_attn`` and ``attn.c_proj`` of GPT-2.

    Raises:
        ProConError: if no block has such a module.
    """
    blocks = find_decoder(model).blocks
    there = {name.rpartition(".")[2] for block in blocks for name, _ in block.named_modules()}
    if there >= set(names):
        return list(names)
    found: dict[str, None] = {}
    for block in blocks:
        for name, module in block.named_children():
            if "attn" in name or "attention" in name:
                linear = (inner for inner, layer in module.named_modules() if type(layer).__name__ in _LINEAR)
                found |= dict.fromkeys(f"{name}.{inner}" if inner else name for inner in linear)
    if not found:
        raise ProConError(
            f"no attention is found in the blocks of {type(model).__name__}, so lora_targets 'auto' has nothing to go "
            "by: give the names of its modules, or all-linear"
        )
    return list(found)
