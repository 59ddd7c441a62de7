"""The constraint on adapters: each kind, several at once, one that is trained further, and merged for inference."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)

from procon.anchors import AnchoredCollator, Anchors
from procon.chat import ContrastPrompts
from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.errors import ProConError

PROMPTS = ContrastPrompts(("Steal the car.", "Forge the will."), ("Wash the car.", "Read the will."))

CAUSAL = {"task_type": "CAUSAL_LM"}
ATTENTION = {**CAUSAL, "r": 2, "target_modules": ["q_proj", "v_proj"]}

#: Adapters that leave the embeddings alone, and with them the first block's input; and those that do not.
STILL = {
    "LoRA": LoraConfig(**ATTENTION),
    "rsLoRA": LoraConfig(**ATTENTION, use_rslora=True),
    "DoRA": LoraConfig(**CAUSAL, r=2, target_modules="all-linear", use_dora=True),
    "IA3": IA3Config(**CAUSAL),
    "VeRA": VeraConfig(**CAUSAL, r=4, target_modules=["q_proj", "v_proj"]),
    "OFT": OFTConfig(**CAUSAL, oft_block_size=4, target_modules=["q_proj", "v_proj"]),
    "LoHa": LoHaConfig(**CAUSAL, r=2, target_modules=["q_proj", "v_proj"]),
    "MLP only": LoraConfig(**CAUSAL, r=2, target_modules=["up_proj", "down_proj"]),
    "parameters": LoraConfig(**CAUSAL, r=2, target_parameters=["mlp.up_proj.weight"]),
    "head in full": LoraConfig(**ATTENTION, modules_to_save=["lm_head"]),
    "norms in full": LoraConfig(**ATTENTION, modules_to_save=["input_layernorm"]),
    "norms": LNTuningConfig(**CAUSAL, target_modules=["input_layernorm", "post_attention_layernorm"]),
}
MOVING = {
    "embeddings in full": LoraConfig(**ATTENTION, modules_to_save=["embed_tokens", "lm_head"]),
    "embeddings": LoraConfig(**CAUSAL, r=2, target_modules=["q_proj", "embed_tokens"]),
    "some tokens": LoraConfig(**ATTENTION, trainable_token_indices=[7, 8, 9, 42]),
    "some tokens alone": TrainableTokensConfig(**CAUSAL, token_indices=[7, 8, 9, 42], target_modules=["embed_tokens"]),
}
ADAPTERS = STILL | MOVING

both_ways = pytest.mark.parametrize("fuse", ["auto", "never"])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(3))
    ids[0, :4] = torch.tensor([7, 8, 9, 42])
    return {"input_ids": ids, "labels": ids}


def shake(model, seed: int = 0):
    """What trains, moved from where PEFT puts it: an adapter that does nothing yet hides half of the gradients."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return model


@both_ways
@pytest.mark.parametrize(
    ("adapter", "tied"), [*((name, False) for name in ADAPTERS), *((name, True) for name in MOVING)]
)
def test_value_and_gradient(tiny_model, batch, random_directions, assert_penalty, adapter, tied, fuse):
    model, reference = (
        shake(get_peft_model(tiny_model(tie_word_embeddings=tied), copy.deepcopy(ADAPTERS[adapter]))) for _ in range(2)
    )
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
        assert constraint.fused == ((0, 1, 2) if fuse == "auto" else ())
    assert_penalty(model, batch, reference=reference.double(), still=int(adapter in STILL), fuse=fuse)


def test_an_adapter_that_transformers_adds(tiny_model, batch, assert_penalty):
    model = tiny_model()
    try:
        model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(f"transformers does not take this version of PEFT: {error}")
    assert_penalty(shake(model), batch, still=1)


@both_ways
def test_input_gradients_that_checkpointing_asks_for(tiny_model, batch, assert_penalty, fuse):
    model = shake(get_peft_model(tiny_model(), LoraConfig(**ATTENTION))).train()
    reference = copy.deepcopy(model).double()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_penalty(model, batch, reference=reference, still=1, fuse=fuse)


@both_ways
@pytest.mark.parametrize("input_gradients", [False, True], ids=["", "input gradients"])
@pytest.mark.parametrize(("adapted", "constrained"), [([2], "all"), ([1], [0, 1])])
def test_an_adapter_above_the_constraint_is_refused(
    tiny_model, batch, random_directions, adapted, constrained, input_gradients, fuse
):
    model = get_peft_model(tiny_model(), LoraConfig(**ATTENTION, layers_to_transform=adapted))
    if input_gradients:
        model.enable_input_require_grads()
    constraint = ProjectionConstraint(random_directions(model), blocks=constrained, penalty="squared")
    with constraint.attach(model, fuse=fuse):
        constraint.set_target(torch.zeros(2, 9, len(constraint.blocks)), torch.ones(2, 9))
        model(**batch)
        with pytest.raises(ProConError, match="nothing below a constrained block trains, so the constraint cannot act"):
            constraint.penalty()


