"""An evaluation does not wait for the LM head, and finds what it found when it did."""

import torch
from peft import LoraConfig, get_peft_model

from procon.chat import generate_replies, user_turn
from procon.models import evaluating

TURNS = [user_turn(f"Count to {n}." + " Please." * (n % 4)) for n in range(24)]


def adapted(model):
    """Under an adapter: its LM head is frozen."""
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_the_head_gets_what_it_got_but_contiguous(tiny_model, tokenizer, monkeypatch):
    model = adapted(tiny_model().bfloat16())
    seen = []
    hook = model.get_base_model().lm_head.register_forward_hook(
        lambda module, args, output: seen.append((args[0].is_contiguous(), output))
    )
    settings = {"max_new_tokens": 3, "progress": False}
    found = generate_replies(model, tokenizer, TURNS, **settings)
    contiguous, seen = [flag for flag, _ in seen], [output for _, output in seen]
    assert all(contiguous)
    new = list(seen)
    hook.remove()

    monkeypatch.setattr("procon.models.eval_mode._contiguous", lambda _head, args: args)
    old = []
    hook = model.get_base_model().lm_head.register_forward_hook(
        lambda module, args, output: old.append((args[0].is_contiguous(), output))
    )
    assert generate_replies(model, tokenizer, TURNS, **settings) == found
    assert not all(flag for flag, _ in old)  # else there is nothing to mend
    assert all(torch.equal(one, other) for one, (_, other) in zip(new, old, strict=True))
    hook.remove()
    assert not model.get_base_model().lm_head._forward_pre_hooks


def test_a_model_without_a_head(tiny_model):
    with evaluating(tiny_model().model) as nothing:
        assert nothing is None
