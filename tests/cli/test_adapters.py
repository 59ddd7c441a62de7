"""The kinds of LoRA that ``procon train`` makes: each begins exactly at its anchors, and is what PEFT says it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from procon.cli import main
from procon.models import load_model

TRAIN = [
    *("train", "model", "data.jsonl", "--directions", "directions.safetensors", "--drift_steps", "0"),
    *("--output_dir", "tuned", "--logging_steps", "1", "--max_steps", "2", "--learning_rate", "1e-2"),
    *("--dtype", "float32"),
]

KINDS = {
    "dropout": ["--lora_dropout", "0.5"],
    "DoRA with dropout": ["--use_dora", "--lora_dropout", "0.5"],
    "rsLoRA": ["--use_rslora", "--lora_r", "4", "--lora_targets", "all-linear"],
    "whole modules": ["--modules_to_save", "embed_tokens,lm_head"],
}


@pytest.fixture
def here(place, random_directions, tiny_model) -> Path:
    random_directions(tiny_model()).save("directions.safetensors")
    return place


@pytest.mark.parametrize(
    ("kind", "anchors"), [*((kind, "recorded") for kind in KINDS), ("dropout", "live"), ("DoRA with dropout", "live")]
)
def test_the_first_step_is_at_the_anchors(here, kind, anchors):
    """Though dropout is on in training, and off when anchors are recorded: a fresh adapter adds nothing to drop."""
    assert main([*TRAIN, *KINDS[kind], "--procon_anchors", anchors]) == 0
    rows = json.loads(Path("tuned/trainer_state.json").read_text())["log_history"]
    first, second = (row["procon/penalty"] for row in rows if "procon/penalty" in row)
    assert first < 1e-7 < 1e-4 < second
    config = json.loads(Path("tuned/adapter_config.json").read_text())
    assert config["lora_dropout"] == (0.5 if "dropout" in kind else 0.0)
    assert (config["use_dora"], config["use_rslora"]) == ("DoRA" in kind, kind == "rsLoRA")
    names = " ".join(load_file("tuned/adapter_model.safetensors"))
    assert ("embed_tokens" in names) == (kind == "whole modules")
    assert ("mlp.up_proj" in names) == (kind == "rsLoRA")


@pytest.mark.parametrize("kind", ["DoRA with dropout", "whole modules"])
def test_the_merged_model_computes_as_the_adapter_does(here, kind, tokenizer, capsys):
    assert main([*TRAIN, *KINDS[kind], "--merge"]) == 0
    assert "Merged: tuned/merged, a model without an adapter." in capsys.readouterr().out
    merged = AutoModelForCausalLM.from_pretrained("tuned/merged")
    adapted, _ = load_model("tuned", dtype="float32")
    start, _ = load_model("model", dtype="float32")
    batch = tokenizer("count to 9", return_tensors="pt")
    with torch.no_grad():
        found, expected, before = (model(**batch).logits for model in (merged, adapted, start))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2)
    assert "adapter_config.json" not in {path.name for path in Path("tuned/merged").iterdir()}


def test_no_merged_model_of_an_earlier_adapter_stays(here):
    assert main([*TRAIN, "--merge", "--save_steps", "1"]) == 0
    old = load_file("tuned/merged/model.safetensors")
    resumed = [*TRAIN, "--max_steps", "2", "--resume"]
    assert main([*resumed, "--merge"]) == 0  # in place of the old one
    assert load_file("tuned/merged/model.safetensors").keys() == old.keys()
    assert main(resumed) == 0
    assert not Path("tuned/merged").exists()


def test_another_family_s_attention_is_found(here, tiny_model, random_directions, capsys):
    tiny_model("gpt_neox").save_pretrained("model")
    random_directions(tiny_model("gpt_neox")).save("directions.safetensors")
    assert main(TRAIN) == 0
    assert "LoRA of rank 8 on query_key_value" in " ".join(capsys.readouterr().out.split())
