"""Log-odds of a refusal, prompt by prompt by definition, whatever the padding; and the tokens that open refusals."""

import pytest
import torch

from benchmarks.study import refusal_odds
from benchmarks.study.refusal_odds import refusal_log_odds, refusal_tokens
from procon.chat import ContrastPrompts, render, user_turn
from procon.errors import ProConError

#: Unequal lengths, out of order, so that padding or a lost order shows.
PROMPTS = ContrastPrompts(
    malicious=("steal it", "forge a passport for me tonight", "rob", "break the window of the old house", "spy on her"),
    benign=("paint it", "wash the car for me", "sing about the window of the old house tonight"),
)
TOKENS = [7, 40, 41, 200]

#: Logits come out in fp32 and are below 100 here; a few roundings of them, by another order of sums in a batch.
ROUNDING = 100 * 2**-20


@pytest.fixture(params=["llama", "gpt2", "gpt_neox"])
def model(request, tiny_model):
    """With an LM head large enough that the first token matters."""
    model = tiny_model(request.param, tie_word_embeddings=False).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight *= 40
    return model


def first_logits(model, tokenizer, prompt: str) -> torch.Tensor:
    """``[V]`` fp64 of one prompt, alone and without padding."""
    ids = torch.tensor([render(tokenizer, user_turn(prompt), generation_prompt=True)])
    with torch.no_grad():
        return model(input_ids=ids).logits[0, -1].double()


def log_odds(model, tokenizer, prompt: str, tokens: list[int]) -> float:
    probabilities = first_logits(model, tokenizer, prompt).softmax(-1)
    p = probabilities[tokens].sum()
    return float((p / (1 - p)).log())


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_log_odds_by_definition(model, tokenizer, monkeypatch, batch):
    monkeypatch.setattr(refusal_odds, "_BATCH", batch)
    tokenizer.padding_side = "right"  # the measure pads by itself
    found = refusal_log_odds(model, tokenizer, TOKENS, PROMPTS.malicious)
    expected = torch.tensor([log_odds(model, tokenizer, prompt, TOKENS) for prompt in PROMPTS.malicious])
    assert expected.std() > 0.1  # prompts differ
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)


def test_log_odds_of_one_who_is_certain(model, tokenizer):
    """``1 - p`` is 0 in fp64, and the log-odds are not infinite."""
    with torch.no_grad():
        model.get_output_embeddings().weight *= 100
    for prompt in PROMPTS.malicious:
        logits = first_logits(model, tokenizer, prompt)
        best = logits.argmax()
        others = logits[torch.arange(len(logits)) != best]
        expected = (logits[best] - others.logsumexp(0)).item()
        found = refusal_log_odds(model, tokenizer, [int(best)], [prompt]).item()
        assert found == pytest.approx(expected, rel=1e-4)


def test_refusal_tokens_by_definition(model, tokenizer):
    malicious, benign = (
        torch.stack([first_logits(model, tokenizer, prompt).softmax(-1) for prompt in side]).mean(0)
        for side in (PROMPTS.malicious, PROMPTS.benign)
    )
    differences = (malicious - benign).sort(descending=True).values
    margin = float((differences[2] + differences[3]) / 2)  # three tokens are above it
    assert margin > 1e-5
    found = refusal_tokens(model, tokenizer, PROMPTS, margin=margin)
    assert found == [token for token in range(len(malicious)) if malicious[token] - benign[token] > margin]
    assert len(found) == 3


def test_a_model_that_replies_to_both_alike_has_no_refusal_tokens(tiny_model, tokenizer):
    same = ContrastPrompts(malicious=PROMPTS.malicious, benign=PROMPTS.malicious)
    with pytest.raises(ProConError, match=r"no first token is likelier by 0\.005 .* start from one that does"):
        refusal_tokens(tiny_model(), tokenizer, same)
