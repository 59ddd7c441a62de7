"""DPO on pairs of our own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trl import DPOConfig, DPOTrainer

from benchmarks.preferences.algorithm import Algorithm
from benchmarks.preferences.pairs import preference_pairs
from benchmarks.study.start import Start
from procon.demo import Problem
from procon.training.preferences import ProConDPOConfig, ProConDPOTrainer


def _pairs(start: Start, train: Sequence[Problem], held_out: Sequence[Problem]) -> dict[str, Any]:
    return {"train_dataset": preference_pairs(train), "eval_dataset": preference_pairs(held_out)}


DPO = Algorithm(
    "dpo",
    "DPO",
    (DPOTrainer, DPOConfig),
    (ProConDPOTrainer, ProConDPOConfig),
    {"max_steps": 40, "learning_rate": 1e-3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 8},
    _pairs,
    list,
    36,
    ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"),
)
