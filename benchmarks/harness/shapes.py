"""Models of known shapes with random weights, their batches, directions and optimiser."""

from collections.abc import Iterable
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.harness.machine import DEVICE, installed
from procon.directions import Directions
from procon.settings import PAPER_RECIPE


def _llama(size: int, inner: int, blocks: int, heads: int, key_value_heads: int, vocabulary: int, tied: bool) -> dict:
    return {
        "hidden_size": size,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
    }


SHAPES = {
    "smoke": _llama(64, 128, 3, 4, 2, 128, True),
    "SmolLM2-135M": _llama(576, 1536, 30, 9, 3, 49152, True),
    "Llama-3.2-1B": _llama(2048, 8192, 16, 32, 8, 128256, True),
    "Llama-2-7B": _llama(4096, 11008, 32, 32, 32, 32000, False),
    "Llama-3-8B": _llama(4096, 14336, 32, 32, 8, 128256, False),
}


def make_model(shape: str, dtype: torch.dtype, training: str) -> nn.Module:
    """A model in training mode; ``training`` is "full", or "lora": the paper's adapter."""
    torch.manual_seed(0)
    attention = "flash_attention_2" if DEVICE == "cuda" and installed("flash-attn") else "sdpa"
    config = LlamaConfig(**SHAPES[shape], use_cache=False)
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    if training == "lora":
        # In the dtype of the model: the plain step is then at its fastest.
        model = get_peft_model(model, LoraConfig(**PAPER_RECIPE.lora()), autocast_adapter_dtype=False)
    return model.train()


def make_optimizer(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    """AdamW in its fused form, the default of transformers' Trainer."""
    return torch.optim.AdamW((p for p in parameters if p.requires_grad), lr=1e-4, fused=True)


def make_directions(shape: str) -> Directions:
    """Random unit directions: their values do not change what a step costs."""
    blocks, size = SHAPES[shape]["num_hidden_layers"], SHAPES[shape]["hidden_size"]
    unit = torch.nn.functional.normalize(torch.randn(blocks, size, generator=torch.Generator().manual_seed(2)), dim=1)
    return Directions(unit[:, None], torch.ones(blocks, 1))


def make_batch(shape: str, rows: int, length: int, *, packed: bool) -> dict[str, Any]:
    """Sequences of ``length`` tokens whose last two thirds are the response; in rows, or one after another in one."""
    generator = torch.Generator().manual_seed(3)
    input_ids = torch.randint(SHAPES[shape]["vocab_size"], (rows, length), generator=generator)
    labels = input_ids.clone()
    labels[:, : length // 3] = -100
    batch = {"input_ids": input_ids, "labels": labels}
    if packed:
        batch["position_ids"] = torch.arange(length).expand(rows, length)
        batch = {name: value.reshape(1, -1) for name, value in batch.items()}
    return {name: value.to(DEVICE) for name, value in batch.items()}
