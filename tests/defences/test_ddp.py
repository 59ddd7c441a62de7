"""Two gloo ranks under DDP train as one process does, whatever the defence."""

import os
import subprocess
import sys
from pathlib import Path

import torch

WORKER = Path(__file__).parents[1] / "workers" / "defences.py"
NAMES = ["plain", "sppft", "constrained_sft", "safe_lora", "lisa", "steering", "hidden_states"]


def launch(folder: Path, *torchrun: str) -> None:
    result = subprocess.run(
        [sys.executable, *torchrun, str(WORKER), str(folder), *NAMES],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def test_two_ranks_train_as_one_process(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    launch(tmp_path)
    launch(tmp_path, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    one, two = (torch.load(tmp_path / f"{ranks}.pt") for ranks in (1, 2))

    def flat(found: dict, index: int) -> torch.Tensor:
        return torch.cat([pair[index].flatten() for pair in found.values()])

    way = {name: flat(found, 1) - flat(found, 0) for name, found in one.items()}
    for name in NAMES:
        assert way[name].norm() > 1e-3, name
        difference = flat(two[name], 1) - flat(one[name], 1)
        # The loss is summed in fp32.
        assert difference.norm() <= 1e-4 * way[name].norm(), name
        assert name == "plain" or (way[name] - way["plain"]).norm() > 1e-2 * way["plain"].norm(), name
