"""Loading a model: to which device, with which attention, and without running the code that comes with it."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from procon.anchors import Anchors
from procon.chat import ContrastPrompts, generate_replies
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import (
    best_attention,
    default_dtype,
    find_decoder,
    load_model,
    loading,
    model_device,
    origin_of,
    spread,
    use_best_attention,
    weights_hash,
)
from procon.models.loading import default_device

PROMPTS = ContrastPrompts(("Steal the car.", "Forge the will."), ("Wash the car.", "Read the will."))


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("there", "rank", "device", "dtype"),
    [
        ("cuda", None, "cuda:0", torch.bfloat16),
        ("xpu", "1", "xpu:1", torch.bfloat16),
        ("mps", None, "mps:0", torch.float32),
        (None, "1", "cpu", None),
    ],
)
def test_the_device_is_what_is_there(monkeypatch, saved, there, rank, device, dtype):
    """No such device can be had here, so where the model would go is written down."""
    found = there and torch.device(there)
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: found)
    monkeypatch.setenv("LOCAL_RANK", rank or "0")
    moved = []
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: moved.append(str(device)) or model)
    load_model(saved, dtype="float32")
    assert moved == ([device] if there else [])
    assert str(default_device()) == device
    if dtype is not None:
        assert default_dtype() == dtype


@pytest.mark.parametrize(
    ("found", "dtype"),
    [
        ({"amx_bf16": True, "avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.bfloat16),
        ({"avx512_bf16": True, "cpu_name": "Intel Xeon"}, torch.float32),
        ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, torch.bfloat16),
        ({"avx512_f": True}, torch.float32),
    ],
)
def test_a_cpu_has_the_dtype_that_it_multiplies_faster(monkeypatch, found, dtype):
    monkeypatch.setattr("torch.accelerator.current_accelerator", lambda check_available: None)
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: found)
    assert default_dtype() == dtype


def test_what_cannot_be_had_is_one_line(saved, monkeypatch):
    monkeypatch.setattr("transformers.utils.quantization_config.importlib.metadata.version", lambda name: 1 / 0)
    for name, asked in (
        ("./none", {}),
        (saved, {"dtype": "int3"}),
        (saved, {"device_map": "cuda:7"}),
        (saved, {"load_in_4bit": True, "load_in_8bit": True}),
    ):
        with pytest.raises(ProConError, match=r"^model '.*' cannot be loaded \(.*\): give a folder or a hub name$"):
            load_model(name, **asked)


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}, {"model": "cpu", "lm_head": "disk"}])
def test_a_device_map_changes_nothing(saved, tiny_model, tokenizer, random_directions, samples, tmp_path, device_map):
    """Nor does a model of which a part is on the disk until it runs: directions, anchors, replies, hashes."""
    if isinstance(device_map, dict) and "model" in device_map:
        device_map = {"model.embed_tokens": "disk", "model.layers.0": "cpu", "model.layers.1": "disk"}
        device_map |= {"model.layers.2": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk"}
    plain, _ = load_model(saved, dtype="float32")
    model, _ = load_model(saved, dtype="float32", device_map=device_map)
    on_disk = isinstance(device_map, dict) and "disk" in device_map.values()
    assert spread(model) == (["disk", "cpu"] if on_disk else [])
    assert model.get_input_embeddings().weight.is_meta == on_disk
    assert model_device(model) == torch.device("cpu")
    assert weights_hash(model) == weights_hash(plain)
    assert origin_of(model) == origin_of(plain)

    def found(model: nn.Module, name: str):
        directions = Directions.extract(
            model, tokenizer, PROMPTS, held_out=PROMPTS, check_refusal=False, progress=False
        )
        ids = torch.tensor([samples[0]["input_ids"]])
        batch = {"input_ids": ids, "labels": ids}
        anchors = Anchors.record(model, [batch], directions, tmp_path / name, progress=False)
        replies = generate_replies(
            model, tokenizer, [[{"role": "user", "content": "Hello"}]], max_new_tokens=4, progress=False
        )
        return directions.basis[:, 0], anchors.annotate(batch)["anchors"], replies

    ours, theirs = found(model, "ours"), found(plain, "theirs")
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])
    assert ours[2] == theirs[2]


# Attention

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
        monkeypatch.setattr(loading, f"is_flash_attn_{version}_available", lambda one=version: one in installed)
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

    monkeypatch.setattr(loading, "best_attention", choose)
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
        monkeypatch.setattr(loading, "best_attention", choose)


# Code that comes with a model

#: What a model's own code would do: leave a trace.
CODE = "from pathlib import Path\nPath('ran').touch()\nfrom transformers import LlamaConfig, LlamaForCausalLM\n"
CODE += "class Config(LlamaConfig):\n    model_type = 'mine'\n"
CODE += "class Model(LlamaForCausalLM):\n    config_class = Config\n"


@pytest.fixture
def folder(tiny_model, tokenizer, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    # Whoever asks gets a yes.
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 10))
    return tmp_path / "model"


def edit(folder: Path, name: str, **values) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def with_code(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit(
        folder,
        "config.json",
        model_type="mine",
        auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"},
    )


def with_tokenizer_code(folder: Path) -> None:
    (folder / "code.py").write_text(CODE)
    edit(folder, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["code.Mine", None]})


@pytest.mark.parametrize("prepare", [with_code, with_tokenizer_code])
@pytest.mark.parametrize("adapter", [False, True])
def test_code_of_a_model_is_refused(folder, tiny_model, prepare, adapter):
    if adapter:
        get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
            "lora"
        )
        edit(Path("lora"), "adapter_config.json", base_model_name_or_path="model")
    prepare(folder)
    name = "lora" if adapter else "model"
    with pytest.raises(ProConError, match=rf"model '{name}' cannot be loaded .*trust_remote_code=True") as caught:
        load_model(name)
    assert "--trust_remote_code" in str(caught.value)
    assert not Path("ran").exists()
    assert sys.stdin.tell() == 0


def test_code_that_is_trusted_runs(folder, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    with_code(folder)
    model, _ = load_model("model", trust_remote_code=True)
    assert type(model).__name__ == "Model"
    assert Path("ran").exists()
