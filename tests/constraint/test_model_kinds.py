"""The constraint in every kind of decoder: experts, tied embeddings, other norms and blocks, vision-language models."""

import copy

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from procon.anchors import AnchoredCollator, Anchors
from procon.chat import ContrastPrompts
from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import find_decoder

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
}

#: Blocks that differ from each other, read their input without a norm, or are no attention at all.
UNUSUAL = {
    "olmo2": {},
    "phi": {},
    "cohere2": {},
    "gemma4_text": {"vocab_size_per_layer_input": 260, "hidden_size_per_layer_input": 8},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4},
    "qwen3_next": {
        **EXPERTS,
        "num_experts": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
}

both_ways = pytest.mark.parametrize("fuse", ["auto", "never"])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    return {"input_ids": ids, "labels": ids, "attention_mask": mask}


def in_float64(model):
    """A copy whose experts run one by one, which knows float64."""
    reference = copy.deepcopy(model).double()
    reference.set_experts_implementation("eager")
    return reference


@both_ways
@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts(tiny_model, batch, assert_penalty, family, fuse):
    model = tiny_model(family, **EXPERTS, **MIXTURES[family])
    assert_penalty(model, batch, reference=in_float64(model), fuse=fuse)


@both_ways
@pytest.mark.parametrize("family", UNUSUAL)
def test_unusual_blocks(tiny_model, batch, assert_penalty, family, fuse):
    model = tiny_model(family, **UNUSUAL[family])
    assert_penalty(model, batch, reference=in_float64(model), fuse=fuse)


@both_ways
def test_tied_embeddings(tiny_model, batch, assert_penalty, random_directions, fuse):
    model = tiny_model(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    state = copy.deepcopy(model.state_dict())
    assert_penalty(model, batch, fuse=fuse)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse):
        assert model.state_dict().keys() == state.keys()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_several_residual_streams_are_refused(tiny_model, batch, random_directions, tmp_path):
    """Gemma 3n carries four through its blocks."""
    settings = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "laurel_rank": 4}
    settings |= {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "intermediate_size": [64] * 3}
    model = tiny_model(
        "gemma3n_text", vocab_size_per_layer_input=260, activation_sparsity_pattern=[0.0] * 3, **settings
    )
    with pytest.raises(ProConError, match=r"block 0 reads hidden states of shape \(4, .*, 32\).* several residual"):
        Anchors.record(model, [batch], random_directions(model), tmp_path, progress=False, scope="response")


def test_a_block_that_runs_twice_is_refused(tiny_model, batch, random_directions, tmp_path):
    model = tiny_model()
    model.model.layers[2] = model.model.layers[0]
    directions = random_directions(model)
    with pytest.raises(ProConError, match="runs twice in one forward: looped decoders are not supported"):
        Anchors.record(model, [batch], directions, tmp_path, progress=False, scope="response")
    for fuse in ("auto", "never"):
        twice = pytest.raises(ProConError, match="ran twice")
        with twice, ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
            constraint.set_target(torch.zeros(2, 9, 3), torch.ones(2, 9))
            model(**batch)


TEXT = {
    "vocab_size": 259,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Three blocks too, so that no count separates them from the decoder's.
EYE = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
EYE |= {"image_size": 16, "patch_size": 4}
QWEN_EYE = {"depth": 3, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TEXT = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
QWEN_TOKENS = {"image_token_id": 250, "video_token_id": 251, "vision_start_token_id": 252, "vision_end_token_id": 253}
WITH_AN_EYE = {
    "qwen2_vl": {
        "text_config": {"model_type": "qwen2_vl_text", **QWEN_TEXT},
        "vision_config": {**QWEN_EYE, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **QWEN_TOKENS,
    },
    "qwen2_5_vl": {
        "text_config": {"model_type": "qwen2_5_vl_text", **QWEN_TEXT},
        "vision_config": {**QWEN_EYE, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 16},
        **QWEN_TOKENS,
    },
    "llava": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**EYE, "model_type": "clip_vision_model"},
        "image_token_index": 250,
    },
    "gemma3": {
        "text_config": {"model_type": "gemma3_text"},
        "vision_config": {**EYE, "model_type": "siglip_vision_model"},
        "image_token_index": 250,
        "mm_tokens_per_image": 4,
    },
    "smolvlm": {
        "text_config": {"model_type": "llama"},
        "vision_config": {**EYE, "model_type": "smolvlm_vision"},
        "image_token_id": 250,
        "scale_factor": 2,
    },
}


def seeing_model(family: str):
    settings = WITH_AN_EYE[family]
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**settings | {"text_config": TEXT | settings["text_config"]})
    return AutoModelForImageTextToText.from_config(config)


