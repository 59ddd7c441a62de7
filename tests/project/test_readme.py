"""Every Python block of the README runs, and CI runs the README's test command."""

import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from procon.data import load_conversations, padding_collator, tokenize_conversations

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command():
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    command = next(block for block in commands if "pytest" in block).split("&&")[-1].strip()
    assert command in (ROOT / ".ci" / "run").read_text()


def test_all_blocks_are_known():
    marks = ["protect(", "ProCon(", "constrain("]
    assert [mark in block for mark, block in zip(marks, BLOCKS, strict=True)] == [True] * len(marks)


def test_trainer_block(place):
    pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    names = {"model_name": "model", "data_file": "data.jsonl", "output_dir": "out"}
    # TRL trains in bfloat16 unless told otherwise, and asks for a word of those who do so on a CPU.
    exec(BLOCKS[0].replace("SFTConfig(", "SFTConfig(use_cpu=True, "), names)
    assert names["trainer"].state.global_step == 6  # 16 rows, batches of eight, three epochs
    assert names["trainer"].procon.evidence.constrained_steps == 3  # every second one
    assert not Path("out", "_anchors").exists()  # nothing is recorded of the data


def test_own_loop_block(place, tiny_model, tokenizer):
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dataset = tokenize_conversations(load_conversations("data.jsonl"), tokenizer)
    names = {"DataLoader": DataLoader, "model": model, "dataset": dataset, "tokenizer": tokenizer}
    names |= {"collator": padding_collator(tokenizer), "optimizer": torch.optim.AdamW(model.parameters())}
    exec(BLOCKS[1], names)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    found = names["procon"].log(4)["procon/penalty"]  # the mean of the two of four steps that run probes
    assert found > 0
    assert names["procon"].did()["penalty_sum"] == pytest.approx(2 * found)


def test_op_block():
    names: dict = {}
    exec(BLOCKS[2], names)
    names["penalty"].backward()
    assert names["hidden"].shape == (2, 8, 576)
