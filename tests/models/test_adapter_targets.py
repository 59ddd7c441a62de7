"""Where LoRA goes if a model's attention has other names than the paper's models."""

import pytest
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer

from procon.errors import ProConError
from procon.models import adapter_targets
from procon.settings import PAPER_RECIPE

PAPER = list(PAPER_RECIPE.lora_targets)


@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", PAPER),
        ("qwen3", PAPER),
        ("gpt2", ["attn.c_attn", "attn.c_proj"]),
        ("gpt_neox", ["attention.query_key_value", "attention.dense"]),
        ("phi3", ["self_attn.o_proj", "self_attn.qkv_proj"]),
    ],
)
def test_the_attention_of_each_block_and_nothing_else(tiny_model, family, targets):
    model = tiny_model(family)
    found = adapter_targets(model, PAPER)
    assert sorted(found) == sorted(targets)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=found))
    places = [name for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]
    assert len(places) == 3 * len(targets)
    assert all("attn" in name or "attention" in name for name in places)


def test_a_model_without_attention(tiny_model):
    model = tiny_model()
    for block in model.model.layers:
        block.mixer = block.self_attn
        del block.self_attn
        block.mixer.projection = block.mixer.q_proj
        del block.mixer.q_proj
    with pytest.raises(ProConError, match="no attention is found in the blocks of LlamaForCausalLM, so lora_targets"):
        adapter_targets(model, PAPER)
