"""Two gloo ranks under DDP train as one process does, whatever the defence."""

from pathlib import Path

import torch
from forked import run_python, run_ranks

WORKER = Path(__file__).parents[2] / "workers" / "defences.py"
NAMES = ["plain", "sppft", "constrained_sft", "safe_lora", "lisa", "steering", "hidden_states"]
NAMES += ["kl", "safegrad", "safety_step", "null_space", "moving_average", "safe_merge"]


def test_two_ranks_train_as_one_process(tiny_model, tokenizer, tmp_path):
    tiny_model().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    run_python(WORKER, tmp_path, *NAMES)
    run_ranks(2, WORKER, tmp_path, *NAMES)
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
