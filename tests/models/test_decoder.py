"""Finding the decoder in every kind of model and wrapper, and what must not be taken for one."""

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    BertConfig,
    Qwen2VLConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from procon.errors import ProConError
from procon.models import (
    configuration_hash,
    find_decoder,
    first_moving_block,
    observe_block_inputs,
    weights_hash,
)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox")

WRAPPERS = {
    "plain": lambda model: model,
    "peft": lambda model: get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")),
    "compiled": torch.compile,
    "compiled peft": lambda model: torch.compile(WRAPPERS["peft"](model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_of_every_family_in_every_wrapper(tiny_model, family, wrapper):
    model = tiny_model(family).eval()
    expected = list(model.get_decoder().children())
    decoder = find_decoder(WRAPPERS[wrapper](model))
    assert decoder.module is model.get_decoder()
    assert decoder.blocks in expected
    assert (len(decoder.blocks), decoder.hidden_size) == (3, 32)

    seen = {}
    ids = torch.randint(3, 200, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), observe_block_inputs(decoder, lambda block, h: seen.__setitem__(block, h)):
        states = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(seen) == [0, 1, 2]
    for block, hidden in seen.items():
        assert torch.equal(hidden, states[block])
    with torch.no_grad():
        model(input_ids=ids + 1)
    assert torch.equal(seen[0], states[0])  # nothing is watched any more


def test_a_block_of_several_streams_is_refused(tiny_model):
    model = tiny_model()
    decoder = find_decoder(model)
    decoder.blocks[1].register_forward_hook(lambda _module, _args, output: output.repeat(1, 1, 2))
    message = r"^block 2 reads hidden states of shape \(1, 2, 64\), not \[batch, tokens, 32\]"
    with torch.no_grad(), observe_block_inputs(decoder, lambda *_: None), pytest.raises(ProConError, match=message):
        model(input_ids=torch.tensor([[5, 6]]))


def test_the_language_side_of_a_vision_language_model():
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    text |= {"num_key_value_heads": 2, "vocab_size": 99, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    # As many vision blocks as decoder blocks, and another width.
    vision = {"depth": 3, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2}
    model = AutoModelForImageTextToText.from_config(Qwen2VLConfig(text_config=text, vision_config=vision))
    decoder = find_decoder(model)
    assert decoder.module is model.model.language_model
    assert decoder.blocks is model.model.language_model.layers
    assert decoder.hidden_size == 32


def test_an_encoder_decoder_is_refused():
    model = T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    with pytest.raises(ProConError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_decoder(model)


def test_prompt_learning_is_refused(tiny_model):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(ProConError, match=r"PROMPT_TUNING lengthens the sequence .*: use LoRA"):
        find_decoder(get_peft_model(tiny_model(), config))


def test_a_module_that_is_no_causal_lm_is_refused():
    with pytest.raises(ProConError, match="model is a Linear, not a transformers causal LM: pass a PreTrainedModel"):
        find_decoder(nn.Linear(2, 2))
    bert = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    with pytest.raises(ProConError, match=r"no decoder found in BertForMaskedLM: expected .* 2 blocks"):
        find_decoder(AutoModelForMaskedLM.from_config(bert))


@pytest.mark.parametrize(
    ("trained", "first"),
    [
        ((), 3),
        (("lm_head",), 3),
        (("model.norm",), 3),
        (("model.norm", "model.layers.0.mlp"), 1),
        (("model.layers.2.mlp",), 3),
        (("model.layers.1.self_attn.q_proj", "lm_head"), 2),
        (("model.layers.0.input_layernorm",), 1),
        (("model.embed_tokens",), 0),
        (("",), 0),
    ],
)
def test_first_block_whose_input_moves(tiny_model, trained, first):
    model = tiny_model().requires_grad_(False)
    for name in trained:
        model.get_submodule(name).requires_grad_()
    assert first_moving_block(find_decoder(model)) == first


def test_the_weights_hash_follows_every_weight(tiny_model):
    model = tiny_model()
    first = weights_hash(model)
    assert weights_hash(tiny_model()) == first
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        # Not at the ends only: a hash of a sample of the values would miss most of the others.
        for index in {0, len(flat) - 1, *torch.randint(len(flat), (5,), generator=generator).tolist()}:
            before = flat[index].clone()
            flat[index] = torch.nextafter(before, torch.tensor(9.0))
            assert weights_hash(model) != first
            flat[index] = before
    assert weights_hash(model) == first


def test_the_weights_hash_follows_places():
    """Not only of values whose places it samples."""
    model = nn.Linear(512, 64, bias=False)
    first = weights_hash(model)
    weight = model.weight.data
    for one, two in ((weight[3], weight[40]), (weight[:, 1], weight[:, 300]), (weight[5, 7:9], weight[5, 9:11])):
        before = one.clone(), two.clone()
        one.copy_(before[1])
        two.copy_(before[0])
        assert weights_hash(model) != first
        one.copy_(before[0])
        two.copy_(before[1])
    assert weights_hash(model) == first


def test_the_configuration_hash_follows_what_changes_a_forward(tiny_model):
    first = configuration_hash(tiny_model())
    rope = {"rope_theta": 50.0, "rope_type": "default"}
    changes = [{"rms_norm_eps": 0.3}, {"hidden_act": "gelu"}, {"rope_parameters": rope}, {"num_key_value_heads": 1}]
    assert len({first, *(configuration_hash(tiny_model(**change)) for change in changes)}) == 5
    for same in ({"use_cache": False}, {"pad_token_id": 5}, {"attention_dropout": 0.5}, {"dtype": "float16"}):
        assert configuration_hash(tiny_model(**same)) == first
    model = tiny_model()
    model.config._name_or_path = "elsewhere"
    assert configuration_hash(model) == first
    assert configuration_hash(get_peft_model(model, LoraConfig(target_modules=["q_proj"]))) == first


def test_the_configuration_hash_follows_the_precision_of_buffers_that_are_made_from_it(tiny_model):
    assert configuration_hash(tiny_model().bfloat16()) != configuration_hash(tiny_model())  # coarser rotary positions
    dynamic = tiny_model(rope_parameters={"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0})
    first = configuration_hash(dynamic)
    dynamic(torch.ones(1, 600, dtype=torch.int64))  # longer than 512, for which they are made again
    assert configuration_hash(dynamic) == first


def test_the_weights_hash_follows_buffers():
    """GPTQ and AWQ keep their weights in some: packed integers and scales."""
    model = nn.Module()
    model.register_buffer("qweight", torch.arange(12, dtype=torch.int32) * 2**24)
    model.register_buffer("scales", torch.ones(3, dtype=torch.float16))
    model.register_buffer("mask", torch.ones(3), persistent=False)  # made again, not loaded
    first = weights_hash(model)
    model.mask += 1
    assert weights_hash(model) == first
    for buffer in (model.qweight, model.scales):
        buffer[2] += 1
        assert weights_hash(model) != first
        buffer[2] -= 1
    assert weights_hash(model) == first


def test_the_weights_hash_under_zero_3(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(F, "linear", F.linear)  # Init puts its own there, for the whole process
    deepspeed = pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    # Ranks on one CPU would first compile a way to share memory, which takes a minute.
    monkeypatch.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
    model = tiny_model()
    first = weights_hash(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        deepspeed.zero.Init(module=model)
        assert next(model.parameters()).numel() == 0
        assert weights_hash(model) == first
        assert next(model.parameters()).numel() == 0
    finally:
        dist.destroy_process_group()


def test_the_weights_hash_of_a_sharded_model(tiny_model, tmp_path):
    model = tiny_model()
    first = weights_hash(model)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        fully_shard(model)
        assert weights_hash(model) == first
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weights_hash_is_of_values_not_of_their_dtype(tiny_model, dtype):
    model = tiny_model().to(dtype)
    first = weights_hash(model)
    assert weights_hash(model.float()) == first
    assert weights_hash(tiny_model()) != first  # rounding to 16 bits is a change
