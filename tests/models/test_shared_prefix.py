"""What prompts begin with runs once, and their hidden states are what they were when each ran whole."""

import pytest
import torch

from procon.chat import ContrastPrompts, render, user_turn
from procon.directions import ContrastMeans
from procon.models import SharedPrefix, same_states

PROMPTS = ContrastPrompts(
    tuple(f"Please tell me in a few words how to steal {n} apples" + " at night" * (n % 3) for n in range(40)),
    tuple(f"Please tell me in a few words how to buy {n} apples" for n in range(40)),
)


def means(model, tokenizer) -> ContrastMeans:
    return ContrastMeans.measure(model, tokenizer, PROMPTS, progress=False)


@pytest.fixture
def tokens(tiny_model, monkeypatch):
    """``tokens(model)``: how many tokens each forward of the decoder is given, while the test goes on."""

    def watch(model) -> list[int]:
        counts: list[int] = []
        model.get_input_embeddings().register_forward_pre_hook(lambda module, args: counts.append(args[0].numel()))
        return counts

    return watch


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_prompts_share_runs_once(tiny_model, tokenizer, tokens, monkeypatch, family, dtype):
    model = tiny_model(family).to(dtype)
    counts = tokens(model)
    found, shared = means(model, tokenizer), sum(counts)
    counts.clear()
    monkeypatch.setattr(SharedPrefix, "find", classmethod(lambda *_: None))
    expected, whole = means(model, tokenizer), sum(counts)
    assert shared < 0.8 * whole
    tolerance = 1e-6 if dtype == torch.float32 else 2**-8
    for side in ("malicious", "benign"):
        one, other = getattr(found, side), getattr(expected, side)
        assert ((one - other).norm(dim=-1) <= tolerance * other.norm(dim=-1)).all()


@pytest.mark.parametrize(
    ("family", "config"), [("mistral", {"sliding_window": 16}), ("gemma3", {"sliding_window": 16})]
)
def test_windows_of_tokens_are_not_shared(tiny_model, tokenizer, family, config):
    ids = [render(tokenizer, user_turn(text), generation_prompt=True) for text in PROMPTS.malicious]
    assert SharedPrefix.find(tiny_model(family, **config), ids) is None
    found = SharedPrefix.find(tiny_model(), ids)
    assert found is not None
    assert len({tuple(row[: found.length]) for row in ids}) == 1
    assert len({tuple(row[: found.length + 1]) for row in ids}) > 1
    assert SharedPrefix.find(tiny_model(), ids[:15]) is None
    assert SharedPrefix.find(tiny_model(), [row[found.length :] for row in ids]) is None
    assert SharedPrefix.find(tiny_model(), [ids[0]] * 16).length == len(ids[0]) - 1


def test_a_cache_that_changes_states_is_not_used(tiny_model, tokenizer, monkeypatch):
    model = tiny_model()
    expected = means(model, tokenizer)
    inputs = SharedPrefix.inputs

    def damaged(self, rows: int) -> dict:
        found = inputs(self, rows)
        for layer in found["cache" if "cache" in found else "past_key_values"].layers:
            layer.values = layer.values * 1.5
        return found

    monkeypatch.setattr(SharedPrefix, "inputs", damaged)
    found = means(model, tokenizer)
    torch.testing.assert_close(found.malicious, expected.malicious, rtol=1e-6, atol=1e-7)


def test_same_states():
    states = {0: torch.ones(2, 4), 1: torch.full((2, 4), 3.0)}
    assert same_states(states, {site: state * (1 + 1e-5) for site, state in states.items()})
    assert not same_states(states, {site: state * 1.01 for site, state in states.items()})
    assert not same_states(states, {0: states[0]})
    assert not same_states(states, {**states, 1: torch.full((2, 4), torch.nan)})
