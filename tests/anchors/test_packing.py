"""Packed sequences are kept apart, or refused."""

import copy

import pytest
import torch

from procon.anchors import Anchors
from procon.constraint import ProjectionConstraint
from procon.data import flattening_collator, padding_collator
from procon.errors import ProConError
from procon.models import best_attention, find_decoder, observe_block_inputs

LENGTHS = (7, 3, 9, 5)

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "gpt_neox", "olmo2")

MIXING = {
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 4},
    "bloom": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "attn_implementation": "eager"},
    "mixtral": {"num_local_experts": 4},
    "llama": {},
}


@pytest.fixture
def features() -> list[dict]:
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(5, 200, (length,), generator=random).tolist() for length in LENGTHS]
    return [{"input_ids": tokens, "labels": [-100, *tokens[1:]]} for tokens in ids]


def block_inputs(model, batch) -> torch.Tensor:
    """Those of all blocks and the logits, of each sequence after the other: ``[tokens, L * D + V]``."""
    states = {}
    with torch.no_grad(), observe_block_inputs(find_decoder(model), states.__setitem__):
        logits = model(**batch, use_cache=False).logits
    joined = torch.cat([*(states[block] for block in sorted(states)), logits], -1)
    return joined[batch["attention_mask"].bool()] if "attention_mask" in batch else joined[0]


@pytest.mark.parametrize("bounds", [False, True], ids=["", "bounds"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_flattened_batch_is_the_padded_one(tiny_model, tokenizer, features, family, implementation, bounds):
    if (family, implementation) == ("gemma2", "sdpa"):
        pytest.skip("transformers gives Gemma 2 no sdpa: its attention scores are capped")
    window = {"sliding_window": 4} if family.startswith("gemma") else {}  # shorter than the sequences
    model = tiny_model(family, attn_implementation=implementation, **window).eval()
    tolerance = {"rtol": 1e-4, "atol": 1e-6}  # eager computes in float32 at best
    if implementation == "sdpa":
        model, tolerance = model.double(), {"rtol": 1e-10, "atol": 1e-12}
    padded = block_inputs(model, padding_collator(tokenizer)(copy.deepcopy(features)))
    flattened = block_inputs(model, flattening_collator(bounds=bounds)(features))
    torch.testing.assert_close(flattened, padded, **tolerance)


@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_a_cache_is_kept_out_of_the_constrained_forward(tiny_model, features, random_directions, tmp_path, fuse):
    """Beside one, transformers lets packed sequences see each other; a bare loop has one unless it is told not to."""
    model = tiny_model()
    directions, batch = random_directions(model), flattening_collator()(features)
    anchors = Anchors.record(model, [batch], directions, tmp_path, progress=False, scope="response").annotate(batch)
    constraint = ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse)
    constraint.set_target(anchors["anchors"], anchors["constraint_mask"])
    output = model(**batch)
    assert output.past_key_values is None
    assert constraint.penalty() < 1e-10
    constraint.detach()
    assert model(**batch).past_key_values is not None


@pytest.mark.parametrize("family", MIXING)
def test_refused_just_where_sequences_mix(tiny_model, tokenizer, features, random_directions, tmp_path, family):
    model = tiny_model(family, **MIXING[family]).eval()
    with torch.no_grad():  # from so small weights, little comes through
        for parameter in model.parameters():
            parameter *= 3
    flattened = flattening_collator()(features)
    padded = padding_collator(tokenizer)(copy.deepcopy(features))
    expected = block_inputs(model, padded)
    mixes = (block_inputs(model, flattened) - expected).norm() > 1e-4 * expected.norm()
    assert mixes == {"llama": False, "mixtral": False, "gpt_oss": mixes}.get(family, True)  # gpt-oss: by version
    directions = random_directions(model)
    if mixes:
        with pytest.raises(ProConError, match=r"Model with .* lets the sequences of a packed row see each other: pad"):
            Anchors.record(model, [flattened], directions, tmp_path / "flattened", progress=False, scope="response")
    else:
        Anchors.record(model, [flattened], directions, tmp_path / "flattened", progress=False, scope="response")
    Anchors.record(model, [padded], directions, tmp_path / "padded", progress=False, scope="response")


def test_packing_that_the_attention_is_not_told(tiny_model, features, random_directions, tmp_path):
    """Beside a mask, transformers takes no notice of ``position_ids`` that restart."""
    batch = flattening_collator()(features)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    model = tiny_model()
    with pytest.raises(ProConError, match="LlamaModel with attn_implementation 'sdpa' lets the sequences of a packed"):
        Anchors.record(model, [batch], random_directions(model), tmp_path, progress=False, scope="response")


def test_the_check_costs_two_forwards_once_and_only_where_rows_are_packed(
    tiny_model, tokenizer, features, random_directions, tmp_path
):
    model, forwards = tiny_model(), []
    model.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    flattened = [flattening_collator()(features[:2]), flattening_collator()(features[2:])]
    Anchors.record(model, flattened, random_directions(model), tmp_path / "flattened", progress=False, scope="response")
    assert len(forwards) == 5  # one of a token, which shows the precision
    # Also where nothing is left to record: the loader may be another one now.
    Anchors.record(model, flattened, random_directions(model), tmp_path / "flattened", progress=False, scope="response")
    assert len(forwards) == 8
    padded = padding_collator(tokenizer)(features)
    Anchors.record(model, [padded], random_directions(model), tmp_path / "padded", progress=False, scope="response")
    assert len(forwards) == 10


@pytest.mark.gpu
@pytest.mark.parametrize("bounds", [False, True], ids=["", "bounds"])
@pytest.mark.parametrize("fuse", ["auto", "never"])
def test_flash_attention(tiny_model, tokenizer, features, random_directions, tmp_path, bounds, fuse):
    """Of a flattened batch: the gradient is as near to that of padded rows in float32 as sdpa's in bfloat16 is."""
    implementation = best_attention(torch.bfloat16, head_dim=32)
    if implementation == "sdpa":
        pytest.skip("no FlashAttention that is installed runs on this GPU")
    padded, flattened = (
        padding_collator(tokenizer)(copy.deepcopy(features)),
        flattening_collator(bounds=bounds)(features),
    )

    def gradient(implementation: str, dtype: torch.dtype, batch: dict) -> torch.Tensor:
        model = tiny_model(hidden_size=64, head_dim=32).to("cuda", dtype).train()
        model.set_attn_implementation(implementation)
        directions = random_directions(model)
        anchors = Anchors.record(
            model, [batch], directions, tmp_path / f"{implementation} {dtype}", progress=False, scope="response"
        )
        batch = anchors.annotate(batch)
        batch = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
        target = batch.pop("anchors") + 1, batch.pop("constraint_mask")
        with ProjectionConstraint(directions, penalty="squared").attach(model, fuse=fuse) as constraint:
            constraint.set_target(*target)
            model(**batch)
            constraint.penalty().backward()
        return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])

    exact = gradient("sdpa", torch.float32, padded)
    rounding = (gradient("sdpa", torch.bfloat16, padded) - exact).norm()
    assert (gradient(implementation, torch.bfloat16, flattened) - exact).norm() <= 2 * rounding
