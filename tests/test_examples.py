"""Every example runs on a CPU with a tiny model, and trains it under the constraint."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parent.parent / "examples"

#: Flags beside --model and --data that make a run last a few steps, of which the constraint acts on some.
RUNS = {
    "trainer.py": [
        "--output_dir=out",
        "--procon_schedule=procon_wu:1@1ep",
        "--num_train_epochs=1",
        "--logging_steps=1",
        "--per_device_train_batch_size=4",
        "--gradient_accumulation_steps=2",
        "--report_to=none",
        "--learning_rate=1e-2",
    ],
    "sft.py": [
        "--output_dir=out",
        "--procon_schedule=procon_s:1",
        "--num_train_epochs=2",
        "--logging_steps=1",
        "--packing",
        "--max_length=256",
        "--per_device_train_batch_size=4",
        "--report_to=none",
        "--learning_rate=1e-2",
        "--bf16=false",
        "--save_strategy=no",
    ],
    "bare_loop.py": ["--output-dir=out", "--schedule=1@1ep,0", "--epochs=2", "--learning-rate=1e-2"],
    "lightning_loop.py": ["--output-dir=out", "--epochs=1", "--learning-rate=1e-2"],
}

#: By the tests of what they show.
TESTED_ELSEWHERE = {"llama_factory.py", "unsloth.py"}


@pytest.fixture
def place(tiny_model, tokenizer, tmp_path, monkeypatch) -> Path:
    """The current folder, with a model and data in it."""
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("model")
    tokenizer.save_pretrained("model")
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 17)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_axolotl_file_is_the_page_s():
    page = (EXAMPLES.parent / "docs" / "how-to" / "axolotl.md").read_text(encoding="utf-8")
    assert (EXAMPLES / "axolotl.yml").read_text(encoding="utf-8").endswith(page.split("```yaml\n")[1].split("```")[0])


def test_every_script_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} - TESTED_ELSEWHERE == set(RUNS)


@pytest.mark.parametrize("script", RUNS)
def test_example_trains(script, place, monkeypatch, capsys):
    if script == "sft.py":
        pytest.importorskip("trl", reason="the example is about TRL, which is not installed")
    if script == "lightning_loop.py":
        pytest.importorskip("lightning", reason="the example is about Lightning, which is not installed")
    monkeypatch.setattr(sys, "argv", [script, "--model=model", "--data=data.jsonl", *RUNS[script]])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    adapter, whole = place / "out" / "adapter_model.safetensors", place / "out" / "model.safetensors"
    if adapter.is_file():
        assert any(tensor.any() for name, tensor in load_file(adapter).items() if "lora_B" in name)
    else:
        start, tuned = load_file(place / "model" / "model.safetensors"), load_file(whole)
        assert any(not torch.equal(start[name], tuned[name]) for name in start)
    assert list((place / "out").glob("*anchors/**/*.safetensors"))