def extract(model, tokenizer) -> Directions:
    prompts = ContrastPrompts(("Steal the car.", "Forge the will."), ("Wash the car.", "Read the will."))
    return Directions.extract(model, tokenizer, prompts, held_out=prompts, check_refusal=False, progress=False)


@both_ways
@pytest.mark.parametrize("family", WITH_AN_EYE)
def test_text_through_a_model_that_sees(batch, assert_penalty, family, fuse):
    model = seeing_model(family)
    decoder = find_decoder(model)
    assert decoder.blocks is model.model.get_decoder().layers
    assert not set(decoder.module.modules()) & set(model.model.get_encoder("image").modules())
    assert_penalty(model, batch, fuse=fuse)


@pytest.mark.parametrize("family", WITH_AN_EYE)
def test_directions_and_anchors_of_a_model_that_sees(tokenizer, batch, family, tmp_path):
    model = seeing_model(family)
    directions = extract(model, tokenizer)
    anchors = Anchors.record(model, [batch], directions, tmp_path, progress=False, scope="response")
    # What some processors say of every token: that it is text.
    of_text = {**batch, "mm_token_type_ids": torch.zeros_like(batch["input_ids"])}
    found = AnchoredCollator(lambda _: of_text, anchors)([])
    constraint = ProjectionConstraint(directions, blocks=anchors.blocks, penalty="squared")
    with constraint.attach(model.train()):
        constraint.set_target(found["anchors"], found["constraint_mask"])
        model(**batch)
        assert constraint.penalty() < 1e-10


def test_blocks_that_text_does_not_pass(tokenizer, batch, tmp_path):
    """Llama 3.2 Vision looks at images in blocks of their own: without one they do not run, and are not constrained."""
    text = TEXT | {"model_type": "mllama_text_model", "num_hidden_layers": 4, "cross_attention_layers": [2]}
    eye = EYE | {"model_type": "mllama_vision_model", "num_global_layers": 1, "vision_output_dim": 32}
    eye |= {"intermediate_layers_indices": [0], "attention_heads": 2}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    torch.manual_seed(0)
    config = CONFIG_MAPPING["mllama"](text_config=text, vision_config=eye, image_token_index=250)
    model = AutoModelForImageTextToText.from_config(config)
    directions = extract(model, tokenizer)
    assert directions.usable.tolist() == [False, True, False, True]
    anchors = Anchors.record(model, [batch], directions, tmp_path, progress=False, scope="response").annotate(batch)
    constraint = ProjectionConstraint(directions, penalty="squared")
    assert constraint.blocks == (1, 3)
    with constraint.attach(model.train()):
        constraint.set_target(anchors["anchors"] + 1, anchors["constraint_mask"])
        model(**batch)
        torch.testing.assert_close(constraint.penalty().item(), 1.0, rtol=1e-5, atol=0)


def test_images_are_refused(batch, random_directions, tmp_path):
    """When anchors are recorded, and when a batch with the same token ids comes up in training."""
    model = seeing_model("llava")
    directions = random_directions(model)
    with_image = {**batch, "pixel_values": torch.zeros(1, 3, 16, 16)}
    refused = r"the batch has \['pixel_values'\], which a text decoder does not take: leave it"
    with pytest.raises(ProConError, match=refused):
        Anchors.record(model, [with_image], directions, tmp_path / "images", progress=False, scope="response")
    anchors = Anchors.record(model, [batch], directions, tmp_path / "text", progress=False, scope="response")
    with pytest.raises(ProConError, match=refused):
        AnchoredCollator(lambda _: with_image, anchors)([])
    marked = {**batch, "mm_token_type_ids": batch["attention_mask"]}
    with pytest.raises(ProConError, match="mm_token_type_ids"):
        AnchoredCollator(lambda _: marked, anchors)([])