def start(model, batch, directions, folder):
    """Anchors of the batch, and the constraint's value as training starts."""
    anchors = Anchors.record(model, [batch], directions, folder, progress=False, scope="response")
    found = AnchoredCollator(lambda _: batch, anchors)([])
    constraint = ProjectionConstraint(directions, blocks=anchors.blocks, penalty="squared")
    with constraint.attach(model.train()):
        constraint.set_target(found["anchors"], found["constraint_mask"])
        model(**batch)
        return found["anchors"], constraint.penalty().item()


@pytest.mark.parametrize("adapter", ["LoRA", "DoRA", "IA3", "embeddings in full", "some tokens"])
def test_an_adapter_that_is_trained_further(tiny_model, tokenizer, batch, tmp_path, adapter):
    """Directions and anchors are those of the model with it, and the penalty begins at 0."""

    def extract(model) -> Directions:
        return Directions.extract(model, tokenizer, PROMPTS, held_out=PROMPTS, check_refusal=False, progress=False)

    shake(get_peft_model(tiny_model(), copy.deepcopy(ADAPTERS[adapter]))).save_pretrained(tmp_path / "adapter")
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "adapter", is_trainable=True)
    merged = copy.deepcopy(model).merge_and_unload()
    directions = extract(model)
    torch.testing.assert_close(directions.basis[:, 0], extract(merged).basis[:, 0], rtol=1e-4, atol=1e-4)
    assert (directions.basis[:, 0] - extract(tiny_model()).basis[:, 0]).abs().max() > 0.02

    anchors, penalty = start(model, batch, directions, tmp_path / "anchors")
    assert penalty < 1e-10
    of_merged, _ = start(merged.requires_grad_(), batch, directions, tmp_path / "merged")
    torch.testing.assert_close(anchors, of_merged, rtol=1e-4, atol=1e-5)
    # Shaken, embeddings pass for those of another model: the base has to be told nothing of where directions are from.
    anonymous = replace(directions, provenance={})
    of_base, _ = start(tiny_model(), batch, anonymous, tmp_path / "base")
    assert (anchors - of_base).abs().max() > 1e-3


@pytest.fixture
def two_adapters(tiny_model):
    """``first`` is on, ``second`` is loaded beside it."""
    model = get_peft_model(tiny_model(), LoraConfig(**ATTENTION), adapter_name="first")
    model.add_adapter("second", LoraConfig(**ATTENTION))
    for seed, name in enumerate(("first", "second")):
        model.set_adapter(name)
        shake(model, seed)
    model.set_adapter("first")
    return model


def test_the_active_adapter_alone_is_trained(two_adapters, batch, assert_penalty):
    assert_penalty(two_adapters, batch, still=1)
    with_gradient = {name.split(".")[-2] for name, p in two_adapters.named_parameters() if p.requires_grad}
    assert with_gradient == {"first"}


def test_anchors_belong_to_the_adapter_that_was_on(two_adapters, batch, random_directions, tmp_path):
    model, directions = two_adapters, random_directions(two_adapters)

    def record() -> Anchors:
        return Anchors.record(model, [batch], directions, tmp_path, progress=False, scope="response")

    record()
    model.set_adapter("second")
    with pytest.raises(ProConError, match="recorded for another model state"):
        record()
    with model.disable_adapter(), pytest.raises(ProConError, match="recorded for another model state"):
        record()
    model.set_adapter("first")
    record()


def test_adapters_switched_under_the_constraint_are_refused(two_adapters, random_directions):
    with ProjectionConstraint(random_directions(two_adapters), penalty="squared").attach(two_adapters) as constraint:
        target = torch.zeros(2, 9, 3), torch.ones(2, 9)
        constraint.set_target(*target)
        two_adapters.set_adapter("second")
        with pytest.raises(ProConError, match=r"changed from \('first',\) to \('second',\)"):
            constraint.set_target(*target)
        two_adapters.set_adapter("first")
        constraint.set_target(*target)
        with two_adapters.disable_adapter(), pytest.raises(ProConError, match=r"from \('first',\) to \(\)"):
            constraint.set_target(*target)
