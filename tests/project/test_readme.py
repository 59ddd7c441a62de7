"""Every Python block of the README runs, and CI runs the README's test command."""

import json
import re
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from procon.chat import response_mask, user_turn
from procon.data import padding_collator

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_test_command():
    commands = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    command = next(block for block in commands if "pytest" in block).split("&&")[-1].strip()
    assert command.removeprefix(".venv/bin/") in (ROOT / ".ci" / "run").read_text()


def test_all_blocks_are_known():
    marks = ["protect(", "ProCon(", "constrain("]
    assert [mark in block for mark, block in zip(marks, BLOCKS, strict=True)] == [True] * len(marks)


def test_trainer_block(tiny_model, tokenizer, tmp_path):
    pytest.importorskip("trl", reason="SFTTrainer is TRL's")
    model_name, data_file = str(tmp_path / "model"), str(tmp_path / "data.jsonl")
    tiny_model().save_pretrained(model_name)
    tokenizer.save_pretrained(model_name)
    rows = [{"prompt": f"count to {n}", "completion": " ".join(map(str, range(n)))} for n in range(1, 9)]
    Path(data_file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = {"model_name": model_name, "data_file": data_file, "output_dir": str(tmp_path / "out")}
    # TRL trains in bfloat16 unless told otherwise, and asks for a word of those who do so on a CPU.
    exec(BLOCKS[0].replace("SFTConfig(", "SFTConfig(use_cpu=True, "), names)
    assert names["trainer"].state.global_step == 3  # eight rows, batches of eight, three epochs
    assert names["trainer"].procon.evidence.constrained_steps == 3
    assert list((tmp_path / "out" / "_anchors").glob("*/*.safetensors"))


def test_own_loop_block(tiny_model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_model()
    rows = []
    for n in range(1, 9):
        ids, mask = response_mask(
            tokenizer, [*user_turn(f"count to {n}"), {"role": "assistant", "content": " ".join(map(str, range(n)))}]
        )
        labels = [token if keep else -100 for token, keep in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids, "labels": labels})
    collator = padding_collator(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    names = {
        "DataLoader": DataLoader,
        "model": model,
        "dataset": rows,
        "collator": collator,
        "tokenizer": tokenizer,
        "optimizer": torch.optim.AdamW(model.parameters()),
    }
    exec(BLOCKS[1], names)
    assert any(not torch.equal(before[name], p) for name, p in model.named_parameters())
    found = names["procon"].log(2)["procon/penalty"]  # the mean of two steps
    assert found > 0
    assert names["procon"].did()["penalty_sum"] == pytest.approx(2 * found)


def test_op_block():
    names: dict = {}
    exec(BLOCKS[2], names)
    names["penalty"].backward()
    assert names["hidden"].shape == (2, 8, 576)
