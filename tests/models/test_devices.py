"""Where a model goes: what is chosen, what is refused, and what a device map has put on no device."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from procon.anchors import Anchors
from procon.chat import ContrastPrompts, generate_replies
from procon.directions import Directions
from procon.errors import ProConError
from procon.models import default_device, default_dtype, load_model, model_device, origin_of, spread, weights_hash
from procon.models.devices import check_devices

PROMPTS = ContrastPrompts(("Steal the car.", "Forge the will."), ("Wash the car.", "Read the will."))


def pretend(monkeypatch, *, cuda: int = 0, xpu: int = 0, mps: bool = False) -> None:
    """A machine with these accelerators, as torch says it."""
    for kind, count in {"cuda": cuda, "xpu": xpu}.items():
        monkeypatch.setattr(f"torch.{kind}.is_available", lambda count=count: count > 0)
        monkeypatch.setattr(f"torch.{kind}.device_count", lambda count=count: count)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: mps)


@pytest.mark.parametrize(
    ("there", "rank", "device", "dtype"),
    [
        ({"cuda": 2, "xpu": 1}, None, "cuda:0", torch.bfloat16),
        ({"cuda": 2}, "1", "cuda:1", torch.bfloat16),
        ({"xpu": 2}, "1", "xpu:1", torch.bfloat16),
        ({"mps": True}, None, "mps", torch.float32),
        ({}, None, "cpu", None),
    ],
)
def test_the_device_is_what_is_there(monkeypatch, there, rank, device, dtype):
    pretend(monkeypatch, **there)
    if rank:
        monkeypatch.setenv("LOCAL_RANK", rank)
    assert default_device() == torch.device(device)
    if dtype is not None:
        assert default_dtype() == dtype


@pytest.fixture
def saved(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("there", [{"cuda": 1}, {"xpu": 1}, {"mps": True}])
def test_a_model_is_moved_there(monkeypatch, saved, there):
    """No such device can be had here, so where it would go is written down."""
    pretend(monkeypatch, **there)
    moved = []
    monkeypatch.setattr("transformers.PreTrainedModel.to", lambda model, device: moved.append(device.type) or model)
    load_model(saved, dtype="float32")
    assert moved == list(there)


@pytest.mark.parametrize(
    ("device_map", "there", "message"),
    [
        ("cuda:1", {"cuda": 1}, "device_map has 'cuda:1', which is not there: this machine has 1 x cuda"),
        ("mps", {}, "device_map has 'mps', which is not there: this machine has the CPU alone"),
        ({"model.layers": "cpu", "": "xpu:0"}, {}, "device_map has 'xpu:0', which is not there"),
        ({"": 3}, {"cuda": 2}, "device_map has '3', which is not there"),
        ("cpu", {}, None),
        ("auto", {}, None),
        ({"": 1}, {"xpu": 2}, None),
        (None, {}, None),
    ],
)
def test_devices_that_are_not_there(monkeypatch, device_map, there, message):
    pretend(monkeypatch, **there)
    if message is None:
        check_devices(device_map)
    else:
        with pytest.raises(ProConError) as caught:
            check_devices(device_map)
        assert message in str(caught.value)


def test_bits_need_bitsandbytes(monkeypatch, tmp_path):
    """Found out before the model is looked for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ProConError, match=r"^load_in_8bit needs bitsandbytes, which is not installed: pip install"):
        load_model(tmp_path / "none", load_in_8bit=True)


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


def test_a_lora_folder_goes_where_the_map_says(saved, tiny_model, tmp_path):
    get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])).save_pretrained(
        tmp_path / "lora"
    )
    file = tmp_path / "lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(saved)}))
    model, _ = load_model(tmp_path / "lora", dtype="float32", device_map={"": "cpu"})
    assert model_device(model) == torch.device("cpu")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="4-bit weights are bitsandbytes'")
    model, _ = load_model(tmp_path / "lora", load_in_4bit=True)
    assert any(isinstance(layer, bitsandbytes.nn.Linear4bit) for layer in model.modules())
