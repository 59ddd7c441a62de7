"""Every example runs on a CPU with a tiny model, and trains it under the constraint."""

import runpy
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from procon import Directions, ProCon, ProConSettings
from procon.data import padding_collator

EXAMPLES = Path(__file__).parents[2] / "examples"

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
    "bare_loop.py": ["--output_dir=out", "--schedule=1@1ep,0", "--epochs=2", "--learning_rate=1e-2"],
    "lightning_loop.py": ["--output_dir=out", "--epochs=1", "--learning_rate=1e-2"],
}

#: By the tests of what they show.
TESTED_ELSEWHERE = {"llama_factory.py", "unsloth.py"}


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


def test_bare_loop_is_the_same_however_a_step_is_cut(place, monkeypatch, capsys):
    losses, penalties = [], []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        flags = [f"--batch_size={batch_size}", f"--accumulation={accumulation}", f"--output_dir=out{accumulation}"]
        # The first step is free: at the anchors, the absolute penalty has the slope of a rounding error.
        flags += ["--schedule=0@1steps,10", "--learning_rate=1e-3"]
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


def test_lightning_module_scales_by_the_optimizer_step(tiny_model, tokenizer, tmp_path):
    """Its gradient over four micro-batches of unlike lengths is that of one forward over all of them."""
    lightning = pytest.importorskip("lightning", reason="the example is about Lightning, which is not installed")
    example = runpy.run_path(str(EXAMPLES / "lightning_loop.py"))
    rows = [
        {"input_ids": list(range(3, 9 + 3 * n)), "labels": [-100] * 3 + list(range(6, 9 + 3 * n))} for n in range(8)
    ]
    model = tiny_model()
    directions = Directions.extract(model, tokenizer, check_refusal=False, progress=False)
    settings = ProConSettings(schedule="procon_s:1e4", scope="response", penalty="squared", probes="none")
    procon = ProCon(model, tokenizer, settings, directions, folder=tmp_path, progress=False)
    loaders = [DataLoader(rows, size, collate_fn=padding_collator(tokenizer)) for size in (2, 8)]
    loader, whole = (procon.prepare(loader) for loader in loaders)
    with torch.no_grad():  # off its anchors, as there the penalty has no gradient
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def definition(alpha: float) -> dict[str, torch.Tensor]:
        model.zero_grad()
        batch = next(iter(whole))
        constraint = procon.constraint
        constraint.set_target(batch.pop("anchors"), batch.pop("constraint_mask"))
        (model(**batch).loss + alpha * constraint.penalty()).backward()
        constraint.release()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    model.train()
    plain, expected = definition(0.0), definition(1e4)
    module = example["ConstrainedModule"](model, procon, learning_rate=0.0)
    module.configure_optimizers = lambda: torch.optim.SGD(model.parameters(), lr=1.0)
    settings = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_epochs=1, accumulate_grad_batches=4, default_root_dir=tmp_path, **settings)
    trainer.fit(module, example["OptimizerSteps"](loader, 4))
    assert trainer.global_step == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(start[name] - parameter, expected[name], rtol=1e-4, atol=1e-5)
    # The penalty is no small part of what was compared.
    penalty = sum((expected[name] - plain[name]).square().sum() for name in expected)
    assert penalty > sum(gradient.square().sum() for gradient in plain.values())
