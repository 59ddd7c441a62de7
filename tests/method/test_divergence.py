"""The divergence against float64: its value and its gradient, at every size, from the hidden states on."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from procon.method import Probes
from procon.method.divergence import divergence, log_probabilities
from procon.models import DecoderForward, find_decoder, observe_last_state
from procon.settings import ProConSettings


def by_definition(start: torch.Tensor, now: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """``KL(start || now)`` of logits in float64: the tokens named, and all others as one."""
    start, now = (
        torch.cat([part.gather(1, tokens), part.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)], 1)
        for part in (start.double().log_softmax(1), now.double().log_softmax(1))
    )
    each = start.exp() * (start - now)
    return torch.where(start == -torch.inf, 0.0, each).sum(1)


def compare(start: torch.Tensor, now: torch.Tensor, k: int = 32) -> tuple[torch.Tensor, ...]:
    """Value and gradient for the logits ``now``, ours and by definition."""
    tokens = start.topk(min(k, start.shape[1])).indices
    ours, exact = (now.detach().clone().to(dtype).requires_grad_() for dtype in (torch.float32, torch.float64))
    found = divergence(log_probabilities(start.float(), tokens), log_probabilities(ours, tokens))
    expected = by_definition(start, exact, tokens)
    found.sum().backward()
    expected.sum().backward()
    return found.double(), expected.detach(), ours.grad.double(), exact.grad


@pytest.mark.parametrize("vocabulary", [5, 32, 33, 1000])
@pytest.mark.parametrize("sharpness", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("moved", [1e-4, 1e-2, 1.0, 10.0])
def test_value_and_gradient(vocabulary, sharpness, moved):
    generator = torch.Generator().manual_seed(vocabulary)
    start = sharpness * torch.randn(40, vocabulary, generator=generator)
    now = start + moved * torch.randn(start.shape, generator=generator)
    found, expected, gradient, exact = compare(start, now)
    # Rounding of the logits moves d, and the value by q |d| times as much.
    rounding = 2**-22 * max(sharpness, moved) * 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=20 * rounding * min(moved, 1) + 1e-12)
    assert (gradient - exact).norm() <= 1e-4 * exact.norm() + 40 * rounding
    assert (found >= 0).all()


@pytest.mark.parametrize("nats", [50.0, 90.0, 110.0, 1000.0])
def test_a_start_peaked_by_any_number_of_nats(nats):
    """``exp(d)`` alone overflows beyond 88."""
    start = torch.zeros(3, 50)
    start[:, 0] = nats
    now = torch.zeros(3, 50)
    now[1:, 1] = torch.tensor([20.0, nats])
    found, expected, gradient, exact = compare(start, now)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact, rtol=1e-5, atol=1e-6)


def test_a_collapse_onto_the_top_token_is_pulled_back():
    """What is left for all others together is far below 1e-6, and their gradient is whole."""
    start = torch.zeros(1, 5000)
    now = torch.zeros(1, 5000)
    now[0, 0] = 60.0
    found, expected, gradient, exact = compare(start, now)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    assert expected.item() > 50
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("mask", [-torch.inf, -1e4, torch.finfo(torch.float32).min])
def test_tokens_that_can_never_be_said(mask):
    generator = torch.Generator().manual_seed(1)
    start, now = torch.randn(2, 8, 60, generator=generator)
    start[:, 20:] = now[:, 20:] = mask
    found, _, gradient, _ = compare(start, now)
    _, expected, _, exact = compare(
        start.clamp_min(-1e5), now.clamp_min(-1e5)
    )  # the definition has no 0 times infinity
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient, exact, rtol=1e-4, atol=1e-6)


def test_no_second_derivative():
    logits = torch.randn(2, 50, requires_grad=True)
    tokens = torch.arange(8).expand(2, 8)
    start = log_probabilities(torch.randn(2, 50), tokens)
    (first,) = torch.autograd.grad(
        divergence(start, log_probabilities(logits, tokens)).sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


#: What the model does with the product of its LM head.
HEADS = {
    "llama": lambda z, config: z,
    "gemma2": lambda z, config: config.final_logit_softcapping * torch.tanh(z / config.final_logit_softcapping),
    "cohere": lambda z, config: z * config.logit_scale,
    "granite": lambda z, config: z / config.logits_scaling,
}
SETTINGS = {
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.5},
    "granite": {"logits_scaling": 2.0},
}


def gradient_at_the_last_state(model, probes: Probes, *, autocast: bool) -> tuple[float, torch.Tensor, torch.Tensor]:
    """The divergence, and the gradient that arrives at the last hidden states: found, and by definition in float64."""
    states: list[torch.Tensor] = []

    def observe(state: torch.Tensor) -> None:
        state.retain_grad()
        states.append(state)

    with observe_last_state(find_decoder(model), observe), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = probes.departure(DecoderForward(model))
    found.backward()
    kept = probes.inputs()[1]
    hidden = states[0][kept].detach().double().requires_grad_()
    weight = model.get_output_embeddings().weight.detach().double()
    logits = HEADS[model.config.model_type](hidden @ weight.T, model.config)
    start, tokens = probes.states.double(), probes.tokens
    now = logits.log_softmax(1)
    now = torch.cat([now.gather(1, tokens), now.scatter(1, tokens, -torch.inf).logsumexp(1, keepdim=True)], 1)
    each = (start.exp() * (start - now)).sum(1)
    begins = probes.counts.cumsum(0) - probes.counts
    expected = each.mean() + each[begins].mean()
    expected.backward()
    return float(expected), states[0].grad[kept].double(), hidden.grad


@pytest.mark.parametrize("nats", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_the_gradient_in_bfloat16(tiny_model, tokenizer, family, nats, autocast):
    """Logits rounded to bfloat16 put the gradient off by 2.6 times its length at 1.5e-5 nats, and by 0.05 at 0.15."""
    model = tiny_model(family, **SETTINGS.get(family, {}))
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    model = model if autocast else model.bfloat16()
    settings = ProConSettings(probe_reply_tokens=6)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        probes = Probes.record(model, tokenizer, ["count to three", "why"], settings=settings, progress=False)
    weight = model.get_output_embeddings().weight
    noise = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).to(weight.dtype)
    size, before = 1.0, weight.detach().clone()
    for _ in range(12):  # so far that the divergence is as asked
        with torch.no_grad():
            weight.copy_(before + size * noise)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                size *= (nats / float(probes.departure(DecoderForward(model)))) ** 0.5
    value, found, expected = gradient_at_the_last_state(model, probes, autocast=autocast)
    assert nats / 2 < value < 2 * nats
    assert (found - expected).norm() < 0.01 * expected.norm()


def test_an_adapter_on_the_head(tiny_model, tokenizer):
    """Its product is in float32 like that of the head, and its weights have their gradient."""
    model = tiny_model().bfloat16()
    settings = ProConSettings(probe_reply_tokens=4)
    probes = Probes.record(model, tokenizer, ["why"], settings=settings, progress=False)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    penalty = probes.departure(DecoderForward(adapted))
    penalty.backward()
    head = adapted.get_output_embeddings()
    assert "forward" not in vars(head.base_layer)
    with torch.no_grad(), observe_last_state(find_decoder(adapted), (states := []).append):
        DecoderForward(adapted).run(**probes.inputs()[0])
    hidden = states[0][probes.inputs()[1]].double()
    down, up = head.lora_A["default"].weight, head.lora_B["default"].weight
    down, up = (part.detach().double().requires_grad_() for part in (down, up))
    logits = hidden @ head.base_layer.weight.double().T + head.scaling["default"] * (hidden @ down.T @ up.T)
    now = logits.log_softmax(1)
    rest = now.scatter(1, probes.tokens, -torch.inf).logsumexp(1, keepdim=True)
    each = (probes.states.double().exp() * (probes.states - torch.cat([now.gather(1, probes.tokens), rest], 1))).sum(1)
    (each.mean() + each[0]).backward()
    assert float(penalty) == pytest.approx(float(each.mean() + each[0]), rel=1e-3)
    for found, expected in (
        (head.lora_A["default"].weight.grad, down.grad),
        (head.lora_B["default"].weight.grad, up.grad),
    ):
        assert (found - expected).norm() < 0.01 * expected.norm()


def test_a_model_that_rounds_its_logits_is_named(tiny_model, tokenizer, caplog, monkeypatch):
    model = tiny_model().bfloat16()
    forward = type(model).forward

    def rounded(self, *args, **kwargs):
        outputs = forward(self, *args, **kwargs)
        outputs.logits = outputs.logits.bfloat16()
        return outputs

    rounded.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(type(model), "forward", rounded)
    Probes.record(model, tokenizer, ["why"], settings=ProConSettings(probe_reply_tokens=2), progress=False)
    assert caplog.text.count("the model gives its logits in bfloat16") == 1
