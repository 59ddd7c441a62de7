"""What a shift along a block's direction does to the refusal log-odds, against a finite difference in float64."""

from dataclasses import replace

import pytest
import torch

from procon.chat import ContrastPrompts, render, user_turn
from procon.directions import Directions
from procon.errors import ProConError
from procon.evaluation import block_effects, causal_weights, refusal_log_odds, refusal_tokens
from procon.models import find_decoder

#: Unequal lengths, out of order, so that padding or a shift of another token shows.
PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "break the window of the old house", "spy on her"),
    benign=("paint it", "wash the car for me"),
)
TOKENS = [7, 40, 41, 200]


@pytest.fixture
def model(tiny_model):
    """With an LM head large enough that the first token matters."""
    model = tiny_model(tie_word_embeddings=False).double().train()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    return model


def directions(k: int = 1, blocks: int = 3, width: int = 32) -> Directions:
    make = torch.Generator().manual_seed(2)
    basis = torch.linalg.qr(torch.randn(blocks, width, k, generator=make))[0].mT.contiguous()
    gap = torch.tensor([0.5, 1.0, 3.0, 2.0])[:blocks]
    return Directions(basis, gap[:, None].expand(basis.shape[:2]))


def shifted_log_odds(model, tokenizer, block: int, shift: torch.Tensor) -> float:
    """Their mean over the prompts, one by one, the last token moved by ``shift`` as it enters the block, or leaves."""

    def move(_module, args, kwargs):
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hidden[:, -1] += shift
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def move_output(_module, _args, output):
        (hidden,), _ = move(None, output if isinstance(output, tuple) else (output,), {})
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

    blocks = find_decoder(model).blocks
    if block < len(blocks):
        handle = blocks[block].register_forward_pre_hook(move, with_kwargs=True)
    else:
        handle = blocks[-1].register_forward_hook(move_output)
    found = []
    for prompt in PROMPTS.malicious:
        ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
        with torch.no_grad():
            p = model(input_ids=ids).logits[0, -1].softmax(-1)[TOKENS].sum()
        found.append(float((p / (1 - p)).log()))
    handle.remove()
    return sum(found) / len(found)


@pytest.mark.parametrize(("k", "sites"), [(1, 3), (2, 3), (2, 4)])
def test_the_derivative_is_a_finite_difference(model, tokenizer, k, sites):
    given = directions(k, sites)
    if sites == 4:
        given = replace(given, last_output=True)
    found = block_effects(model, tokenizer, given, PROMPTS, tokens=TOKENS, batch_size=2)
    assert found.shape == (sites, k)
    step = 1e-4
    for block in range(sites):
        for column in range(k):
            shift = step * given.gaps[block, 0].double() * given.basis[block, column].double()
            up, down = (shifted_log_odds(model, tokenizer, block, sign * shift) for sign in (1, -1))
            # logits go through fp32 before the softmax, and results are fp32.
            assert found[block, column].item() == pytest.approx((up - down) / (2 * step), rel=1e-3, abs=1e-4)
    assert found.abs().max() > 0.1


def test_what_is_left_behind(model, tokenizer):
    """Neither gradients, nor modes, nor hooks; and a model in which nothing trains will do."""
    expected = block_effects(model, tokenizer, directions(), PROMPTS, tokens=TOKENS)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks for module in model.modules())
    model.requires_grad_(False)
    torch.testing.assert_close(block_effects(model, tokenizer, directions(), PROMPTS, tokens=TOKENS), expected)
    with torch.no_grad():
        again = block_effects(model, tokenizer, directions(), PROMPTS, tokens=TOKENS, batch_size=1)
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


def test_by_default_the_tokens_that_open_refusals(model, tokenizer):
    tokens = refusal_tokens(model, tokenizer, PROMPTS)
    expected = block_effects(model, tokenizer, directions(), PROMPTS, tokens=tokens)
    assert torch.equal(block_effects(model, tokenizer, directions(), PROMPTS), expected)
    assert refusal_log_odds(model, tokenizer, tokens, PROMPTS.malicious).isfinite().all()


def test_a_block_without_a_direction_has_none(model, tokenizer):
    given = directions()
    there = torch.tensor([[0], [1], [1]])
    none = replace(given, basis=given.basis * there[..., None], gaps=given.gaps * there)
    found = block_effects(model, tokenizer, none, PROMPTS, tokens=TOKENS)
    assert found.isnan().flatten().tolist() == [True, False, False]
    assert causal_weights(found, none, [1, 2])["gap"].isfinite().all()


def test_gradients_that_are_not_finite(model, tokenizer):
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(ProConError, match="gradient of the refusal log-odds is NaN or infinite"):
        block_effects(model, tokenizer, directions(), PROMPTS, tokens=TOKENS)


def test_directions_of_another_model(model, tokenizer):
    with pytest.raises(ProConError, match="directions are for 2 blocks"):
        block_effects(model, tokenizer, directions(blocks=2), PROMPTS, tokens=TOKENS)


# Weights


def test_weights_by_definition():
    given = directions(2)
    effects = torch.tensor([[3.0, -4.0], [0.0, 2.0], [-6.0, 0.0]])
    torch.testing.assert_close(causal_weights(effects, given, [0, 2])["gap"], torch.tensor([5.0, 6.0]) / 5.5)
    torch.testing.assert_close(causal_weights(effects, given, [2, 0])["raw"], torch.tensor([6 / 3, 5 / 0.5]) / 6)
    assert all(each.tolist() == [1.0] for each in causal_weights(effects, given, [1]).values())


def test_in_either_unit_the_penalty_is_the_change_of_the_log_odds():
    """To first order, of the absolute one: weight times departure is in proportion to |effect|."""
    given, make = directions(), torch.Generator().manual_seed(0)
    effects, departures = torch.randn(3, 1, generator=make), torch.randn(3, generator=make)
    weights = causal_weights(effects, given, range(3))
    gaps, raw = weights["gap"] * (departures / given.gaps[:, 0]).abs(), weights["raw"] * departures.abs()
    changes = (effects[:, 0] * departures / given.gaps[:, 0]).abs()
    torch.testing.assert_close(gaps / gaps.sum(), changes / changes.sum())
    torch.testing.assert_close(raw / raw.sum(), changes / changes.sum())


@pytest.mark.parametrize("nothing", [0.0, torch.nan])
def test_a_block_that_does_nothing_has_no_weight(nothing):
    effects = torch.tensor([[1.0], [nothing], [1.0]])
    with pytest.raises(ProConError, match="hidden states entering block 1 along their direction does nothing"):
        causal_weights(effects, directions(), [0, 1])
    causal_weights(effects, directions(), [0, 2])
