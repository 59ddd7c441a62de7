"""Is the norm through which a block reads its input found, with its rule, and nothing mistaken for it?"""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from procon.constraint.input_norm import find_input_norm
from procon.models import find_decoder

LLAMA, GEMMA = ("llama", 0.0), ("gemma", 1.0)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "phi3": LLAMA, "mixtral": LLAMA}
FAMILIES |= {"gemma": GEMMA, "gemma2": GEMMA, "gemma3": GEMMA, "gpt_oss": ("gemma", 0.0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_found_with_its_rule(tiny_model, family):
    decoder = find_decoder(tiny_model(family))
    for block in decoder.blocks:
        norm = find_input_norm(block, decoder.hidden_size)
        assert norm.module is block.input_layernorm
        assert (norm.casting, norm.offset) == FAMILIES[family]
        assert norm.eps == getattr(norm.module, "variance_epsilon", getattr(norm.module, "eps", None))


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "cohere", "olmo2"])
def test_blocks_that_read_their_input_otherwise(tiny_model, family):
    """LayerNorms, and OLMo 2, whose RMSNorms read what attention and MLP give out."""
    decoder = find_decoder(tiny_model(family))
    assert find_input_norm(decoder.blocks[1], decoder.hidden_size) is None


class Block(nn.Module):
    """A block whose first norm is an RMSNorm, called as ``call`` says."""

    def __init__(self, norm: nn.Module, call):
        super().__init__()
        self.norm = norm
        self.call = call

    def forward(self, hidden_states, position_embeddings, **kwargs):
        return hidden_states + self.call(self.norm, hidden_states)


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class Biased(LlamaRMSNorm):
    def __init__(self, size: int):
        super().__init__(size)
        self.bias = nn.Parameter(torch.zeros(size))


class NeedsGpu(LlamaRMSNorm):
    def forward(self, hidden_states):
        raise RuntimeError("no GPU")


@pytest.mark.parametrize(
    ("norm", "call"),
    [
        (LlamaRMSNorm(32), lambda norm, x: norm(2 * x)),
        (LlamaRMSNorm(32), lambda norm, x: norm(x[..., :])),
        (LlamaRMSNorm(16), lambda norm, x: norm(x.view(1, 2, 16)).view(x.shape)),
        (Doubled(32), lambda norm, x: norm(x)),
        (Biased(32), lambda norm, x: norm(x)),
        (NeedsGpu(32), lambda norm, x: norm(x)),
        (nn.LayerNorm(32), lambda norm, x: norm(x)),
    ],
    ids=["scaled", "sliced", "per head", "another formula", "bias", "fails", "LayerNorm"],
)
def test_look_alikes(norm, call):
    assert find_input_norm(Block(norm, call), 32) is None
    assert find_input_norm(Block(LlamaRMSNorm(32), lambda norm, x: norm(x)), 32) is not None


def test_torch_rms_norm_with_an_explicit_eps():
    def call(norm, x):
        return norm(x)

    norm = find_input_norm(Block(nn.RMSNorm(32, eps=1e-6), call), 32)
    assert (norm.casting, norm.offset, norm.eps) == ("gemma", 0.0, 1e-6)
    # Without one it depends on the dtype of the input.
    assert find_input_norm(Block(nn.RMSNorm(32), call), 32) is None


def test_weights_may_be_anywhere_and_nothing_changes(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    decoder = find_decoder(model)
    assert find_input_norm(decoder.blocks[0], 32) is not None
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert find_input_norm(decoder.blocks[0], 32) is not None
    assert find_input_norm(decoder.blocks[0].to("meta"), 32) is not None


def test_sharded_weights(tiny_model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        decoder = find_decoder(tiny_model())
        fully_shard(decoder.blocks[0])
        assert find_input_norm(decoder.blocks[0], 32) is not None
    finally:
        torch.distributed.destroy_process_group()
