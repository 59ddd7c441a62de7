"""The best attention for packed sequences is chosen by GPU, dtype and head width."""

import pytest
import torch

from procon.models import attention, best_attention, find_decoder, load_model, use_best_attention

A100, H100, B200, RTX_5090, T4 = (8, 0), (9, 0), (10, 0), (12, 0), (7, 5)


@pytest.mark.parametrize(
    ("installed", "capability", "settings", "expected"),
    [
        ({2, 3, 4}, H100, {}, 4),
        ({2, 3, 4}, B200, {}, 4),
        ({2, 3}, H100, {}, 3),
        ({2, 3}, B200, {}, 2),
        ({2, 3, 4}, A100, {}, 2),
        ({2, 3, 4}, RTX_5090, {}, 2),
        ({2, 3, 4}, T4, {}, None),
        ({3, 4}, A100, {}, None),
        ({4}, RTX_5090, {}, None),
        (set(), H100, {}, None),
        ({2, 3, 4}, H100, {"dtype": torch.float16}, 4),
        ({2, 3, 4}, H100, {"dtype": torch.float32}, None),
        ({2, 3, 4}, H100, {"head_dim": 256}, 3),
        ({2, 4}, B200, {"head_dim": 256}, 2),
        ({2, 3, 4}, H100, {"head_dim": 512}, None),
        ({2, 3, 4}, H100, {"device": "cpu"}, None),
        ({2, 3, 4}, (9, 4), {"hip": "6.4"}, 2),  # an MI300 counts itself as 9.4
        ({3, 4}, (9, 4), {"hip": "6.4"}, None),
    ],
)
def test_choice(monkeypatch, installed, capability, settings, expected):
    for version in (2, 3, 4):
        monkeypatch.setattr(
            attention, f"is_flash_attn_{version}_available", lambda version=version: version in installed
        )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", settings.pop("hip", None))
    found = best_attention(settings.pop("dtype", torch.bfloat16), **settings)
    assert found == (f"flash_attention_{expected}" if expected else "sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu(tiny_model, tmp_path, tokenizer):
    assert best_attention(torch.bfloat16) == "sdpa"
    tiny_model().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for chosen, found in (("auto", "sdpa"), ("eager", "eager"), (None, "sdpa")):
        assert load_model(tmp_path, attn_implementation=chosen)[0].config._attn_implementation == found


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "LoRA"])
def test_switching_a_model(monkeypatch, tiny_model, wrapped):
    """To one that runs here, as if it were the best."""
    seen = []

    def choose(dtype, *, device, head_dim):
        seen.append((dtype, device, head_dim))
        return "eager"

    monkeypatch.setattr(attention, "best_attention", choose)
    model = tiny_model("qwen3", head_dim=24).to(torch.bfloat16)
    if wrapped:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    base = find_decoder(model).module
    assert use_best_attention(model) == base.config._attn_implementation == "eager"
    assert seen == [(torch.bfloat16, torch.device("cpu"), 24)]

    for attribute, value in (("_supports_flash_attn", False), ("_compatible_flash_implementations", ["another"])):
        model = tiny_model("qwen3")
        monkeypatch.setattr(type(model), attribute, value)
        assert use_best_attention(model) == "sdpa"
        monkeypatch.undo()
        monkeypatch.setattr(attention, "best_attention", choose)


@pytest.mark.gpu
def test_loading_on_a_gpu_with_flash_attention(tiny_model, tokenizer, tmp_path):
    tiny_model(hidden_size=64, head_dim=32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    best = best_attention(torch.bfloat16, head_dim=32)
    model, _ = load_model(tmp_path, dtype=torch.bfloat16, attn_implementation="auto")
    assert model.config._attn_implementation == best
    model, _ = load_model(tmp_path, dtype=torch.float32, attn_implementation="auto")
    assert model.config._attn_implementation == "sdpa"
