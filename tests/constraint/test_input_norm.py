"""Is the norm through which a block reads its input found, with its rule, and nothing mistaken for it?"""

import copy

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from procon.constraint.input_norm import InputNorm, find_norm
from procon.models import Decoder, find_decoder

LLAMA, GEMMA = ("llama", 0.0), ("gemma", 1.0)
FAMILIES = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "phi3": LLAMA, "mixtral": LLAMA}
FAMILIES |= {"gemma": GEMMA, "gemma2": GEMMA, "gemma3": GEMMA, "gpt_oss": ("gemma", 0.0)}


@pytest.mark.parametrize("family", FAMILIES)
def test_found_with_its_rule(tiny_model, family):
    decoder = find_decoder(tiny_model(family))
    for index, block in enumerate(decoder.blocks):
        norm = find_norm(decoder, index)
        assert norm.module is block.input_layernorm
        assert (norm.casting, norm.offset) == FAMILIES[family]
        assert norm.eps == getattr(norm.module, "variance_epsilon", getattr(norm.module, "eps", None))


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt2", "its blocks have no RMSNorm"),
        ("gpt_neox", "its blocks have no RMSNorm"),
        ("cohere", "CohereLayerNorm computes something else than the known RMSNorms"),
        ("olmo2", "its blocks read their input before an RMSNorm does"),
    ],
)
def test_blocks_that_read_their_input_otherwise(tiny_model, family, reason):
    """LayerNorms, and OLMo 2, whose RMSNorms read what attention and MLP give out."""
    assert find_norm(find_decoder(tiny_model(family)), 1) == reason


class Block(nn.Module):
    """A block whose first norm is an RMSNorm, called as ``call`` says."""

    def __init__(self, norm: nn.Module, call):
        super().__init__()
        self.norm = norm
        self.call = call

    def forward(self, hidden_states, position_embeddings, **kwargs):
        return hidden_states + self.call(self.norm, hidden_states)


def found(norm: nn.Module, call) -> InputNorm | str:
    """What is found in such a block."""
    block = Block(norm, call)
    return find_norm(Decoder(nn.ModuleDict({"blocks": nn.ModuleList([block])}), nn.ModuleList([block]), 32), 0)


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
        (LlamaRMSNorm(32), lambda norm, x: norm(x.mul_(2))),
        (LlamaRMSNorm(16), lambda norm, x: norm(x.view(1, 2, 16)).view(x.shape)),
        (Doubled(32), lambda norm, x: norm(x)),
        (Biased(32), lambda norm, x: norm(x)),
        (NeedsGpu(32), lambda norm, x: norm(x)),
        (nn.LayerNorm(32), lambda norm, x: norm(x)),
    ],
    ids=["scaled", "sliced", "edited", "per head", "another formula", "bias", "fails", "LayerNorm"],
)
def test_look_alikes(norm, call):
    assert isinstance(found(norm, call), str)
    assert isinstance(found(LlamaRMSNorm(32), lambda norm, x: norm(x)), InputNorm)


def test_torch_rms_norm_with_an_explicit_eps():
    def call(norm, x):
        return norm(x)

    norm = found(nn.RMSNorm(32, eps=1e-6), call)
    assert (norm.casting, norm.offset, norm.eps) == ("gemma", 0.0, 1e-6)
    # Without one it depends on the dtype of the input.
    assert found(nn.RMSNorm(32), call) == "its blocks have no RMSNorm"


def test_weights_may_be_anywhere_and_nothing_changes(tiny_model):
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    decoder = find_decoder(model)
    assert isinstance(find_norm(decoder, 0), InputNorm)
    assert all(not module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.gradient_checkpointing_enable({"use_reentrant": True})
    assert isinstance(find_norm(decoder, 0), InputNorm)
    decoder.blocks[0].to("meta")
    assert isinstance(find_norm(decoder, 0), InputNorm)


def test_sharded_weights(tiny_model, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        decoder = find_decoder(tiny_model())
        fully_shard(decoder.blocks[0])
        assert isinstance(find_norm(decoder, 0), InputNorm)
    finally:
        torch.distributed.destroy_process_group()


class OwnNorm(LlamaRMSNorm):
    """A norm of a model of one's own: like RMSNorm, except where ``of`` says otherwise."""

    def __init__(self, of, size: int = 32):
        super().__init__(size, 1e-5)
        self.of = of

    def forward(self, hidden_states):
        return self.of(self, hidden_states)


def rms_plus_eps(norm, x):
    x = x.float()
    return norm.weight * (x / (x.square().mean(-1, keepdim=True).sqrt() + norm.variance_epsilon)).bfloat16()


def clamped(norm, x):
    x = x.float()
    inverse = x.square().mean(-1, keepdim=True).clamp_min(norm.variance_epsilon).rsqrt()
    return norm.weight * (x * inverse).bfloat16()


def by_length(norm, x):
    return norm.weight * (nn.functional.normalize(x.float(), dim=-1, eps=1e-6) * 32**0.5).bfloat16()


def clipped(norm, x):
    return LlamaRMSNorm.forward(norm, x.clamp(-100, 100))


def as_ever(norm, x):
    return LlamaRMSNorm.forward(norm, x)


@pytest.mark.parametrize("of", [rms_plus_eps, clamped, by_length, clipped, as_ever])
def test_rules_that_differ_at_some_scale(of):
    state = torch.get_rng_state()
    assert isinstance(found(OwnNorm(of), lambda norm, x: norm(x)), InputNorm) == (of is as_ever)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_input_in_the_dtype_of_the_weight(tiny_model, dtype):
    """Mamba 2's blocks convert their input to it."""
    settings = {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4}
    decoder = find_decoder(tiny_model("mamba2", **settings, residual_in_fp32=False).to(dtype))
    assert isinstance(find_norm(decoder, 1), InputNorm)


def test_what_moves_weights_between_devices_stays_asleep(tiny_model):
    """Accelerate's hooks, as ``device_map`` sets them: finding out about the norm runs none of them."""
    decoder = find_decoder(tiny_model())

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    hook = Counting()
    add_hook_to_module(decoder.blocks[0], hook)
    assert isinstance(find_norm(decoder, 0), InputNorm)
    add_hook_to_module(decoder.blocks[0].input_layernorm, hook)
    assert find_norm(decoder, 0) == "another package has put its own forward into its norms"
    assert hook.calls == 0
