"""A run killed with SIGKILL and resumed ends in the same adapter, bit for bit."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest


def command(model: Path, data: Path, output: Path, *more: str) -> list[str]:
    settings = {
        "model": model,
        "data": data,
        "output_dir": output,
        "procon_schedule": "procon_wu:1@1ep",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_steps": 2,
        "drift_steps": 3,
        "dtype": "float32",
        "disable_tqdm": True,
    }
    flags = [part for name, value in settings.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "procon.cli", "train", *flags, *more]


def run(arguments: list[str]) -> None:
    result = subprocess.run(
        arguments, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(tiny_model, tokenizer, tmp_path):
    model, data = tmp_path / "model", tmp_path / "data.jsonl"
    tiny_model().save_pretrained(model)
    tokenizer.save_pretrained(model)
    rows = [{"prompt": f"count to {n} please", "completion": " ".join(map(str, range(n)))} for n in range(1, 21)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))

    run(command(model, data, tmp_path / "whole"))

    killed = tmp_path / "killed"
    process = subprocess.Popen(
        command(model, data, killed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 300
    while not (killed / "checkpoint-4").exists():
        assert process.poll() is None, "training ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "adapter_model.safetensors").exists()
    # Killed while it was writing checkpoint-4, or after: both must end alike.
    run(command(model, data, killed, "--resume"))

    final = "adapter_model.safetensors"
    assert (killed / final).read_bytes() == (tmp_path / "whole" / final).read_bytes()
