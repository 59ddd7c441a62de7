"""Frameworks that take callbacks: the examples against what they call, and one that makes a loss of its own."""

import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
from datasets import Dataset
from packaging.version import Version
from transformers import Trainer, TrainingArguments

from procon.data import padding_collator
from procon.errors import ProConError
from procon.integrations import ProConCallback

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_llama_factory_example(tiny_model, tokenizer, samples, tmp_path, monkeypatch):
    """Against what it calls: ``run_exp(args, callbacks)``, which hands the callbacks to a Trainer."""
    model = tiny_model()
    logs = []

    def run_exp(args, callbacks):
        quiet = {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "per_device_train_batch_size": 2}
        settings = TrainingArguments(args["output_dir"], max_steps=10, logging_steps=1, learning_rate=1e-2, **quiet)
        data, collator = Dataset.from_list(samples), padding_collator(tokenizer)
        trainer = Trainer(
            model, settings, train_dataset=data, data_collator=collator, callbacks=callbacks, processing_class=tokenizer
        )
        trainer.train()
        logs.extend(row for row in trainer.state.log_history if "loss" in row)

    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["llamafactory.train.tuner"].run_exp = run_exp
    (tmp_path / "train.yaml").write_text(f"output_dir: {tmp_path}\n")
    flags = [str(tmp_path / "train.yaml"), "--schedule=1@1ep,0"]
    monkeypatch.setattr(sys, "argv", ["llama_factory.py", *flags])
    runpy.run_path(str(EXAMPLES / "llama_factory.py"), run_name="__main__")
    assert [row["procon/alpha"] for row in logs] == [1.0] * 4 + [0.0] * 6
    assert [step for step, row in enumerate(logs) if row.get("procon/penalty")] == [1, 3]  # every second step


def test_unsloth_example_explains_itself(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unsloth.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(EXAMPLES / "unsloth.py"), run_name="__main__")
    assert "--terms" in capsys.readouterr().out


def test_trl_is_constrained_or_stopped_before_it_trains(tiny_model, tokenizer, tmp_path):
    """TRL 1.9 trains on the forward's own loss; later versions make one from log-probabilities."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    model = tiny_model()
    settings = {"report_to": [], "disable_tqdm": True, "max_steps": 2, "logging_steps": 1, "bf16": False}
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(str(tmp_path), **settings),
        train_dataset=Dataset.from_list([{"prompt": f"count to {n}", "completion": "1 2 3"} for n in range(4)]),
        processing_class=tokenizer,
        callbacks=[ProConCallback(schedule="100")],
    )
    own_loss = Version(trl.__version__) >= Version("1.16")
    with pytest.raises(ProConError, match="ProConSFTTrainer") if own_loss else nullcontext():
        trainer.train()
    steps = [row for row in trainer.state.log_history if "procon/penalty" in row]
    assert (len(steps), trainer.state.global_step) == ((0, 0) if own_loss else (1, 2))
