"""A run killed with SIGKILL and resumed ends in the same adapter, bit for bit; what would make another is told."""

import json
import signal
import time
from pathlib import Path

import pytest
from forked import Python, run_python

from procon.directions import DIRECTIONS_FILE
from procon.errors import ProConError


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "output_dir": output,
        "procon_terms": "both",
        "procon_schedule": "procon_wu:1@1ep",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "drift_steps": 3,
        "procon_probes": data.with_name("probes.txt"),
        "dtype": "float32",
        "disable_tqdm": True,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return ["-m", "procon.cli", "train", *flags, *more]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tiny_model, tokenizer, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    tiny_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"count to {n} please", "completion": " ".join(map(str, range(n)))} for n in range(1, 21)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data.with_name("probes.txt").write_text("".join(f"count down from {n}\n" for n in range(12)))

    run_python(*command(model, data, tmp_path / "whole"))

    killed = tmp_path / "killed"
    process = Python(*command(model, data, killed))
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-4").exists():
        assert process.runs, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    assert not (killed / "adapter_model.safetensors").exists()
    # Killed while it was writing checkpoint-4, or after: both must end alike.
    run_python(*command(model, data, killed, "--resume"))

    final = "adapter_model.safetensors"
    assert (killed / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()


#: argv: the model, the output folder, and how the run goes: "whole", "killed" or "resumed".
SFT_SCRIPT = """
import os, signal, sys

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from procon.directions import Directions
from procon.training.sft import ProConSFTConfig, ProConSFTTrainer

source, output, way = sys.argv[1:]
set_seed(0)  # older TRL draws the adapter before the Trainer sets its seed


class Trainer(ProConSFTTrainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        if way == "killed" and self.state.global_step == 6:
            os.kill(os.getpid(), signal.SIGKILL)  # the adapter of checkpoint-6 is written, its state is not
        super()._save_optimizer_and_scheduler(output_dir)


def refuse(*args, **kwargs):
    raise AssertionError("extracted again: by now the model is another one")


if way == "resumed":
    Directions.extract = refuse
rows = [{"prompt": f"count to {n} please", "completion": " ".join(map(str, range(n)))} for n in range(1, 41)]
trainer = Trainer(
    AutoModelForCausalLM.from_pretrained(source),
    ProConSFTConfig(
        output_dir=output,
        procon_terms="both",
        procon_schedule="procon_wu:1@1ep",
        num_train_epochs=1,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        packing=True,
        max_length=192,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        bf16=False,
        report_to=[],
        disable_tqdm=True,
    ),
    train_dataset=Dataset.from_list(rows),
    processing_class=AutoTokenizer.from_pretrained(source),
    peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
)
trainer.train(resume_from_checkpoint=way == "resumed")
trainer.save_model()
"""


@pytest.mark.slow
def test_packed_sft_killed_in_a_checkpoint_and_resumed_equals_uninterrupted(tiny_model, tokenizer, tmp_path):
    pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")

    def sft(folder: str, way: str) -> list[str]:
        return ["-c", SFT_SCRIPT, str(tmp_path / "model"), str(tmp_path / folder), way]

    run_python(*sft("whole", "whole"))
    run_python(*sft("killed", "killed"), code=-signal.SIGKILL)
    killed = tmp_path / "killed"
    assert (killed / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert not (killed / "checkpoint-6" / "trainer_state.json").exists()
    run_python(*sft("killed", "resumed"))

    histories = [
        json.loads((tmp_path / folder / "checkpoint-8" / "trainer_state.json").read_text())["log_history"]
        for folder in ("whole", "killed")
    ]
    penalties, resumed = ([row.get("procon/penalty") for row in history] for history in histories)
    assert penalties == resumed
    assert max(filter(None, penalties)) > 1e-6
    final = "adapter_model.safetensors"
    assert (killed / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
    assert (killed / DIRECTIONS_FILE).read_bytes() == (tmp_path / "whole" / DIRECTIONS_FILE).read_bytes()


def test_noise_comes_and_goes_with_a_new_run_alone(make_trainer):
    make_trainer("Trainer", "0").train()
    with pytest.raises(ProConError, match=r"was trained with neftune_noise_alpha None, not 5.0: resume with the same"):
        make_trainer("Trainer", "0", neftune_noise_alpha=5.0).train(True)


def test_a_run_is_resumed_with_the_same_probe_prompts_only(make_trainer, tmp_path):
    def trainer(name: str, *prompts: str):
        (tmp_path / name).write_text("\n".join(json.dumps({"instruction": prompt}) for prompt in prompts))
        return make_trainer("Trainer", "procon_s", procon_terms="probes", procon_probes=str(tmp_path / name))

    trainer("probes.jsonl", "count to nine", "why").train()
    with pytest.raises(ProConError, match=r"was trained with probes '2 prompts, .*', not '2 prompts"):
        trainer("probes.jsonl", "count to nine", "how").train(True)
    with pytest.raises(ProConError, match=r"was trained with probes .*, not 'builtin'"):
        make_trainer("Trainer", "procon_s", procon_terms="probes").train(True)
    trainer("moved.jsonl", "count to nine", "why").train(True)


def test_a_run_is_resumed_with_the_same_reference_model_only(make_trainer, tiny_model):
    def trainer(width: int):
        made = make_trainer("Trainer", "0")
        made.ref_model = tiny_model(intermediate_size=width)  # as trainers of preferences have one
        return made

    trainer(64).train()
    with pytest.raises(ProConError, match=r"was trained with reference_model .*: give the reference model"):
        trainer(32).train(True)
    trainer(64).train(True)
