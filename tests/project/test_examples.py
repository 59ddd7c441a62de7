"""Every example runs on a CPU with a tiny model, and trains it under the constraint."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

EXAMPLES = Path(__file__).parents[2] / "examples"

#: For those with a Trainer's arguments.
TRAINER = "--output_dir=out --logging_steps=1 --per_device_train_batch_size=4 --report_to=none --learning_rate=1e-2"

#: Flags beside --model and --data that make a run last a few steps, of which the constraint acts on some.
RUNS = {
    "trainer.py": f"{TRAINER} --procon_schedule=procon_wu:1@1ep --num_train_epochs=1 --gradient_accumulation_steps=2",
    "sft.py": f"{TRAINER} --procon_schedule=procon_s:1 --num_train_epochs=2 --packing --max_length=256 --bf16=false "
    "--save_strategy=no",
    "bare_loop.py": "--output_dir=out --schedule=1@1ep,0 --epochs=2 --learning_rate=1e-2 --terms=both",
    "lightning_loop.py": "--output_dir=out --epochs=1 --learning_rate=1e-2 --terms=both",
}

#: By the tests of what they show.
TESTED_ELSEWHERE = {"llama_factory.py", "unsloth.py"}


def test_axolotl_file_is_the_page_s():
    page = (EXAMPLES.parent / "docs" / "how-to" / "frameworks.md").read_text(encoding="utf-8")
    assert (EXAMPLES / "axolotl.yml").read_text(encoding="utf-8").endswith(page.split("```yaml\n")[1].split("```")[0])


def test_every_script_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} - TESTED_ELSEWHERE == set(RUNS)


@pytest.mark.parametrize("script", RUNS)
def test_example_trains(script, place, monkeypatch, capsys):
    if script == "sft.py":
        pytest.importorskip("trl", reason="the example is about TRL, which is not installed")
    if script == "lightning_loop.py":
        pytest.importorskip("lightning", reason="the example is about Lightning, which is not installed")
    monkeypatch.setattr(sys, "argv", [script, "--model=model", "--data=data.jsonl", *RUNS[script].split()])
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")

    adapter, whole = place / "out" / "adapter_model.safetensors", place / "out" / "model.safetensors"
    if adapter.is_file():
        assert any(tensor.any() for name, tensor in load_file(adapter).items() if "lora_B" in name)
    else:
        start, tuned = load_file(place / "model" / "model.safetensors"), load_file(whole)
        assert any(not torch.equal(start[name], tuned[name]) for name in start)
    assert ("--terms=both" in RUNS[script]) == bool(list((place / "out").glob("*anchors/**/*.safetensors")))


def test_bare_loop_is_the_same_however_a_step_is_cut(place, monkeypatch, capsys):
    losses, penalties = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        flags = [f"--batch_size={batch_size}", f"--accumulation={accumulation}", f"--output_dir=out{accumulation}"]
        # The first step is free: at the anchors, the absolute penalty has the slope of a rounding error.
        flags += ["--schedule=0@1steps,10", "--learning_rate=1e-3", "--terms=both"]
        argv = ["bare_loop.py", "--model=model", "--data=data.jsonl", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(EXAMPLES / "bare_loop.py"), run_name="__main__")
        lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
        losses.append([float(line[-1]) for line in lines])
        penalties.append([float(line[5]) for line in lines[1:]])
    # Printed with four decimals; of six steps, the later ones carry a penalty.
    assert len(losses[0]) == 6
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert penalties[0] == pytest.approx(penalties[1], rel=1e-3)
