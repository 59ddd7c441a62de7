"""The constraint on LoRA over a quantised base: 4 bits as QLoRA has them, and 8."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from procon.anchors import AnchoredCollator, Anchors
from procon.chat import ContrastPrompts
from procon.constraint import ProjectionConstraint
from procon.directions import Directions
from procon.models import find_decoder, weights_hash

bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit and 8-bit weights are bitsandbytes'")

PROMPTS = ContrastPrompts(("Steal the car.", "Forge the will."), ("Wash the car.", "Read the will."))

BITS = {
    "4 bits": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8 bits": {"load_in_8bit": True},
}

LAYERS = {"4 bits": bitsandbytes.nn.Linear4bit, "8 bits": bitsandbytes.nn.Linear8bitLt}

each_base = pytest.mark.parametrize("bits", BITS)
both_ways = pytest.mark.parametrize("fuse", ["auto", "never"])


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 200, (2, 9), generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": ids}


@pytest.fixture
def load(tiny_model, tmp_path):
    """``load(bits)``: the tiny model, quantised; ``prepared`` as QLoRA prepares a base, with checkpointing."""
    tiny_model().save_pretrained(tmp_path / "base")

    def make(bits: str, *, prepared: bool = False, dtype: torch.dtype = torch.float32):
        quantization = BitsAndBytesConfig(**BITS[bits])
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=quantization, dtype=dtype)
        if prepared:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        # In eval mode on a CPU, bitsandbytes repacks 4-bit weights for good, and they lose their gradient.
        return model.train()

    return make


def adapt(model: nn.Module, **settings) -> nn.Module:
    """With LoRA that does something already, the same for every base."""
    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "down_proj"]
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, **settings))
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=random)
    return model


def dequantized(model: nn.Module, plain: nn.Module) -> nn.Module:
    """``plain`` in float64, with the numbers that the quantised weights of ``model`` stand for."""
    plain = plain.double()
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            weight = model.get_parameter(name)
            if hasattr(weight, "quant_state"):
                weight = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
            elif hasattr(weight, "SCB"):
                weight = weight.data.double() * (weight.SCB[:, None].double() / 127)
            parameter.copy_(weight)
    return plain


@both_ways
@pytest.mark.parametrize(
    ("bits", "settings", "prepared"),
    [
        ("4 bits", {}, False),
        ("4 bits", {}, True),
        ("4 bits", {"use_dora": True}, False),
        ("8 bits", {}, False),
        ("8 bits", {}, True),
        ("8 bits", {"use_dora": True}, False),
    ],
    ids=["4 bits", "4 bits, prepared", "4 bits, DoRA", "8 bits", "8 bits, prepared", "8 bits, DoRA"],
)
def test_gradient_of_the_numbers_that_the_bits_stand_for(
    load, tiny_model, batch, assert_penalty, random_directions, bits, settings, prepared, fuse
):
    base = load(bits, prepared=prepared)
    assert isinstance(find_decoder(base).blocks[0].mlp.up_proj, LAYERS[bits])
    reference = adapt(dequantized(base, tiny_model()), **settings)
    model = adapt(base, **settings)
    with ProjectionConstraint(random_directions(model), penalty="squared").attach(model, fuse=fuse) as constraint:
        assert constraint.fused == ((0, 1, 2) if fuse == "auto" else ())
    assert_penalty(model, batch, reference=reference, still=1, fuse=fuse)


@both_ways
@each_base
def test_a_base_in_bfloat16_whose_norms_are_upcast(load, batch, assert_penalty, bits, fuse):
    """bitsandbytes rounds differently forward and backward there, so the definition is computed on the model itself."""
    model = adapt(load(bits, prepared=True, dtype=torch.bfloat16))
    assert model.get_base_model().model.layers[0].input_layernorm.weight.dtype == torch.float32
    assert_penalty(model, batch, reference=copy.deepcopy(model), still=1, fuse=fuse)


@each_base
@pytest.mark.parametrize("prepared", [False, True], ids=["", "prepared"])
def test_directions_anchors_and_a_penalty_that_begins_at_zero(load, tokenizer, batch, tmp_path, bits, prepared):
    model = adapt(load(bits, prepared=prepared))
    first = weights_hash(model)
    directions = Directions.extract(model, tokenizer, PROMPTS, held_out=PROMPTS, check_refusal=False, progress=False)
    anchors = Anchors.record(model, [batch], directions, tmp_path / "anchors", progress=False, scope="response")
    assert weights_hash(model) == first
    found = AnchoredCollator(lambda _: batch, anchors)([])
    constraint = ProjectionConstraint(directions, blocks=anchors.blocks, penalty="squared")
    with constraint.attach(model):
        constraint.set_target(found["anchors"], found["constraint_mask"])
        model(**batch)
        assert constraint.penalty() < 1e-10


@each_base
def test_the_model_hash(load, tmp_path, bits):
    model = load(bits)
    first = weights_hash(model)
    assert weights_hash(load(bits)) == first
    assert weights_hash(load(bits, dtype=torch.bfloat16)) != first
    model.save_pretrained(tmp_path / "saved")
    assert weights_hash(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")) == first

    weight = model.model.layers[1].mlp.up_proj.weight
    codes = weight.data.view(-1)
    codes[5] ^= 1
    assert weights_hash(model) != first
    codes[5] ^= 1
    assert weights_hash(model) == first
    scales = weight.quant_state.absmax if bits == "4 bits" else weight.SCB
    scales.view(-1)[3] += 1
    assert weights_hash(model) != first
    if bits == "4 bits":  # whose scales are quantised too
        scales.view(-1)[3] -= 1
        weight.quant_state.state2.absmax *= 1.5
        assert weights_hash(model) != first


@each_base
def test_training(make_trainer, load, bits):
    model = adapt(load(bits, prepared=True, dtype=torch.bfloat16))
    base = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    trainer = make_trainer("Trainer", "0.5", model=model, gradient_checkpointing=True)
    trainer.train()
    penalties = [log["procon/penalty"] for log in trainer.state.log_history if "procon/penalty" in log]
    assert penalties[0] < 1e-10
    assert penalties[-1] > 1e-6
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)
